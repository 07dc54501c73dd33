// What the widgets' scripts share; it is put in front of each.

/** A binary trait or buffer as bytes: JupyterLab hands over a DataView, Colab an ArrayBuffer or a Uint8Array. */
const bytes = (b) => (b instanceof ArrayBuffer ? new Uint8Array(b) : new Uint8Array(b.buffer, b.byteOffset, b.byteLength));

/** The bytes of a gzip file; other numbers are views of the same buffer. */
async function unpack(packed) {
  const stream = new Blob([bytes(packed)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Build an element. Text is only ever set as text, so names cannot become markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const short = (x) => String(Number(x.toPrecision(3))).replace("-", "−");

/** "#rrggbb" and alpha 0..255 as one pixel, in the byte order that ImageData has on every current machine. */
function pixel(colour, alpha = 255) {
  const rgb = parseInt(colour.slice(1), 16);
  return ((alpha << 24) | ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16)) >>> 0;
}
