/** HTTP to the server: problem details, one patient retry, and the API key where one is needed. */

const KEY_STORAGE = "catalens-api-key";
const LONGEST_WAIT_S = 30;

/** An error answer of the server (RFC 9457), or a request that got no answer at all (status 0). */
export class Problem extends Error {
  /**
   * @param {number} status
   * @param {string} title
   * @param {string} detail
   * @param {{field: string, message: string}[]} [errors]
   * @param {string} [requestId]
   */
  constructor(status, title, detail, errors = [], requestId = "") {
    super(title);
    this.status = status;
    this.title = title;
    this.detail = detail;
    this.errors = errors;
    this.requestId = requestId;
  }
}

/**
 * @typedef {object} Hooks
 * @property {(rejected: boolean) => Promise<string | null>} askForKey null when the visitor declines
 * @property {(seconds: number) => void} onWait the server asked to be left alone for so long
 */

export class Api {
  /** @type {Promise<string | null> | null} */
  #asking = null;

  /** @param {Hooks} hooks */
  constructor(hooks) {
    this.hooks = hooks;
  }

  /** @returns {string | null} */
  get key() {
    return sessionStorage.getItem(KEY_STORAGE);
  }

  /**
   * Ask the server and return its JSON.
   * @param {string} path
   * @param {{body?: unknown, signal?: AbortSignal, patient?: boolean}} [options] with a body the call is a POST;
   * `patient`: wait and ask once more where a busy server invites it
   * @returns {Promise<any>}
   * @throws {Problem}
   */
  async json(path, { body, signal, patient = true } = {}) {
    const init = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const response = await this.#send(path, { ...init, signal }, "application/json", patient);
    return await response.json().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Problem(response.status, "The answer could not be read", "The server sent something other than JSON.");
    });
  }

  /**
   * Fetch a picture with the key: an <img> cannot send one.
   * @param {string} path
   * @returns {Promise<Blob>}
   */
  async blob(path) {
    return await (await this.#send(path, {}, "image/*")).blob();
  }

  /**
   * @param {string} path
   * @param {RequestInit} init
   * @param {string} accept
   * @param {boolean} [patient]
   * @returns {Promise<Response>}
   */
  async #send(path, init, accept, patient = true) {
    let waited = !patient;
    for (;;) {
      const key = this.key;
      const response = await attempt(path, { ...init, headers: headers(init, accept, key) });
      if (response.ok) return response;
      if (response.status === 401 && (await this.#newKey(key))) continue;
      const wait = retryAfter(response);
      if (waited || wait === null) throw await problemOf(response);
      waited = true;
      this.hooks.onWait(wait);
      await pause(wait, init.signal ?? undefined);
    }
  }

  /**
   * Ask the visitor once, however many requests were refused at the same time.
   * @param {string | null} refused the key that was refused, if one was sent
   * @returns {Promise<boolean>} whether there is another key to try
   */
  async #newKey(refused) {
    if (this.key !== refused) return true;
    this.#asking ??= this.hooks.askForKey(refused !== null).finally(() => {
      this.#asking = null;
    });
    const key = await this.#asking;
    if (key) sessionStorage.setItem(KEY_STORAGE, key);
    return Boolean(key);
  }
}

/** @param {RequestInit} init @param {string} accept @param {string | null} key */
function headers(init, accept, key) {
  /** @type {Record<string, string>} */
  const result = { Accept: accept };
  if (init.body) result["Content-Type"] = "application/json";
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

/** @param {string} path @param {RequestInit} init @returns {Promise<Response>} */
async function attempt(path, init) {
  try {
    return await fetch(path, init);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Problem(0, "The server can’t be reached", "Check that it is running and that you are online.");
  }
}

/**
 * @param {Response} response
 * @returns {number | null} seconds to wait, null when a retry was not invited or is too far away
 */
function retryAfter(response) {
  if (response.status !== 429 && response.status !== 503) return null;
  const header = response.headers.get("Retry-After");
  if (header === null) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return seconds <= LONGEST_WAIT_S ? Math.max(0, seconds) : null;
}

/** @param {number} seconds @param {AbortSignal} [signal] @returns {Promise<void>} */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

/** @param {Response} response @returns {Promise<Problem>} */
async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const errors = Array.isArray(body?.errors) ? body.errors : [];
  return new Problem(
    response.status,
    String(body?.title ?? response.statusText ?? "") || `The server answered ${response.status}`,
    String(body?.detail ?? ""),
    errors,
    String(body?.request_id ?? ""),
  );
}
