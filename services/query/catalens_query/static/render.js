/** Product cards, skeletons and how prices read. Data only ever enters the page as text. */

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./listing.js").Product} Product */
/** @typedef {import("./listing.js").Part} Part */

const FEW_LEFT = 5;
const SKELETONS = 8;
const LANGUAGES = [...navigator.languages];

/**
 * @template {Element} T
 * @param {ParentNode} root @param {string} selector @param {new () => T} type
 * @returns {T} the element, which the page is known to have
 */
export function find(root, selector, type) {
  const element = root.querySelector(selector);
  if (!(element instanceof type)) throw new Error(`no ${selector} in the page`);
  return element;
}

/** @param {string} id @returns {HTMLElement} a fresh copy of a template's element */
function fromTemplate(id) {
  const template = find(document, `#${id}`, HTMLTemplateElement);
  const copy = /** @type {DocumentFragment} */ (document.importNode(template.content, true));
  return find(copy, "li", HTMLElement);
}

/** @returns {HTMLElement[]} */
export function skeletons() {
  return Array.from({ length: SKELETONS }, () => fromTemplate("skeleton-template"));
}

/**
 * @param {Product} product
 * @param {{api: Api, eager: boolean, onSimilar: (product: Product) => void}} options
 * @returns {HTMLElement}
 */
export function card(product, { api, eager, onSimilar }) {
  const element = fromTemplate("card-template");
  const part = (/** @type {string} */ selector) => find(element, selector, HTMLElement);
  element.dataset.productId = product.product_id;
  part(".eyebrow").textContent = product.brand || leaf(product.category) || "";
  part(".name").append(nameOf(product));
  part(".description").textContent = product.description ?? "";
  part(".price").textContent = formatPrice(product.price, product.currency);
  showStock(part(".stock"), product);
  showScore(part(".score"), product.score);
  showWhy(find(element, ".why", HTMLDetailsElement), product);
  showPicture(element, product, api, eager);
  part(".similar-name").textContent = `: ${title(product)}`;
  part(".similar").addEventListener("click", () => onSimilar(product));
  return element;
}

/** @param {Product} product @returns {string} */
export function title(product) {
  return product.name || product.product_id;
}

/** @param {Product} product @returns {Node} */
function nameOf(product) {
  const url = webAddress(product.url);
  if (!url) return document.createTextNode(title(product));
  const link = document.createElement("a");
  link.href = url;
  link.target = "_blank";
  link.rel = "noopener";
  link.textContent = title(product);
  return link;
}

/** @param {HTMLElement} element @param {Product} product */
function showStock(element, product) {
  if (product.in_stock === false) {
    element.textContent = "Out of stock";
    element.classList.add("out");
  } else if (product.in_stock) {
    const few = typeof product.stock === "number" && product.stock <= FEW_LEFT;
    element.textContent = few ? `Only ${product.stock} left` : "In stock";
    element.classList.toggle("few", few);
  } else {
    element.hidden = true;
  }
}

/** @param {HTMLElement} element @param {number | undefined} score */
function showScore(element, score) {
  if (typeof score !== "number") return;
  element.hidden = false;
  element.title = "Score: higher is a better match";
  element.textContent = `score ${formatScore(score)}`;
}

/** @param {number} score @returns {string} */
function formatScore(score) {
  return new Intl.NumberFormat(LANGUAGES, { maximumSignificantDigits: 3 }).format(score);
}

/** @type {Record<string, string>} */
const PARTS = { image: "Picture", text: "Description", lexical: "Words", exact: "Exactly this one" };

/** @param {HTMLDetailsElement} element @param {Product} product */
function showWhy(element, product) {
  const parts = (product.explain ?? []).filter(({ contribution, score }) => contribution !== 0 || score !== undefined);
  if (parts.length === 0) return;
  element.hidden = false;
  find(element, ".why-name", HTMLElement).textContent = `: ${title(product)}`;
  const whole = parts.reduce((sum, { contribution }) => sum + Math.max(0, contribution), 0);
  const list = find(element, "ul", HTMLElement);
  list.append(...parts.map((part) => shareOf(part, whole)));
}

/** @param {Part} part @param {number} whole @returns {HTMLElement} how much of the score this part is */
function shareOf(part, whole) {
  const item = document.createElement("li");
  const share = whole > 0 ? Math.max(0, part.contribution) / whole : 0;
  item.style.setProperty("--share", `${100 * share}%`);
  const name = document.createElement("span");
  name.textContent = PARTS[part.part] ?? `Raised for ${(part.field ?? "").replace("attributes.", "")}`;
  const value = document.createElement("span");
  const percent = new Intl.NumberFormat(LANGUAGES, { style: "percent", maximumFractionDigits: 0 }).format(share);
  // A list that lacks the product says nothing about it; one that has it last adds nothing.
  value.textContent = part.score === null ? "no match" : percent;
  const own = part.part === "lexical" ? "BM25" : "cosine";
  if (typeof part.score === "number") item.title = `${own} ${formatScore(part.score)}, adds ${formatScore(part.contribution)}`;
  item.append(name, value);
  return item;
}

/** @param {HTMLElement} element @param {Product} product @param {Api} api @param {boolean} eager */
function showPicture(element, product, api, eager) {
  const image = find(element, ".picture img", HTMLImageElement);
  const flag = find(element, ".flag", HTMLElement);
  // The name stands beside the picture, so repeating it as alt text would only be read twice.
  if (product.image_status === "pending") {
    flag.textContent = "Picture on its way";
    flag.hidden = false;
  }
  if (eager) image.loading = "eager";
  setPicture(image, product.image, api);
}

/**
 * Show a product's picture, or leave the placeholder behind it visible.
 * @param {HTMLImageElement} image
 * @param {string | null | undefined} address
 * @param {Api} api
 */
export function setPicture(image, address, api) {
  const url = webAddress(address);
  image.hidden = true;
  if (!url) return;
  image.onload = () => image.classList.add("loaded");
  image.onerror = () => {
    image.hidden = true;
  };
  image.hidden = false;
  if (api.key && new URL(url).origin === location.origin) {
    whenNear(image, () => loadWithKey(image, url, api));
  } else {
    image.src = url;
  }
}

/** @param {HTMLImageElement} image @param {string} url @param {Api} api */
async function loadWithKey(image, url, api) {
  try {
    const source = URL.createObjectURL(await api.blob(url));
    image.addEventListener("load", () => URL.revokeObjectURL(source), { once: true });
    image.src = source;
  } catch {
    image.hidden = true; // the placeholder says it all; the search itself reports what is wrong
  }
}

/** @param {Element} element @param {() => void} action run once, when the element is about to be seen */
function whenNear(element, action) {
  const observer = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      action();
    },
    { rootMargin: "400px" },
  );
  observer.observe(element);
}

/** @param {string | null | undefined} address @returns {string | null} an http(s) address, absolute */
function webAddress(address) {
  if (!address) return null;
  try {
    const url = new URL(address, location.href);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

/**
 * @param {number | null | undefined} price @param {string | null | undefined} currency
 * @param {{whole?: boolean}} [options] `whole`: without a fraction where there is none
 */
export function formatPrice(price, currency, { whole = false } = {}) {
  if (typeof price !== "number") return "";
  const short = whole && Number.isInteger(price) ? { maximumFractionDigits: 0 } : {};
  if (currency) {
    try {
      return new Intl.NumberFormat(LANGUAGES, { style: "currency", currency, ...short }).format(price);
    } catch {
      return `${new Intl.NumberFormat(LANGUAGES).format(price)} ${currency}`;
    }
  }
  return new Intl.NumberFormat(LANGUAGES, { minimumFractionDigits: whole ? 0 : 2 }).format(price);
}

/** @param {string | null | undefined} category @returns {string} the last step of a path */
export function leaf(category) {
  return category?.split(" > ").at(-1) ?? "";
}
