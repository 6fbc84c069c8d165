/** Where products come from: the catalogue in order, a search, or the neighbours of one product. */

import { countFilters } from "./view.js";

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./view.js").View} View */
/** @typedef {import("./photo.js").Photo} Photo */

/**
 * @typedef {object} Product
 * @property {string} product_id
 * @property {string} name
 * @property {string | null} [description]
 * @property {string | null} [brand]
 * @property {string | null} [category]
 * @property {number | null} [price]
 * @property {string | null} [currency]
 * @property {number | null} [stock]
 * @property {boolean | null} [in_stock]
 * @property {string | null} [image]
 * @property {string | null} [image_status]
 * @property {string | null} [url]
 * @property {number} [score]
 */

/**
 * What one more page brought.
 * @typedef {object} Page
 * @property {Product[]} products
 * @property {boolean} done nothing comes after it
 * @property {string} [model]
 * @property {number} [tookMs]
 * @property {string} [degraded]
 */

export const PAGE_SIZE = 24;
const LARGEST_PAGE = 100;
const LARGEST_OFFSET = 10_000;
/** Browsing with filters reads at most so many products for one page, then offers to go on. */
const SCAN_PAGES = 10;
const FACET_PAGES = 10;

/** A list of products that grows page by page; it remembers what it has so that Back is instant. */
export class Listing {
  /** @param {(signal: AbortSignal) => Promise<Page>} fetchPage */
  constructor(fetchPage) {
    /** @type {Product[]} */
    this.products = [];
    /** @type {Page | null} the last page, for its model, time and notice */
    this.last = null;
    this.fetchPage = fetchPage;
  }

  /** @param {AbortSignal} signal @returns {Promise<Page>} */
  async more(signal) {
    const page = await this.fetchPage(signal);
    this.products.push(...page.products);
    this.last = page;
    return page;
  }
}

/**
 * The listing that a view asks for.
 * @param {Api} api
 * @param {View} view
 * @param {Photo | null} photo
 * @returns {Listing}
 */
export function openListing(api, view, photo) {
  if (view.similar) return openSimilar(api, view.similar);
  if (view.q || photo) return openSearch(api, view, photo);
  return openCatalogue(api, view);
}

/** @param {View} view @param {Photo | null} photo @returns {Record<string, unknown>} the body of a search */
export function searchBody(view, photo) {
  /** @type {Record<string, unknown>} */
  const body = { limit: PAGE_SIZE };
  if (view.q) body.query = view.q;
  if (photo) body.image = photo.url ? { url: photo.url } : { data: photo.data };
  if (view.q && photo) body.image_weight = view.imageWeight;
  if (view.mode !== "auto") body.mode = view.mode;
  if (view.using !== "both") body.using = view.using;
  if (countFilters(view)) body.filters = searchFilters(view);
  return body;
}

/** @param {View} view */
function searchFilters(view) {
  /** @type {Record<string, unknown>} */
  const filters = {};
  if (view.category) filters.category = view.category;
  if (view.brand) filters.brand = [view.brand];
  if (view.min || view.max) {
    filters.price = {
      ...(view.min && { gte: Number(view.min) }),
      ...(view.max && { lte: Number(view.max) }),
    };
  }
  if (view.inStock) filters.in_stock = true;
  return filters;
}

/** @param {Api} api @param {View} view @param {Photo | null} photo */
function openSearch(api, view, photo) {
  const body = searchBody(view, photo);
  return byOffset((offset, signal) => api.json("/api/v1/search", { body: { ...body, offset }, signal }));
}

/** @param {Api} api @param {string} id */
function openSimilar(api, id) {
  const path = `/api/v1/products/${encodeURIComponent(id)}/similar?limit=${PAGE_SIZE}`;
  return byOffset((offset, signal) => api.json(`${path}&offset=${offset}`, { signal }));
}

/** @param {(offset: number, signal: AbortSignal) => Promise<any>} ask */
function byOffset(ask) {
  let offset = 0;
  return new Listing(async (signal) => {
    const answer = await ask(offset, signal);
    /** @type {Product[]} */
    const products = answer.results;
    offset += products.length;
    const all = typeof answer.total === "number" ? offset >= answer.total : products.length < PAGE_SIZE;
    return {
      products,
      done: all || products.length === 0 || offset > LARGEST_OFFSET,
      model: answer.model,
      tookMs: answer.took_ms,
      degraded: answer.degraded ? String(answer.degraded) : undefined,
    };
  });
}

/**
 * The catalogue in id order. The listing call takes no filters, so with some set the pages are read here
 * and what does not match is passed over.
 * @param {Api} api
 * @param {View} view
 */
function openCatalogue(api, view) {
  const filtered = countFilters(view) > 0;
  /** @type {string | null} */
  let after = null;
  /** @type {Product[]} matching products of a page that was longer than what was asked for */
  let spare = [];
  let exhausted = false;
  return new Listing(async (signal) => {
    for (let read = 0; !exhausted && spare.length < PAGE_SIZE && read < SCAN_PAGES; read += 1) {
      const page = await catalogPage(api, after, filtered ? LARGEST_PAGE : PAGE_SIZE, signal);
      spare.push(...page.products.filter((product) => matches(product, view)));
      after = page.next;
      exhausted = after === null;
    }
    const products = spare.slice(0, PAGE_SIZE);
    spare = spare.slice(PAGE_SIZE);
    return { products, done: exhausted && spare.length === 0 };
  });
}

/**
 * @param {Api} api @param {string | null} after @param {number} limit @param {AbortSignal} [signal]
 * @returns {Promise<{products: Product[], next: string | null}>}
 */
async function catalogPage(api, after, limit, signal) {
  const start = after === null ? "" : `&after=${encodeURIComponent(after)}`;
  const answer = await api.json(`/api/v1/products?limit=${limit}${start}`, { signal });
  return { products: answer.products, next: answer.next ?? null };
}

/** @param {Product} product @param {View} view @returns {boolean} the server's filter rules, for browsing */
function matches(product, view) {
  const { category, brand, price } = product;
  if (view.category && category !== view.category && !category?.startsWith(`${view.category} > `)) return false;
  if (view.brand && brand !== view.brand) return false;
  if (view.min && !(typeof price === "number" && price >= Number(view.min))) return false;
  if (view.max && !(typeof price === "number" && price <= Number(view.max))) return false;
  return !view.inStock || product.in_stock === true;
}

/**
 * The categories (with every level above them) and brands of the first thousand products.
 * @param {Api} api
 * @returns {Promise<{categories: string[], brands: string[]}>}
 */
export async function readFacets(api) {
  const categories = new Set();
  const brands = new Set();
  /** @type {string | null} */
  let after = null;
  for (let read = 0; read < FACET_PAGES; read += 1) {
    const page = await catalogPage(api, after, LARGEST_PAGE);
    for (const { category, brand } of page.products) {
      const path = category ? category.split(" > ") : [];
      path.forEach((_, level) => categories.add(path.slice(0, level + 1).join(" > ")));
      if (brand) brands.add(brand);
    }
    after = page.next;
    if (after === null) break;
  }
  const order = new Intl.Collator().compare;
  return { categories: [...categories].sort(order), brands: [...brands].sort(order) };
}
