/** Product cards, skeletons and drop-down options. Data only ever enters the page as text. */

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./listing.js").Product} Product */

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
  element.textContent = `score ${new Intl.NumberFormat(LANGUAGES, { maximumSignificantDigits: 3 }).format(score)}`;
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

/** @param {number | null | undefined} price @param {string | null | undefined} currency */
export function formatPrice(price, currency) {
  if (typeof price !== "number") return "";
  if (currency) {
    try {
      return new Intl.NumberFormat(LANGUAGES, { style: "currency", currency }).format(price);
    } catch {
      return `${new Intl.NumberFormat(LANGUAGES).format(price)} ${currency}`;
    }
  }
  return new Intl.NumberFormat(LANGUAGES, { minimumFractionDigits: 2 }).format(price);
}

/** @param {string | null | undefined} category @returns {string} the last step of a path */
export function leaf(category) {
  return category?.split(" > ").at(-1) ?? "";
}

/**
 * Fill a drop-down with values after its first option, keeping what is chosen.
 * @param {HTMLSelectElement} select
 * @param {string[]} values
 * @param {(value: string) => string} [label]
 */
export function fillSelect(select, values, label = (value) => value) {
  const chosen = select.value;
  const known = chosen && !values.includes(chosen) ? [chosen, ...values] : values;
  select.replaceChildren(select.options[0], ...known.map((value) => new Option(label(value), value)));
  select.value = chosen;
}

/**
 * Choose a value, adding it where the drop-down does not know it yet.
 * @param {HTMLSelectElement} select
 * @param {string} value
 */
export function choose(select, value) {
  if (![...select.options].some((option) => option.value === value)) select.add(new Option(value, value));
  select.value = value;
}
