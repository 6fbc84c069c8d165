/** Completions below the search box: a list that the arrow keys walk through while the caret stays in the box. */

import { leaf } from "./render.js";

/** @typedef {import("./api.js").Api} Api */
/** @typedef {{text: string, kind: string, count?: number, product_id?: string}} Suggestion */

const PAUSE_MS = 120;
const MOST = 8;
/** The server's own limit; nobody completes a text of that length. */
const LONGEST = 200;
/** @type {Record<string, string>} */
const KINDS = { brand: "Brand", category: "Category", product: "Product" };

export class Suggestions {
  /** @type {Suggestion[]} */
  #found = [];
  #active = -1;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #pending;
  #running = new AbortController();

  /**
   * @param {HTMLInputElement} input
   * @param {HTMLElement} list
   * @param {{api: Api, onChoose: (suggestion: Suggestion) => void}} options
   */
  constructor(input, list, { api, onChoose }) {
    this.input = input;
    this.list = list;
    this.api = api;
    this.onChoose = onChoose;
    input.addEventListener("blur", () => this.close());
    input.addEventListener("keydown", (event) => this.#onKey(event));
    // The box keeps the focus, or the list would be gone before the click arrives.
    list.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => {
      const option = event.target instanceof Element ? event.target.closest("[role=option]") : null;
      if (option) this.#choose([...list.children].indexOf(option));
    });
  }

  /** Ask what the text may become, once typing pauses; what was asked before is given up. */
  onType() {
    this.#stop();
    const text = this.input.value.trim();
    if (!text || text.length > LONGEST) {
      this.close();
      return;
    }
    this.#pending = setTimeout(() => void this.#ask(text), PAUSE_MS);
  }

  /** Take the list away, and give up what was being asked. */
  close() {
    this.#stop();
    this.#show([]);
  }

  #stop() {
    clearTimeout(this.#pending);
    this.#running.abort();
  }

  /** @param {string} text */
  async #ask(text) {
    this.#running = new AbortController();
    const { signal } = this.#running;
    const path = `/api/v1/suggest?limit=${MOST}&q=${encodeURIComponent(text)}`;
    try {
      const { suggestions } = await this.api.json(path, { signal, patient: false });
      if (!signal.aborted) this.#show(suggestions, text);
    } catch {
      // Completions are a help: without them the search says what is wrong.
      if (!signal.aborted) this.#show([]);
    }
  }

  /** @param {Suggestion[]} found @param {string} [text] */
  #show(found, text = "") {
    this.#found = found;
    this.list.replaceChildren(...found.map((one, index) => option(one, index, text)));
    this.list.hidden = found.length === 0;
    this.input.setAttribute("aria-expanded", String(found.length > 0));
    this.#activate(-1);
  }

  /** @param {number} index */
  #activate(index) {
    this.#active = index;
    [...this.list.children].forEach((item, at) => item.setAttribute("aria-selected", String(at === index)));
    if (index < 0) {
      this.input.removeAttribute("aria-activedescendant");
      return;
    }
    this.input.setAttribute("aria-activedescendant", this.list.children[index].id);
    this.list.children[index].scrollIntoView({ block: "nearest" });
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const count = this.#found.length;
    if (count === 0 || event.isComposing) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      // One place more than there are options: there only the text itself is chosen.
      const places = count + 1;
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.#activate(((this.#active + 1 + step + places) % places) - 1);
    } else if (event.key === "Enter" && this.#active >= 0) {
      event.preventDefault();
      this.#choose(this.#active);
    } else if (event.key === "Escape") {
      event.preventDefault(); // the browser would empty the box
      this.close();
    }
  }

  /** @param {number} index */
  #choose(index) {
    const chosen = this.#found[index];
    this.close();
    if (chosen) this.onChoose(chosen);
  }
}

/** @param {Suggestion} suggestion @param {number} index @param {string} typed @returns {HTMLElement} */
function option({ text, kind, count }, index, typed) {
  const item = document.createElement("li");
  item.id = `suggestion-${index}`;
  item.role = "option";
  item.className = "suggestion";
  item.dataset.kind = kind;
  const words = document.createElement("span");
  words.className = "suggestion-text";
  const name = kind === "category" ? leaf(text) : text;
  if (name.toLocaleLowerCase().startsWith(typed.toLocaleLowerCase())) {
    const more = document.createElement("b");
    more.textContent = name.slice(typed.length);
    words.append(name.slice(0, typed.length), more);
  } else {
    words.textContent = name;
  }
  item.append(words);
  const told = [KINDS[kind], count?.toLocaleString()].filter(Boolean).join(" · ");
  const note = document.createElement("span");
  note.className = "suggestion-note";
  note.textContent = told;
  item.append(note);
  return item;
}
