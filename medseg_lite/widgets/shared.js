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

/** Wheel and keys of a slice picture: `move(axis, voxels)` along the axes of `planeNow()`, in arrays of `shape`. A mouse notch is one
    slice; a touchpad's small steps add up. */
function steer(stage, planeNow, shape, move) {
  let turned = 0;
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    turned += clamp(event.deltaY * (event.deltaMode ? 20 : 1), -50, 50);
    if (Math.abs(turned) >= 50) { move(planeNow().cut, -Math.sign(turned)); turned = 0; }
  }, { passive: false });
  stage.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 10 : 1, { x, y, cut } = planeNow();
    const step = {
      ArrowLeft: [x, far], ArrowRight: [x, -far], ArrowUp: [y, far], ArrowDown: [y, -far],
      PageUp: [cut, far], PageDown: [cut, -far], Home: [cut, -shape[cut]], End: [cut, shape[cut]],
    }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(...step);
  });
}

/** "#rrggbb" and alpha 0..255 as one pixel, in the byte order that ImageData has on every current machine. */
function pixel(colour, alpha = 255) {
  const rgb = parseInt(colour.slice(1), 16);
  return ((alpha << 24) | ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16)) >>> 0;
}

/** Slice of a volume (three axes of `size`, beginning at `from`) as an image turned for display: both axes run against the array's, so
    pixel (u, v) shows index (nx - 1 - u, ny - 1 - v). `colours` maps bytes to pixels. */
function sliceImage(data, size, from, plane, index, colours) {
  const step = [size[1] * size[2], size[2], 1], width = size[plane.x], height = size[plane.y];
  const image = new ImageData(width, height), out = new Uint32Array(image.data.buffer), sx = step[plane.x], sy = step[plane.y];
  let row = from + index * step[plane.cut] + (width - 1) * sx + (height - 1) * sy;
  for (let v = 0, o = 0; v < height; v++, row -= sy)
    for (let u = 0, i = row; u < width; u++, i -= sx) out[o++] = colours[data[i]];
  return image;
}

/** Pixels of a slice of labels where a class meets another, in its colour. */
function outlineImage(data, size, plane, index, colours) {
  const values = new Uint32Array(sliceImage(data, size, 0, plane, index, Uint32Array.from({ length: 256 }, (_, k) => k)).data.buffer);
  const width = size[plane.x], height = size[plane.y], image = new ImageData(width, height), out = new Uint32Array(image.data.buffer);
  for (let v = 0, i = 0; v < height; v++)
    for (let u = 0; u < width; u++, i++) {
      const k = values[i];
      const edge = u === 0 || u === width - 1 || k !== values[i - 1] || k !== values[i + 1] || k !== values[i - width] || k !== values[i + width];
      if (k && edge) out[i] = colours[k];
    }
  return image;
}

/** Draw an image stretched into a rectangle of a canvas. */
const scratch = make("canvas"), scratchContext = scratch.getContext("2d");
function stamp(context, image, x, y, width, height) {
  Object.assign(scratch, { width: image.width, height: image.height });
  scratchContext.putImageData(image, 0, 0);
  context.drawImage(scratch, x, y, width, height);
}

/** Make a canvas as sharp as the screen and clear it; returns its context, in CSS pixels. */
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio))
    Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  context.clearRect(0, 0, width, height);
  return context;
}

/** Stored byte -> grey pixel of a volume whose bytes span `low` to `high`, seen through a window. */
function greyTable({ low, high, window: [black, white] }) {
  return Uint32Array.from({ length: 256 }, (_, q) => {
    const g = Math.round(clamp(((low + (q * (high - low)) / 255 - black) * 255) / (white - black), 0, 255));
    return (0xff000000 | (g << 16) | (g << 8) | g) >>> 0;
  });
}
