/** The visitor's photo: found in a drop or a paste, made small, ready to be sent. */

import { Problem } from "./api.js";

/**
 * A picture to search with: its bytes in base64, or the address of one on the web.
 * @typedef {object} Photo
 * @property {string} [data]
 * @property {string} [url]
 * @property {string} preview something an <img> can show
 */

/** No encoder looks at more than a few hundred pixels a side; this leaves room and keeps uploads short. */
const LONGEST_SIDE = 1024;
const JPEG_QUALITY = 0.9;
/** A picture that is small already goes as it is: compressing it once more would only blur it. */
const SMALL_BYTES = 1024 * 1024;
const SENT_AS_IS = ["image/jpeg", "image/png", "image/webp"];
/** The server takes bodies of 25 MB and base64 makes a third more of them. */
const LARGEST_ORIGINAL = 18 * 1024 * 1024;

/**
 * Make a photo of a file. One that this browser cannot decode goes to the server as it is, which may know
 * the format or will say what is wrong with it.
 * @param {Blob} file
 * @returns {Promise<Photo>}
 * @throws {Problem}
 */
export async function photoFromFile(file) {
  const small = await shrink(file).catch(() => null);
  if (!small && file.size > LARGEST_ORIGINAL) {
    throw new Problem(413, "This file is too large", "It is not a picture this browser can make smaller. Try a JPEG or a PNG.");
  }
  const picture = small ?? file;
  return { data: await toBase64(picture), preview: URL.createObjectURL(picture) };
}

/**
 * Make a photo of a picture that was dragged from a web page.
 * @param {string} address
 * @returns {Promise<Photo>}
 */
export async function photoFromAddress(address) {
  const url = new URL(address, location.href);
  // The server refuses to fetch from private addresses, its own included: this page's pictures are read here.
  if (url.origin === location.origin || url.protocol === "data:" || url.protocol === "blob:") {
    const response = await fetch(url).catch(() => null);
    if (!response?.ok) throw new Problem(0, "This picture can’t be read", "Save it first, then drop the file.");
    return await photoFromFile(await response.blob());
  }
  return { url: url.href, preview: url.href };
}

/**
 * The picture that a drop or a paste carries, if any.
 * @param {DataTransfer | null} transfer
 * @returns {File | string | null} a file, or the address of a picture
 */
export function pictureIn(transfer) {
  if (!transfer) return null;
  const files = [...transfer.files];
  const file = files.find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (file) return file;
  // Any link has an address; only a dragged picture brings the markup of one.
  if (!/<img\b/i.test(transfer.getData("text/html"))) return null;
  const address = transfer.getData("text/uri-list").split("\n").find((line) => line && !line.startsWith("#"));
  return address && /^(https?|data|blob):/i.test(address) ? address.trim() : null;
}

/**
 * @param {Blob} file
 * @returns {Promise<Blob>} at most LONGEST_SIDE pixels: the file itself, or a JPEG of it, upright, on white
 */
async function shrink(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  try {
    const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1 && file.size <= SMALL_BYTES && SENT_AS_IS.includes(file.type)) return file;
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d");
    if (!context) throw new Error("no canvas");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve, reject) => {
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no JPEG"))), "image/jpeg", JPEG_QUALITY);
    });
  } finally {
    bitmap.close();
  }
}

/** @param {Blob} blob @returns {Promise<string>} */
function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result).replace(/^[^,]*,/, ""));
    reader.onerror = () => reject(new Problem(0, "This file can’t be read", "The browser was not allowed to open it."));
    reader.readAsDataURL(blob);
  });
}
