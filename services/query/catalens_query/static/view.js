/** What the page shows, as a value, and its form in the address bar. */

/**
 * @typedef {object} View
 * @property {string} q words searched for
 * @property {boolean} exact take the words as they are written, corrected by nothing
 * @property {string} category path, matches everything below it
 * @property {Readonly<Record<string, readonly string[]>>} picks chosen values by filter key: brand, attributes.…, tags.…
 * @property {string} min lowest price as typed
 * @property {string} max highest price as typed
 * @property {string} below the price that all are below: the upper end of a range that was chosen
 * @property {boolean} inStock
 * @property {boolean} close leave out what is not a close match
 * @property {string} sort
 * @property {string} mode
 * @property {string} using
 * @property {number} imageWeight 0 = words only, 1 = picture only
 * @property {string} similar id of the product whose neighbours are shown
 */

/** @type {Readonly<View>} */
export const START = Object.freeze({
  q: "",
  exact: false,
  category: "",
  picks: Object.freeze({}),
  min: "",
  max: "",
  below: "",
  inStock: false,
  close: false,
  sort: "relevance",
  mode: "auto",
  using: "both",
  imageWeight: 0.5,
  similar: "",
});

const SORTS = ["relevance", "price_asc", "price_desc", "newest"];
const MODES = ["auto", "semantic", "lexical", "hybrid"];
const USINGS = ["both", "image", "text"];
const PICKED = /^(?:brand|(?:attributes|tags)\.[\s\S]+)$/;

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
    exact: text("exact") === "1",
    category: text("category"),
    picks: readPicks(params),
    min: readPrice(text("min")),
    max: readPrice(text("max")),
    below: readPrice(text("below")),
    inStock: text("stock") === "1",
    close: text("close") === "1",
    sort: oneOf("sort", SORTS),
    mode: oneOf("mode", MODES),
    using: oneOf("using", USINGS),
    imageWeight: weight >= 0 && weight <= 1 ? weight : START.imageWeight,
    similar: text("similar"),
  };
}

/** @param {URLSearchParams} params */
function readPicks(params) {
  /** @type {Record<string, string[]>} */
  const picks = {};
  for (const key of new Set(params.keys())) {
    const values = PICKED.test(key) ? params.getAll(key).filter(Boolean) : [];
    if (values.length > 0) picks[key] = [...new Set(values)];
  }
  return picks;
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
  put("exact", view.exact ? "1" : "");
  put("category", view.category);
  for (const [key, values] of Object.entries(view.picks)) for (const value of values) params.append(key, value);
  put("min", view.min);
  put("max", view.max);
  put("below", view.below);
  put("stock", view.inStock ? "1" : "");
  put("close", view.close ? "1" : "");
  put("sort", view.sort, START.sort);
  put("mode", view.mode, START.mode);
  put("using", view.using, START.using);
  put("weight", String(view.imageWeight), String(START.imageWeight));
  const search = params.toString();
  return search ? `/?${search}` : "/";
}

/** @param {View} view @param {string} key @param {string} value @returns {boolean} */
export function isPicked(view, key, value) {
  return view.picks[key]?.includes(value) ?? false;
}

/**
 * @param {View} view @param {string} key @param {string} value
 * @returns {Record<string, readonly string[]>} the picks with this one put in, or taken out if it was in
 */
export function toggled(view, key, value) {
  const { [key]: values = [], ...others } = view.picks;
  const left = values.includes(value) ? values.filter((one) => one !== value) : [...values, value];
  return left.length > 0 ? { ...others, [key]: left } : others;
}

/** @param {View} view @returns {boolean} whether the price is narrowed */
export function hasPrice(view) {
  return Boolean(view.min || view.max || view.below);
}

/** @param {View} view @returns {number} how many filters narrow the results */
export function countFilters(view) {
  const picked = Object.values(view.picks).reduce((sum, values) => sum + values.length, 0);
  return picked + [view.category, hasPrice(view), view.inStock, view.close].filter(Boolean).length;
}

/** @param {View} view @returns {boolean} whether the price range can match anything */
export function priceRangeIsValid(view) {
  const upto = view.below || view.max;
  return !view.min || !upto || Number(view.min) <= Number(upto);
}

/** @param {View} view @returns {View} the view with every filter taken off */
export function withoutFilters(view) {
  return { ...view, category: "", picks: START.picks, min: "", max: "", below: "", inStock: false, close: false };
}
