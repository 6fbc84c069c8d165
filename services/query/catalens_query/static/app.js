/**
 * The storefront page: one view in the address bar, one listing on the screen.
 *
 * A change of the view (words, photo, filters, a product to resemble) goes through `navigate`, which writes
 * the address and loads the listing. Every history entry keeps its listing and its photo in memory, so Back
 * shows at once what was there, photo searches included.
 */

import { Api, Problem } from "./api.js";
import { FacetLists, facetName, rangeName } from "./facets.js";
import { Listing, browsingFacets, countAgain, facetNames, nothingKnown, openListing, sampleCatalogue } from "./listing.js";
import { photoFromAddress, photoFromFile, pictureIn } from "./photo.js";
import { card, find, leaf, setPicture, skeletons, title } from "./render.js";
import { Suggestions } from "./suggest.js";
import { START, countFilters, hasPrice, priceRangeIsValid, readView, toggled, viewToUrl, withoutFilters } from "./view.js";

/** @typedef {import("./view.js").View} View */
/** @typedef {import("./photo.js").Photo} Photo */
/** @typedef {import("./listing.js").Product} Product */
/** @typedef {import("./listing.js").Page} Page */
/** @typedef {{listing: Listing, photo: Photo | null, scroll: number, seed: Product | null}} Entry */
/** @typedef {"push" | "replace"} How */

const TYPING_PAUSE_MS = 250;
const SLIDING_PAUSE_MS = 150;
/** An answer that comes sooner than this is not announced by skeletons: they would only flicker. */
const SKELETON_DELAY_MS = 120;
const EAGER_PICTURES = 8;
const ENTRIES_KEPT = 50;
/** The one mode that has no use for a photo; the server refuses the two together. */
const WORDS_ONLY = "lexical";
/** Where the filters stand beside the results; app.css has the same. */
const WIDE = "(min-width: 62rem)";

/**
 * @template {Element} T
 * @param {string} id @param {new () => T} type @returns {T}
 */
const byId = (id, type) => find(document, `#${id}`, type);

const ui = {
  form: byId("search", HTMLFormElement),
  query: byId("query", HTMLInputElement),
  photoChip: byId("photo-chip", HTMLElement),
  photoPreview: byId("photo-preview", HTMLImageElement),
  balance: byId("balance", HTMLElement),
  weight: byId("weight", HTMLInputElement),
  weightValue: byId("weight-value", HTMLOutputElement),
  hero: byId("hero", HTMLElement),
  filters: byId("filters", HTMLElement),
  filtersToggle: byId("filters-toggle", HTMLButtonElement),
  filtersCount: byId("filters-count", HTMLElement),
  filtersClear: byId("filters-clear", HTMLButtonElement),
  filtersDone: byId("filters-done", HTMLButtonElement),
  min: byId("price-min", HTMLInputElement),
  max: byId("price-max", HTMLInputElement),
  priceError: byId("price-error", HTMLElement),
  inStock: byId("in-stock", HTMLInputElement),
  inStockCount: byId("in-stock-count", HTMLElement),
  close: byId("close", HTMLInputElement),
  closeField: byId("close-field", HTMLElement),
  chips: byId("chips", HTMLElement),
  chipsList: byId("chips-list", HTMLElement),
  sort: byId("sort", HTMLSelectElement),
  sortField: byId("sort-field", HTMLElement),
  corrected: byId("corrected", HTMLElement),
  correctedAs: byId("corrected-as", HTMLAnchorElement),
  correctedFrom: byId("corrected-from", HTMLAnchorElement),
  options: byId("options", HTMLDetailsElement),
  mode: byId("mode", HTMLSelectElement),
  using: byId("using", HTMLSelectElement),
  results: byId("results", HTMLElement),
  back: byId("back", HTMLButtonElement),
  backWord: byId("back-word", HTMLElement),
  seed: byId("seed", HTMLElement),
  seedImage: byId("seed-image", HTMLImageElement),
  title: byId("results-title", HTMLElement),
  count: byId("count", HTMLElement),
  notice: byId("notice", HTMLElement),
  noticeText: byId("notice-text", HTMLElement),
  problem: byId("problem", HTMLElement),
  problemTitle: byId("problem-title", HTMLElement),
  problemDetail: byId("problem-detail", HTMLElement),
  problemErrors: byId("problem-errors", HTMLElement),
  problemRequest: byId("problem-request", HTMLElement),
  problemRetry: byId("problem-retry", HTMLButtonElement),
  empty: byId("empty", HTMLElement),
  emptyTitle: byId("empty-title", HTMLElement),
  emptyText: byId("empty-text", HTMLElement),
  emptyAction: byId("empty-action", HTMLButtonElement),
  grid: byId("grid", HTMLElement),
  more: byId("more", HTMLButtonElement),
  end: byId("end", HTMLElement),
  footerModel: byId("footer-model", HTMLElement),
  drop: byId("drop", HTMLElement),
  keyDialog: byId("key-dialog", HTMLDialogElement),
  keyForm: byId("key-form", HTMLFormElement),
  keyText: byId("key-text", HTMLElement),
  key: byId("key", HTMLInputElement),
};

const api = new Api({
  askForKey,
  onWait: (seconds) => showNotice(`The server is busy. Trying again in ${Math.ceil(seconds)} s…`),
});

const facetLists = new FacetLists(byId("facets", HTMLElement), byId("prices", HTMLElement), {
  onChange: (change) => void navigate(change),
  view: () => view,
  unfolded: () => matchMedia(WIDE).matches,
});
const suggestions = new Suggestions(ui.query, byId("suggestions", HTMLElement), { api, onChoose: onSuggestion });

/** @type {View} */
let view = readView(location.search);
/** @type {Photo | null} */
let photo = null;
/** The product whose neighbours are shown: known from its card, otherwise fetched. @type {Product | null} */
let seed = null;
/** @type {Listing | null} */
let listing = null;
/** @type {AbortController} */
let running = new AbortController();
/** What "Try again" repeats. */
let retry = () => void load();
/** The server's count of products and its model, for the catalogue's headline. */
let stats = { products: null, model: "" };
const known = nothingKnown();

// ---- navigation ------------------------------------------------------------------------------------------

/** @type {Map<string, Entry>} what each history entry showed */
const entries = new Map();
/** Reloads begin a new series, so a number left over in the browser's history never meets another page's. */
const series = String(performance.timeOrigin);
let entryCount = 0;
let entryId = newEntryId();
/** How many of this page's entries lie behind the current one; unlike `entries` it survives a reload. */
let depth = Number(history.state?.depth ?? 0);
/** While someone types, keystrokes rewrite one history entry in place of adding one each. */
let typing = false;

function newEntryId() {
  entryCount += 1;
  return `${series}/${entryCount}`;
}

/**
 * Show another view.
 * @param {Partial<View>} change
 * @param {{how?: How, photo?: Photo | null, seed?: Product | null}} [options] a photo left out stays
 */
function navigate(change, options = {}) {
  clearTimeout(pending);
  const leavesSimilar = Boolean(view.similar) && !change.similar;
  rememberEntry();
  // Other words, or the slider's, are corrected again.
  const exact = view.exact && (change.q ?? view.q) === view.q;
  view = { ...view, similar: "", exact, ...change };
  if (options.photo !== undefined) photo = options.photo;
  if (photo && view.mode === WORDS_ONLY) view.mode = START.mode;
  if (browsing()) Object.assign(view, { sort: START.sort, close: START.close }); // they are of a search
  seed = options.seed ?? null;
  const how = leavesSimilar ? "push" : (options.how ?? "push");
  if (how === "push") {
    entryId = newEntryId();
    depth += 1;
  }
  history[how === "push" ? "pushState" : "replaceState"]({ entry: entryId, depth }, "", viewToUrl(view));
  typing = false;
  showControls();
  return load();
}

/** Keep what is on the screen for the way back. */
function rememberEntry() {
  if (!listing) return;
  entries.delete(entryId);
  entries.set(entryId, { listing, photo, scroll: window.scrollY, seed });
  const oldest = entries.keys().next().value;
  if (entries.size > ENTRIES_KEPT && oldest) entries.delete(oldest);
}

/** @param {PopStateEvent} event */
function restore(event) {
  clearTimeout(pending);
  suggestions.close();
  rememberEntry();
  view = readView(location.search);
  typing = false;
  entryId = event.state?.entry ?? newEntryId();
  depth = Number(event.state?.depth ?? 0);
  const entry = entries.get(entryId);
  photo = entry?.photo ?? null;
  seed = entry?.seed ?? null;
  showControls();
  if (!entry?.listing.last) {
    void load();
    return;
  }
  running.abort();
  running = new AbortController();
  listing = entry.listing;
  showListing();
  window.scrollTo({ top: entry.scroll, behavior: "instant" });
}

// ---- loading ---------------------------------------------------------------------------------------------

/** Load the first page of the current view, giving up what was being loaded before. */
async function load() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  retry = () => void load();
  listing = openListing(api, view, photo, known);
  const current = listing;
  ui.results.setAttribute("aria-busy", "true");
  const skeletonTimer = setTimeout(showSkeletons, SKELETON_DELAY_MS);
  try {
    const [product] = await Promise.all([fetchSeed(signal), current.more(signal)]);
    seed = product;
    showListing();
  } catch (error) {
    if (!signal.aborted) showProblem(error);
  } finally {
    clearTimeout(skeletonTimer);
    if (!signal.aborted) ui.results.removeAttribute("aria-busy");
  }
}

/** @param {AbortSignal} signal @returns {Promise<Product | null>} */
async function fetchSeed(signal) {
  if (!view.similar || seed?.product_id === view.similar) return seed;
  return await api.json(`/api/v1/products/${encodeURIComponent(view.similar)}`, { signal });
}

async function loadMore() {
  if (!listing) return;
  const current = listing;
  const { signal } = running;
  const shown = current.products.length;
  retry = () => void loadMore();
  ui.more.disabled = true;
  ui.more.textContent = "Loading…";
  try {
    const page = await current.more(signal);
    if (signal.aborted) return;
    ui.problem.hidden = true;
    addCards(page.products, false);
    showSummary(current, page);
    // The button may be gone now, and reading goes on with the first new product.
    ui.grid.children[shown]?.querySelector("button")?.focus({ preventScroll: true });
  } catch (error) {
    if (!signal.aborted) showProblem(error, { keepResults: true });
  } finally {
    ui.more.disabled = false;
    ui.more.textContent = "Show more";
  }
}

// ---- results ---------------------------------------------------------------------------------------------

function showListing() {
  if (!listing?.last) return;
  ui.results.removeAttribute("aria-busy");
  ui.problem.hidden = true;
  ui.grid.replaceChildren();
  addCards(listing.products, true);
  showHeading();
  showFacets();
  showSummary(listing, listing.last);
  showEmpty(listing.products.length === 0);
}

/** @param {Product[]} products @param {boolean} first */
function addCards(products, first) {
  const onSimilar = (/** @type {Product} */ product) => void showSimilar(product);
  const cards = products.map((product, index) => card(product, { api, eager: first && index < EAGER_PICTURES, onSimilar }));
  ui.grid.append(...cards);
}

/** @param {Product} product */
async function showSimilar(product) {
  const loaded = navigate({ ...START, similar: product.product_id }, { photo: null, seed: product });
  window.scrollTo({ top: 0, behavior: "instant" });
  ui.title.focus({ preventScroll: true });
  await loaded;
}

function showHeading() {
  const similar = Boolean(view.similar);
  const words = view.q && `“${view.q}”`;
  const headline = similar
    ? `More like ${seed ? title(seed) : view.similar}`
    : photo
      ? ["Matches for your photo", words].filter(Boolean).join(" and ")
      : words
        ? `Results for ${words}`
        : view.category
          ? leaf(view.category)
          : (view.picks.brand?.join(", ") ?? "The catalogue");
  ui.title.textContent = headline;
  document.title = headline === "The catalogue" ? "Catalens" : `${headline} – Catalens`;
  ui.hero.hidden = similar || Boolean(view.q) || Boolean(photo) || countFilters(view) > 0;
  ui.back.hidden = !similar;
  ui.backWord.textContent = depth > 0 ? "Back" : "Whole catalogue";
  ui.seed.hidden = !similar;
  if (similar) setPicture(ui.seedImage, seed?.image, api);
}

/** @param {Listing} current @param {Page} page */
function showSummary(current, page) {
  const shown = current.products.length;
  const all = page.total ?? (browsing() && countFilters(view) === 0 ? stats.products : null);
  ui.count.textContent = describeCount(shown, page.done, all !== null && all >= shown ? all : null);
  ui.more.hidden = page.done;
  ui.end.hidden = !(page.done && shown > 0 && current.products.length > page.products.length);
  showNotice(page.degraded ? degradedText(page.degraded) : "");
  showCorrected(page.corrected);
  showModel(page.model ?? stats.model, page.tookMs);
}

/** @returns {boolean} nothing is searched for: the catalogue is shown in its own order */
function browsing() {
  return !view.q && !photo && !view.similar;
}

/** @param {string} reason the server's words @returns {string} what it means for who looks at the results */
function degradedText(reason) {
  if (!reason.startsWith("searched by words only")) return `Something is missing beside these results just now: ${reason}`;
  const unused = photo ? " Your photo was not used." : "";
  return `Only the words could be compared just now, not pictures or meaning, so some good matches may be missing.${unused} (${reason})`;
}

/** @param {string | undefined} corrected what the server took the words for */
function showCorrected(corrected) {
  ui.corrected.hidden = !corrected;
  if (!corrected) return;
  ui.correctedAs.textContent = corrected;
  ui.correctedAs.href = viewToUrl({ ...view, q: corrected });
  ui.correctedFrom.textContent = view.q;
  ui.correctedFrom.href = viewToUrl({ ...view, exact: true });
}

/**
 * Count once more for a search that was asked before it was known what its products share.
 * @param {Listing} current
 */
async function completeFacets(current) {
  const { facets } = current;
  if (!facets || facetNames(view, known).every((key) => key in facets)) return;
  const { signal } = running;
  // The results are there; filters that could not be counted are not worth an error.
  const counted = await countAgain(api, view, photo, known, signal).catch(() => null);
  if (!counted || signal.aborted) return;
  current.facets = counted;
  showFacets();
}

/** The filters beside the results, as of what is shown now. */
function showFacets() {
  if (listing) void completeFacets(listing);
  // Beside a search that came without facets the catalogue's numbers would look like its own.
  const facets = listing?.facets ?? browsingFacets({ ...known, complete: known.complete && browsing() }, view);
  facetLists.show(facets, view, currency());
  showChips();
  const inStock = facets.in_stock?.find(({ value }) => value === true)?.count;
  ui.inStockCount.textContent = inStock?.toLocaleString() ?? "";
  const { min, max } = facets.price ?? {};
  ui.min.placeholder = typeof min === "number" ? min.toLocaleString() : "from";
  ui.max.placeholder = typeof max === "number" ? max.toLocaleString() : "to";
}

/** @param {number} shown @param {boolean} done @param {number | null} whole @returns {string} */
function describeCount(shown, done, whole) {
  const products = (/** @type {number} */ n) => `${n.toLocaleString()} ${n === 1 ? "product" : "products"}`;
  if (shown === 0) return "No products";
  if (done) return products(shown);
  return whole === null ? `First ${products(shown)}` : `${shown.toLocaleString()} of ${products(whole)}`;
}

/** @param {string} model @param {number | undefined} tookMs */
function showModel(model, tookMs) {
  const name = model === "catalens-starter" ? `${model} (starter model — not CLIP)` : model;
  const time = typeof tookMs === "number" ? `${tookMs < 10 ? tookMs.toFixed(1) : Math.round(tookMs)} ms` : "";
  ui.footerModel.textContent = [name && `Model ${name}`, time && `answered in ${time}`].filter(Boolean).join(" · ");
}

/** @param {boolean} isEmpty */
function showEmpty(isEmpty) {
  ui.empty.hidden = !isEmpty;
  if (!isEmpty) return;
  const filtered = countFilters(view) > 0;
  const bare = !filtered && !view.q && !photo && !view.similar;
  ui.emptyTitle.textContent = bare ? "The catalogue is empty" : "Nothing matches";
  ui.emptyText.textContent = bare
    ? "Products appear here as soon as they are indexed."
    : filtered
      ? "The filters may be too narrow."
      : "Try other words, or a photo of what you are looking for.";
  ui.emptyAction.textContent = filtered ? "Clear filters" : "Show the whole catalogue";
  ui.emptyAction.hidden = bare;
}

function showSkeletons() {
  // Results that are about to be replaced stay, dimmed: the page does not jump while someone types.
  if (ui.grid.childElementCount > 0 && ui.problem.hidden) return;
  ui.problem.hidden = true;
  ui.empty.hidden = true;
  ui.more.hidden = true;
  ui.end.hidden = true;
  showHeading();
  ui.count.textContent = "Searching…";
  ui.grid.replaceChildren(...skeletons());
}

/** @param {string} text */
function showNotice(text) {
  ui.notice.hidden = !text;
  ui.noticeText.textContent = text;
}

/** @param {unknown} error @param {{keepResults?: boolean}} [options] */
function showProblem(error, { keepResults = false } = {}) {
  const problem =
    error instanceof Problem ? error : new Problem(0, "Something went wrong on this page", String(error));
  if (!(error instanceof Problem)) console.error(error);
  ui.problemTitle.textContent = problem.title;
  ui.problemDetail.textContent = problem.detail;
  ui.problemErrors.replaceChildren(
    ...problem.errors.map(({ field, message }) => {
      const item = document.createElement("li");
      item.textContent = field ? `${field}: ${message}` : message;
      return item;
    }),
  );
  ui.problemRequest.textContent = problem.requestId ? `Request ${problem.requestId}` : "";
  ui.problem.hidden = false;
  showNotice("");
  if (keepResults) {
    ui.problem.scrollIntoView({ block: "center" });
    return;
  }
  ui.grid.replaceChildren();
  ui.empty.hidden = true;
  ui.more.hidden = true;
  ui.end.hidden = true;
  ui.corrected.hidden = true;
  ui.count.textContent = "";
  showHeading();
}

// ---- controls --------------------------------------------------------------------------------------------

/** Bring every control in line with the view. */
function showControls() {
  // Not while it says the same: writing a value moves the caret.
  if (ui.query.value.trim() !== view.q) ui.query.value = view.q;
  if (ui.min.value !== view.min) ui.min.value = view.min;
  const upto = view.below || view.max;
  if (ui.max.value !== upto) ui.max.value = upto;
  ui.inStock.checked = view.inStock;
  ui.close.checked = view.close;
  ui.closeField.hidden = browsing();
  ui.sort.value = view.sort;
  ui.sortField.hidden = browsing() || Boolean(view.similar);
  ui.mode.value = view.mode;
  ui.using.value = view.using;
  if (view.mode !== START.mode || view.using !== START.using) ui.options.open = true;
  ui.filters.hidden = Boolean(view.similar);
  const active = countFilters(view);
  ui.filtersCount.hidden = active === 0;
  ui.filtersCount.textContent = String(active);
  showChips();
  showPriceError(false);
  showPhoto();
  showBalance();
}

/** @returns {string | null} what all prices are in, as far as is known; null if that differs */
function currency() {
  const found = new Set(known.products.map(({ currency: one }) => one ?? ""));
  return found.size === 1 ? [...found][0] : null;
}

/** Each filter that is on, to be taken off. */
function showChips() {
  const chip = (/** @type {string} */ text, /** @type {Partial<View>} */ change) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chip";
    button.setAttribute("aria-label", `Remove the filter ${text}`);
    const cross = find(document, "#chip-cross", HTMLTemplateElement).content.cloneNode(true);
    button.append(text, cross);
    button.addEventListener("click", () => {
      void navigate(change);
      ui.title.focus({ preventScroll: true }); // the chip is gone
    });
    item.append(button);
    return item;
  };
  const picked = Object.entries(view.picks).flatMap(([key, values]) =>
    values.map((value) => chip(`${facetName(key)}: ${value}`, { picks: toggled(view, key, value) })),
  );
  ui.chipsList.replaceChildren(
    ...(view.category ? [chip(leaf(view.category), { category: "" })] : []),
    ...picked,
    ...(hasPrice(view) ? [chip(rangeName(view.min, view.below || view.max, currency()), { min: "", max: "", below: "" })] : []),
    ...(view.inStock ? [chip("In stock", { inStock: false })] : []),
    ...(view.close ? [chip("Close matches only", { close: false })] : []),
  );
  ui.chips.hidden = ui.chipsList.childElementCount === 0 || Boolean(view.similar);
}

function showPhoto() {
  ui.photoChip.hidden = !photo;
  for (const option of ui.mode.options) option.disabled = option.value === WORDS_ONLY && Boolean(photo);
  ui.query.placeholder = photo ? "Add words" : "Words or a photo";
  if (!photo || ui.photoPreview.src === photo.preview) return;
  ui.photoPreview.hidden = false;
  ui.photoPreview.src = photo.preview;
}

function showBalance() {
  ui.balance.hidden = !(photo && view.q && !view.similar);
  const words = Math.round((1 - view.imageWeight) * 100);
  ui.weight.value = String(words);
  showWeight();
}

/** @returns {number} the picture's share */
function showWeight() {
  const words = Number(ui.weight.value);
  const text = `${100 - words} % picture, ${words} % words`;
  ui.weightValue.textContent = text;
  ui.weight.setAttribute("aria-valuetext", text);
  ui.weight.style.setProperty("--at", `${words}%`);
  return (100 - words) / 100;
}

/** @param {boolean} wrong */
function showPriceError(wrong) {
  ui.priceError.hidden = !wrong;
  for (const input of [ui.min, ui.max]) input.setAttribute("aria-invalid", String(wrong));
}

/** @type {ReturnType<typeof setTimeout> | undefined} a change that waits for its pause */
let pending;

/** @param {() => void} action @param {number} ms */
function soon(action, ms) {
  clearTimeout(pending);
  pending = setTimeout(action, ms);
}

function onType() {
  soon(() => {
    const q = ui.query.value.trim();
    if (q === view.q && !view.similar) return;
    void navigate({ q }, { how: typing ? "replace" : "push" });
    typing = true;
  }, TYPING_PAUSE_MS);
}

/** Search at once; what typing has already put into the address stays one history entry. */
function onSubmit() {
  suggestions.close();
  const q = ui.query.value.trim();
  void navigate({ q }, { how: typing || q === view.q ? "replace" : "push" });
  // On a phone the keyboard covers the results.
  if (matchMedia("(pointer: coarse)").matches) ui.query.blur();
}

/** @param {import("./suggest.js").Suggestion} suggestion */
function onSuggestion({ text, kind }) {
  const change =
    kind === "category"
      ? { q: leaf(text), category: text }
      : kind === "brand"
        ? { q: text, picks: { ...view.picks, brand: [text] } }
        : { q: text };
  ui.query.value = change.q;
  void navigate(change, { how: typing ? "replace" : "push" });
}

function onFilter() {
  // The upper end of a range that was chosen stays what it is until somebody writes another.
  const below = ui.max.value === view.below ? view.below : "";
  const next = {
    ...view,
    min: ui.min.value,
    max: below ? "" : ui.max.value,
    below,
    inStock: ui.inStock.checked,
    close: ui.close.checked,
    sort: ui.sort.value,
    mode: ui.mode.value,
    using: ui.using.value,
  };
  if (!priceRangeIsValid(next)) {
    showPriceError(true);
    return;
  }
  if (viewToUrl(next) !== viewToUrl(view)) void navigate(next);
}

/** @param {File | string} source */
async function searchPhoto(source) {
  suggestions.close();
  try {
    const found = typeof source === "string" ? await photoFromAddress(source) : await photoFromFile(source);
    const loaded = navigate({ q: ui.query.value.trim() }, { photo: found });
    window.scrollTo({ top: 0, behavior: "instant" });
    await loaded;
  } catch (error) {
    running.abort();
    retry = () => void searchPhoto(source);
    showProblem(error);
  }
}

function removePhoto() {
  void navigate({ imageWeight: START.imageWeight }, { photo: null });
  ui.query.focus();
}

/** @param {boolean} rejected @returns {Promise<string | null>} */
function askForKey(rejected) {
  ui.keyText.textContent = rejected
    ? "That key was not accepted. Please check it and enter it again."
    : "Enter the API key you were given. It is kept in this tab only.";
  ui.key.value = "";
  ui.keyDialog.returnValue = "";
  ui.keyDialog.showModal();
  return new Promise((resolve) => {
    ui.keyDialog.addEventListener("close", () => resolve(ui.keyDialog.returnValue || null), { once: true });
  });
}

// ---- events ----------------------------------------------------------------------------------------------

function listenToSearch() {
  ui.form.addEventListener("submit", (event) => {
    event.preventDefault();
    onSubmit();
  });
  ui.query.addEventListener("input", (event) => {
    // A half-composed syllable is not a word yet.
    if (event instanceof InputEvent && event.isComposing) return;
    onType();
    suggestions.onType();
  });
  ui.query.addEventListener("compositionend", onType);
  ui.query.addEventListener("blur", () => {
    typing = false;
  });
  document.addEventListener("keydown", (event) => {
    const inField = event.target instanceof Element && event.target.closest("input, select, textarea, dialog");
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || inField) return;
    event.preventDefault();
    ui.query.focus();
    ui.query.select();
  });
  byId("home", HTMLAnchorElement).addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    ui.query.value = "";
    void navigate({ ...START }, { photo: null });
    window.scrollTo({ top: 0, behavior: "instant" });
  });
}

function listenToFilters() {
  const changing = [ui.min, ui.max, ui.inStock, ui.close, ui.sort, ui.mode, ui.using];
  for (const control of changing) control.addEventListener("change", onFilter);
  const clear = () => void navigate(withoutFilters(view));
  ui.filtersClear.addEventListener("click", () => {
    clear();
    ui.title.focus({ preventScroll: true });
  });
  const toggle = () => {
    const open = ui.filters.classList.toggle("open");
    ui.filtersToggle.setAttribute("aria-expanded", String(open));
  };
  ui.filtersToggle.addEventListener("click", toggle);
  ui.filtersDone.addEventListener("click", () => {
    toggle();
    ui.filtersToggle.scrollIntoView({ block: "center" });
    ui.title.focus({ preventScroll: true });
  });
  matchMedia(WIDE).addEventListener("change", showFacets);
  ui.emptyAction.addEventListener("click", () => {
    if (countFilters(view)) clear();
    else void navigate({ ...START }, { photo: null });
  });
  ui.weight.addEventListener("input", () => {
    const imageWeight = showWeight();
    soon(() => void navigate({ imageWeight }, { how: "replace" }), SLIDING_PAUSE_MS);
  });
}

function listenToPhotos() {
  for (const [button, input] of [["choose-photo", "photo-file"], ["take-photo", "photo-camera"]]) {
    const chooser = byId(input, HTMLInputElement);
    byId(button, HTMLButtonElement).addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", () => {
      const file = chooser.files?.[0];
      if (file) void searchPhoto(file);
      chooser.value = ""; // so that the same file can be chosen again
    });
  }
  byId("photo-remove", HTMLButtonElement).addEventListener("click", removePhoto);
  ui.photoPreview.addEventListener("error", () => {
    ui.photoPreview.hidden = true;
  });
  document.addEventListener("paste", (event) => {
    const picture = pictureIn(event.clipboardData);
    // Office programs put a picture of the text beside the text: words win where words were copied.
    if (!(picture instanceof File) || event.clipboardData?.getData("text/plain")) return;
    event.preventDefault();
    void searchPhoto(picture);
  });
  listenToDrops();
}

function listenToDrops() {
  // Enter and leave fire for every element that is crossed; the count says when the page itself is left.
  let nested = 0;
  const show = (/** @type {number} */ value) => {
    nested = Math.max(0, value);
    ui.drop.hidden = nested === 0;
  };
  const carriesFile = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files") ?? false;
  document.addEventListener("dragenter", (event) => {
    if (carriesFile(event)) show(nested + 1);
  });
  document.addEventListener("dragleave", (event) => {
    if (carriesFile(event)) show(nested - 1);
  });
  document.addEventListener("dragend", () => show(0));
  document.addEventListener("dragover", (event) => {
    // Text and links may still be dragged into a field as everywhere else.
    const intoField = event.target instanceof HTMLInputElement && !carriesFile(event);
    if (!intoField) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    show(0);
    const picture = pictureIn(event.dataTransfer);
    if (!picture) return;
    event.preventDefault();
    void searchPhoto(picture);
  });
}

function listenToResults() {
  const follow = (/** @type {HTMLAnchorElement} */ link, /** @type {() => Partial<View>} */ change) =>
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      void navigate(change());
      ui.title.focus({ preventScroll: true });
    });
  follow(ui.correctedAs, () => ({ q: ui.correctedAs.textContent ?? "" }));
  follow(ui.correctedFrom, () => ({ exact: true }));
  ui.more.addEventListener("click", () => void loadMore());
  ui.problemRetry.addEventListener("click", () => retry());
  ui.back.addEventListener("click", () => {
    if (depth > 0) history.back();
    else void navigate({ ...START }, { photo: null });
  });
  window.addEventListener("popstate", restore);
}

function listenToDialog() {
  ui.keyForm.addEventListener("submit", (event) => {
    event.preventDefault();
    ui.keyDialog.close(ui.key.value.trim());
  });
  byId("key-cancel", HTMLButtonElement).addEventListener("click", () => ui.keyDialog.close(""));
}

// ---- start -----------------------------------------------------------------------------------------------

/** What makes the page richer and is not worth an error: what there is to choose from, the count, the model. */
async function loadSurroundings() {
  const [sample, answer] = await Promise.all([
    sampleCatalogue(api).catch(() => null),
    api.json("/api/v1/stats").catch(() => null),
  ]);
  if (answer) stats = { products: answer.products ?? null, model: answer.model ?? "" };
  if (sample) Object.assign(known, sample);
  if (!listing?.last || ui.results.hasAttribute("aria-busy")) return;
  showSummary(listing, listing.last);
  showFacets();
}

async function start() {
  history.scrollRestoration = "manual";
  history.replaceState({ entry: entryId, depth }, "");
  listenToSearch();
  listenToFilters();
  listenToPhotos();
  listenToResults();
  listenToDialog();
  showControls();
  showHeading();
  await load();
  await loadSurroundings();
}

await start();
