/** The filters beside the results: what can be chosen, how many products have it, and what is chosen. */

import { formatPrice, leaf } from "./render.js";
import { START, isPicked, toggled, viewToUrl } from "./view.js";

/** @typedef {import("./view.js").View} View */
/** @typedef {import("./listing.js").Facets} Facets */
/** @typedef {import("./listing.js").PriceStep} PriceStep */
/** @typedef {{value: string, count: number | null}} Choice */

/** Values shown before "Show all". */
const FEW = 6;
/** A small tree of categories is shown whole, of a larger one what lies around the chosen path. */
const SMALL_TREE = 12;
const COLOUR = /\.colou?rs?$/i;

export class FacetLists {
  /** Facets that were folded away or unfolded, by key. @type {Map<string, boolean>} */
  #open = new Map();
  /** Facets of which all values are shown. @type {Set<string>} */
  #whole = new Set();
  /** What is shown, to be drawn again. @type {[Facets, View]} */
  #shown = [{}, START];

  /**
   * @param {HTMLElement} root
   * @param {HTMLElement} prices
   * @param {{onChange: (change: Partial<View>) => void, view: () => View, unfolded: () => boolean}} options `view`: as it is
   * chosen now, before its answer came; `unfolded`: whether facets that nobody touched are open
   */
  constructor(root, prices, { onChange, view, unfolded }) {
    this.root = root;
    this.prices = prices;
    this.onChange = onChange;
    this.view = view;
    this.unfolded = unfolded;
  }

  /** @param {Facets} facets @param {View} view @param {string | null} currency of all prices, if they have one */
  show(facets, view, currency) {
    this.#shown = [facets, view];
    const focused = document.activeElement instanceof HTMLElement ? document.activeElement.dataset.choice : undefined;
    this.#drawLists();
    this.#drawPrices(facets.price?.ranges ?? [], view, currency);
    if (focused === undefined) return;
    // What was drawn anew is still where the visitor is.
    /** @type {NodeListOf<HTMLElement>} */
    const drawn = document.querySelectorAll("[data-choice]");
    [...drawn].find((one) => one.dataset.choice === focused)?.focus({ preventScroll: true });
  }

  #drawLists() {
    const [facets, view] = this.#shown;
    const picked = Object.keys(view.picks).filter((one) => !(one in facets));
    const keys = [...Object.keys(facets), ...picked].filter((one) => one !== "category" && isList(one));
    const groups = [
      this.#group("category", "Category", view.category !== "", this.#categories(choices(facets, "category"), view)),
      ...keys.sort(brandFirst).map((one) => this.#values(one, choices(facets, one), view)),
    ];
    this.root.replaceChildren(...groups.filter((group) => group !== null));
  }

  /** @param {string} key @param {string} name @param {boolean} chosen @param {HTMLElement[]} items */
  #group(key, name, chosen, items) {
    if (items.length === 0) return null;
    const group = document.createElement("details");
    group.className = "facet";
    group.dataset.facet = key;
    group.open = this.#open.get(key) ?? (chosen || this.unfolded());
    const list = element("ul", "choices");
    list.setAttribute("aria-label", name);
    list.append(...items);
    const head = summary(name);
    head.dataset.choice = `facet ${key}`;
    // Not on "toggle", which is told of what was drawn open too.
    head.addEventListener("click", () => this.#open.set(key, !group.open));
    group.append(head, list);
    return group;
  }

  /** @param {Choice[]} found @param {View} view @returns {HTMLElement[]} */
  #categories(found, view) {
    const path = view.category;
    const known = path && !found.some(({ value }) => value === path) ? [...found, { value: path, count: null }] : found;
    const tree = inTreeOrder(known);
    const shown =
      tree.length <= SMALL_TREE
        ? tree
        : tree.filter(({ value }) => !value.includes(" > ") || isAround(value, path));
    const items = shown.map(({ value, count }) =>
      this.#link(`category ${value}`, leaf(value), count, { category: value === path ? "" : value }, view, {
        current: value === path,
        depth: value.split(" > ").length - 1,
      }),
    );
    return path ? [this.#link("category", "All categories", null, { category: "" }, view, {}), ...items] : items;
  }

  /** @param {string} key @param {Choice[]} found @param {View} view */
  #values(key, found, view) {
    const picked = (view.picks[key] ?? []).filter((value) => !found.some((one) => one.value === value));
    const all = [...picked.map((value) => ({ value, count: null })), ...found];
    const folded = all.length > FEW + 1 && !this.#whole.has(key);
    const shown = folded ? all.filter(({ value }, index) => index < FEW || isPicked(view, key, value)) : all;
    const items = shown.map(({ value, count }) => this.#check(key, value, count, view));
    if (folded) items.push(this.#showAll(key, all.length));
    return this.#group(key, facetName(key), key in view.picks, items);
  }

  /** @param {string} key @param {string} value @param {number | null} count @param {View} view */
  #check(key, value, count, view) {
    const item = element("li", "choice");
    const label = element("label", "");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = isPicked(view, key, value);
    box.dataset.choice = `${key} ${value}`;
    box.addEventListener("change", () => this.onChange({ picks: toggled(this.view(), key, value) }));
    label.append(box, ...swatch(key, value), element("span", "choice-name", value), ...tally(count));
    item.append(label);
    return item;
  }

  /**
   * A choice with an address of its own: it can be copied, or opened beside this page.
   * @param {string} choice @param {string} text @param {number | null} count @param {Partial<View>} change
   * @param {View} view @param {{current?: boolean, depth?: number}} options
   */
  #link(choice, text, count, change, view, { current = false, depth = 0 }) {
    const item = element("li", "choice");
    const link = document.createElement("a");
    link.href = viewToUrl({ ...view, ...change });
    link.dataset.choice = choice;
    if (current) link.setAttribute("aria-current", "true");
    link.style.setProperty("--depth", String(depth));
    link.append(element("span", "choice-name", text), ...tally(count));
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.onChange(change);
    });
    item.append(link);
    return item;
  }

  /** @param {string} key @param {number} count */
  #showAll(key, count) {
    const item = element("li", "choice");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "choice-all";
    button.dataset.choice = `all ${key}`;
    button.textContent = `Show all ${count.toLocaleString()}`;
    button.addEventListener("click", () => {
      const place = item.parentElement?.children.length ?? 1;
      this.#whole.add(key);
      this.#drawLists();
      const group = [...this.root.children].find((one) => one instanceof HTMLElement && one.dataset.facet === key);
      group?.querySelectorAll("input")[place - 1]?.focus();
    });
    item.append(button);
    return item;
  }

  /** @param {PriceStep[]} ranges @param {View} view @param {string | null} currency */
  #drawPrices(ranges, view, currency) {
    const highest = Math.max(1, ...ranges.map(({ count }) => count));
    const items = ranges.map(({ gte, lt, count }) => {
      const [min, below] = [gte > 0 ? String(gte) : "", lt === undefined ? "" : String(lt)];
      const current = view.min === min && view.below === below && !view.max;
      const change = current ? { min: "", max: "", below: "" } : { min, max: "", below };
      const item = this.#link(`price ${gte}`, rangeName(gte, lt, currency), count, change, view, { current });
      item.style.setProperty("--part", String(count / highest));
      return item;
    });
    this.prices.hidden = items.length === 0;
    this.prices.replaceChildren(...items);
  }
}

/** @param {string} key @returns {string} a filter key as a person would say it */
export function facetName(key) {
  const name = key.slice(key.indexOf(".") + 1).replaceAll(/[_-]+/g, " ");
  const title = name.charAt(0).toLocaleUpperCase() + name.slice(1);
  return key.startsWith("tags.") ? `${title} (as seen)` : title;
}

/** @param {number | string} low @param {number | string | undefined} high @param {string | null} currency */
export function rangeName(low, high, currency) {
  const price = (/** @type {number | string} */ value) => formatPrice(Number(value), currency, { whole: true });
  if (high === undefined || high === "") return `${price(low)} and more`;
  return Number(low) > 0 ? `${price(low)} – ${price(high)}` : `Under ${price(high)}`;
}

/** @param {Facets} facets @param {string} key @returns {Choice[]} what can be said in the address: texts */
function choices(facets, key) {
  const found = facets[key];
  if (!Array.isArray(found)) return [];
  return found.flatMap(({ value, count }) => (typeof value === "string" ? [{ value, count }] : []));
}

/** @param {string} key */
function isList(key) {
  return key === "brand" || key.includes(".");
}

/** @param {string} one @param {string} other */
function brandFirst(one, other) {
  return Number(other === "brand") - Number(one === "brand");
}

/** @param {Choice[]} found @returns {Choice[]} every path behind the one above it, in the order of the counts */
function inTreeOrder(found) {
  const below = (/** @type {string} */ path, /** @type {number} */ depth) =>
    found.filter(({ value }) => value.split(" > ").length === depth && (depth === 1 || value.startsWith(`${path} > `)));
  const walk = (/** @type {Choice[]} */ choices, /** @type {number} */ depth) =>
    choices.flatMap((/** @type {Choice} */ one) => [one, ...walk(below(one.value, depth + 1), depth + 1)]);
  return walk(below("", 1), 1);
}

/** @param {string} value @param {string} path @returns {boolean} above the path, beside its end, or right below it */
function isAround(value, path) {
  const parent = value.slice(0, value.lastIndexOf(" > "));
  return path === parent || path.startsWith(`${parent} > `);
}

/** @param {string} key @param {string} value @returns {HTMLElement[]} a dot in the colour, where it is one that CSS knows */
function swatch(key, value) {
  if (!COLOUR.test(key) || !CSS.supports("color", value)) return [];
  const dot = element("span", "swatch");
  dot.style.setProperty("background", value);
  return [dot];
}

/** @param {number | null} count @returns {HTMLElement[]} */
function tally(count) {
  return count === null ? [] : [element("span", "tally", count.toLocaleString())];
}

/** @param {string} name */
function summary(name) {
  const made = document.createElement("summary");
  made.append(element("span", "", name));
  return made;
}

/** @param {string} tag @param {string} className @param {string} [text] */
function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}
