/** What the page shows, as a value, and its form in the address bar. */

/**
 * @typedef {object} View
 * @property {string} q words searched for
 * @property {string} category path, matches everything below it
 * @property {string} brand
 * @property {string} min lowest price as typed
 * @property {string} max highest price as typed
 * @property {boolean} inStock
 * @property {string} mode
 * @property {string} using
 * @property {number} imageWeight 0 = words only, 1 = picture only
 * @property {string} similar id of the product whose neighbours are shown
 */

/** @type {Readonly<View>} */
export const START = Object.freeze({
  q: "",
  category: "",
  brand: "",
  min: "",
  max: "",
  inStock: false,
  mode: "auto",
  using: "both",
  imageWeight: 0.5,
  similar: "",
});

const MODES = ["auto", "semantic", "lexical", "hybrid"];
const USINGS = ["both", "image", "text"];

/**
 * Read a view from a query string; what makes no sense falls back to the default.
 * @param {string} search
 * @returns {View}
 */
export function readView(search) {
  const params = new URLSearchParams(search);
  const text = (/** @type {string} */ name) => params.get(name)?.trim() ?? "";
  const oneOf = (/** @type {string} */ name, /** @type {string[]} */ allowed) =>
    allowed.includes(text(name)) ? text(name) : allowed[0];
  const weight = Number.parseFloat(text("weight"));
  return {
    q: text("q"),
    category: text("category"),
    brand: text("brand"),
    min: readPrice(text("min")),
    max: readPrice(text("max")),
    inStock: text("stock") === "1",
    mode: oneOf("mode", MODES),
    using: oneOf("using", USINGS),
    imageWeight: weight >= 0 && weight <= 1 ? weight : START.imageWeight,
    similar: text("similar"),
  };
}

/** @param {string} text @returns {string} the text if it is a price, otherwise nothing */
function readPrice(text) {
  const price = Number.parseFloat(text);
  return Number.isFinite(price) && price >= 0 ? String(price) : "";
}

/**
 * The page's address for a view; defaults are left out so that links stay short.
 * @param {View} view
 * @returns {string}
 */
export function viewToUrl(view) {
  const params = new URLSearchParams();
  const put = (/** @type {string} */ name, /** @type {string} */ value, unless = "") => {
    if (value !== unless) params.set(name, value);
  };
  put("similar", view.similar);
  put("q", view.q);
  put("category", view.category);
  put("brand", view.brand);
  put("min", view.min);
  put("max", view.max);
  put("stock", view.inStock ? "1" : "");
  put("mode", view.mode, START.mode);
  put("using", view.using, START.using);
  put("weight", String(view.imageWeight), String(START.imageWeight));
  const search = params.toString();
  return search ? `/?${search}` : "/";
}

/** @param {View} view @returns {number} how many filters narrow the results */
export function countFilters(view) {
  return [view.category, view.brand, view.min || view.max, view.inStock].filter(Boolean).length;
}

/** @param {View} view @returns {boolean} whether the price range can match anything */
export function priceRangeIsValid(view) {
  return !view.min || !view.max || Number(view.min) <= Number(view.max);
}

/** @param {View} view @returns {View} the view with every filter taken off */
export function withoutFilters(view) {
  return { ...view, category: "", brand: "", min: "", max: "", inStock: false };
}
