/** Where products come from: the catalogue in order, a search, or the neighbours of one product. */

import { Problem } from "./api.js";
import { START, countFilters, hasPrice } from "./view.js";

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
 * @property {Record<string, unknown> | null} [attributes]
 * @property {Record<string, {value: string}> | null} [tags]
 * @property {number} [score]
 * @property {Part[]} [explain]
 */

/**
 * What one list, one boost, or being exactly what was asked for, adds to a score.
 * @typedef {object} Part
 * @property {string} part
 * @property {string} [field] of a boost
 * @property {number | null} [score] the list's own; null if it lacks the product
 * @property {number} contribution
 */

/**
 * What can be chosen, by filter key.
 * @typedef {Record<string, {value: unknown, count: number | null}[]> & {price?: PriceFacet}} Facets
 * @typedef {{gte: number, lt?: number, count: number}} PriceStep
 * @typedef {{min: number | null, max: number | null, ranges: PriceStep[]}} PriceFacet
 */

/**
 * What is known of the catalogue as a whole.
 * @typedef {object} Known
 * @property {Product[]} products the first ones, in id order
 * @property {boolean} complete these are all
 * @property {string[]} keys filter keys of what products share: attributes.color
 * @property {boolean} counted the index counts facets
 */

/**
 * What one more page brought.
 * @typedef {object} Page
 * @property {Product[]} products
 * @property {boolean} done nothing comes after it
 * @property {string} [model]
 * @property {number} [tookMs]
 * @property {string} [degraded]
 * @property {string} [corrected] the words as they were read, where some seemed misspelt
 * @property {number} [total] products on all pages
 */

export const PAGE_SIZE = 24;
const LARGEST_PAGE = 100;
const LARGEST_OFFSET = 10_000;
/** Browsing with filters reads at most so many products for one page, then offers to go on. */
const SCAN_PAGES = 10;
const SAMPLE_PAGES = 10;
/** Where a cut-off is a good start: docs/reference/search.md, min_score. */
const CLOSE = { words: 0.55, vectors: 0.4 };
const FACETS = ["category", "brand", "in_stock", "price"];
const MOST_FACETS = 10;
/** An attribute is worth a filter when it has few values, and products share them: a size does, a part number doesn't. */
const MOST_ATTRIBUTES = 4;
const MOST_VALUES = 40;
const LEAST_SHARED = 2;

/** A list of products that grows page by page; it remembers what it has so that Back is instant. */
export class Listing {
  /** @param {(signal: AbortSignal, listing: Listing) => Promise<Page>} fetchPage */
  constructor(fetchPage) {
    /** @type {Product[]} */
    this.products = [];
    /** @type {Page | null} the last page, for its model, time and notice */
    this.last = null;
    /** @type {Facets | null} what was counted; null where nothing is */
    this.facets = null;
    this.fetchPage = fetchPage;
  }

  /** @param {AbortSignal} signal @returns {Promise<Page>} */
  async more(signal) {
    const page = await this.fetchPage(signal, this);
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
 * @param {Known} known
 * @returns {Listing}
 */
export function openListing(api, view, photo, known) {
  if (view.similar) return openSimilar(api, view.similar);
  if (view.q || photo) return openSearch(api, view, photo, known);
  return openCatalogue(api, view);
}

/** @param {View} view @param {Photo | null} photo @returns {Record<string, unknown>} the body of a search */
export function searchBody(view, photo) {
  /** @type {Record<string, unknown>} */
  const body = { limit: PAGE_SIZE, explain: true };
  if (view.q) body.query = view.q;
  if (view.exact) body.correct = false;
  if (photo) body.image = photo.url ? { url: photo.url } : { data: photo.data };
  if (view.q && photo) body.image_weight = view.imageWeight;
  if (view.mode !== START.mode) body.mode = view.mode;
  if (view.using !== START.using) body.using = view.using;
  if (view.sort !== START.sort) body.sort = view.sort;
  if (view.close) body.min_score = view.mode === "semantic" || !view.q ? CLOSE.vectors : CLOSE.words;
  if (countFilters(view)) body.filters = searchFilters(view);
  return body;
}

/** @param {View} view */
function searchFilters(view) {
  /** @type {Record<string, unknown>} */
  const filters = { ...view.picks };
  if (view.category) filters.category = view.category;
  if (hasPrice(view)) {
    filters.price = {
      ...(view.min && { gte: Number(view.min) }),
      ...(view.max && { lte: Number(view.max) }),
      ...(view.below && { lt: Number(view.below) }),
    };
  }
  if (view.inStock) filters.in_stock = true;
  return filters;
}

/** @param {View} view @param {Known} known @returns {string[]} what is worth counting beside the results */
export function facetNames(view, known) {
  return [...new Set([...FACETS, ...Object.keys(view.picks), ...known.keys])].slice(0, MOST_FACETS);
}

/** @param {Api} api @param {View} view @param {Photo | null} photo @param {Known} known */
function openSearch(api, view, photo, known) {
  const body = searchBody(view, photo);
  return byOffset(async (offset, signal, listing) => {
    const answer = offset > 0 || !known.counted ? null : await withFacets(api, view, body, known, signal);
    listing.facets ??= answer?.facets ?? null;
    return answer ?? (await api.json("/api/v1/search", { body: { ...body, offset }, signal }));
  });
}

/**
 * @param {Api} api @param {View} view @param {Record<string, unknown>} body @param {Known} known
 * @param {AbortSignal} signal
 * @returns {Promise<any>} the answer; null where the index does not count
 */
async function withFacets(api, view, body, known, signal) {
  try {
    return await api.json("/api/v1/search", { body: { ...body, facets: facetNames(view, known) }, signal });
  } catch (error) {
    // An index that an earlier release made counts nothing until it is rebuilt; it can be searched all the same.
    if (!(error instanceof Problem && error.errors.some(({ field }) => field === "facets"))) throw error;
    known.counted = false;
    return null;
  }
}

/**
 * Count for a search that was asked before all of the facets were known.
 * @param {Api} api @param {View} view @param {Photo | null} photo @param {Known} known @param {AbortSignal} signal
 * @returns {Promise<Facets | null>}
 */
export async function countAgain(api, view, photo, known, signal) {
  const body = { ...searchBody(view, photo), limit: 1, include: [], explain: false };
  return (await withFacets(api, view, body, known, signal))?.facets ?? null;
}

/** @param {Api} api @param {string} id */
function openSimilar(api, id) {
  const path = `/api/v1/products/${encodeURIComponent(id)}/similar?limit=${PAGE_SIZE}`;
  return byOffset((offset, signal) => api.json(`${path}&offset=${offset}`, { signal }));
}

/** @param {(offset: number, signal: AbortSignal, listing: Listing) => Promise<any>} ask */
function byOffset(ask) {
  let offset = 0;
  return new Listing(async (signal, listing) => {
    const answer = await ask(offset, signal, listing);
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
      corrected: answer.corrected ? String(answer.corrected) : undefined,
      total: typeof answer.total === "number" ? answer.total : undefined,
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
  const { category, price } = product;
  if (view.category && category !== view.category && !category?.startsWith(`${view.category} > `)) return false;
  if (hasPrice(view) && typeof price !== "number") return false;
  if (view.min && Number(price) < Number(view.min)) return false;
  if (view.max && Number(price) > Number(view.max)) return false;
  if (view.below && Number(price) >= Number(view.below)) return false;
  if (view.inStock && product.in_stock !== true) return false;
  return Object.entries(view.picks).every(([key, values]) => valuesOf(product, key).some((value) => values.includes(value)));
}

/** @param {Product} product @param {string} key a filter key @returns {string[]} the texts that the product has there */
function valuesOf(product, key) {
  const [kind, name] = [key.slice(0, key.indexOf(".")), key.slice(key.indexOf(".") + 1)];
  const value =
    key === "brand" ? product.brand : kind === "tags" ? product.tags?.[name]?.value : product.attributes?.[name];
  return [value].flat().filter((one) => typeof one === "string");
}

/** @returns {Known} what is known before anything was read */
export function nothingKnown() {
  return { products: [], complete: false, keys: [], counted: true };
}

/**
 * Read the first thousand products: what there is to choose from while browsing, and which attributes are shared.
 * @param {Api} api
 * @returns {Promise<Omit<Known, "counted">>}
 */
export async function sampleCatalogue(api) {
  /** @type {Product[]} */
  const products = [];
  /** @type {string | null} */
  let after = null;
  for (let read = 0; read < SAMPLE_PAGES; read += 1) {
    const page = await catalogPage(api, after, LARGEST_PAGE);
    products.push(...page.products);
    after = page.next;
    if (after === null) break;
  }
  return { products, complete: after === null, keys: sharedKeys(products) };
}

/** @param {Product[]} products @returns {string[]} the attributes and tags worth a filter, the most frequent first */
function sharedKeys(products) {
  /** @type {Map<string, string[]>} */
  const found = new Map();
  for (const product of products) {
    const keys = [
      ...Object.keys(product.attributes ?? {}).map((name) => `attributes.${name}`),
      ...Object.keys(product.tags ?? {}).map((name) => `tags.${name}`),
    ];
    for (const key of keys) found.set(key, [...(found.get(key) ?? []), ...valuesOf(product, key)]);
  }
  return [...found]
    .filter(([, values]) => isShared(values.length, new Set(values).size))
    .sort(([, values], [, others]) => others.length - values.length)
    .slice(0, MOST_ATTRIBUTES)
    .map(([key]) => key);
}

/** @param {number} all @param {number} different @returns {boolean} */
function isShared(all, different) {
  return different > 1 && different <= MOST_VALUES && all >= LEAST_SHARED * different;
}

/**
 * What there is to choose from while browsing, as the server says it of a search: each key without its own filter.
 * Counts only where all products are known.
 * @param {Known} known @param {View} view
 * @returns {Facets}
 */
export function browsingFacets(known, view) {
  const count = (/** @type {View} */ open, /** @type {(product: Product) => unknown[]} */ values) => {
    /** @type {Map<unknown, number>} */
    const counts = new Map();
    for (const product of known.products.filter((one) => matches(one, open))) {
      for (const value of new Set(values(product))) counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    return [...counts]
      .sort(([a, many], [b, few]) => few - many || String(a).localeCompare(String(b)))
      .map(([value, n]) => ({ value, count: known.complete ? n : null }));
  };
  /** @type {Facets} */
  const facets = {
    category: count({ ...view, category: "" }, ({ category }) => levels(category)),
    in_stock: count({ ...view, inStock: false }, (product) => [product.in_stock]),
  };
  for (const key of new Set(["brand", ...Object.keys(view.picks), ...known.keys])) {
    const { [key]: _, ...picks } = view.picks;
    facets[key] = count({ ...view, picks }, (product) => valuesOf(product, key));
  }
  return facets;
}

/** @param {string | null | undefined} category @returns {string[]} the path and every level above it */
function levels(category) {
  const path = category ? category.split(" > ") : [];
  return path.map((_, level) => path.slice(0, level + 1).join(" > "));
}
