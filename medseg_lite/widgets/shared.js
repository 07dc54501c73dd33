// Functions for the scripts of all widgets. They stand in front of each script.

/** Return a binary trait or buffer as bytes: JupyterLab hands over a DataView, Colab an ArrayBuffer or a Uint8Array. */
const bytes = (b) => (b instanceof ArrayBuffer ? new Uint8Array(b) : new Uint8Array(b.buffer, b.byteOffset, b.byteLength));

/** Unpack a gzip file into bytes; arrays of other numbers are views of the same buffer. */
async function unpack(packed) {
  const stream = new Blob([bytes(packed)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Build an element. Text is always set as text, so names cannot become markup. */
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

/** Put a widget into its place and let it follow the model; returns a function that takes it away.
    `listeners`: what follows a change of each trait; a name with a colon is an event of its own. `press`: what follows a key.
    `resized`: what follows a change of the widget's width. */
function mount(model, el, root, listeners, { press = () => {}, resized = () => {} } = {}) {
  const events = Object.entries(listeners).map(([name, listener]) => [name.includes(":") ? name : `change:${name}`, listener]);
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    event.stopPropagation(); // the notebook has shortcuts of its own for single keys
    press(event);
  });
  for (const [event, listener] of events) model.on(event, listener);
  el.append(root);
  let width = 0;
  const observer = new ResizeObserver(() => { if (root.clientWidth !== width) { width = root.clientWidth; resized(); } });
  observer.observe(root);
  return () => {
    observer.disconnect();
    for (const [event, listener] of events) model.off(event, listener);
  };
}

/** Return a function that sets a trait, here and in the kernel. */
const setter = (model) => (key, value) => { model.set(key, value); model.save_changes(); };

/** Return functions for the position in a volume of `shape` that begins at voxel `start` of the case: `planeNow`, `within` (clamped),
    `moveTo` and `move(axis, voxels)` (both return whether it moved), `pointAt(stage, event)` (the position under the pointer), and `at(position)` (its place in the bytes). */
function navigate(model, { start = [0, 0, 0], shape, planes }) {
  const set = setter(model), strides = [shape[1] * shape[2], shape[2], 1];
  const planeNow = () => planes.find((p) => p.name.toLowerCase() === model.get("plane"));
  const within = (position) => position.map((p, axis) => clamp(p, start[axis], start[axis] + shape[axis] - 1));
  const moveTo = (position) => {
    const next = within(position), moves = next.some((p, axis) => p !== model.get("position")[axis]);
    if (moves) set("position", next);
    return moves;
  };
  const move = (axis, by) => moveTo(model.get("position").map((p, a) => (a === axis ? p + by : p)));
  const pointAt = (stage, event, { x, y } = planeNow()) => {
    const r = stage.getBoundingClientRect(), next = [...model.get("position")];
    next[x] = start[x] + shape[x] - 1 - Math.floor(((event.clientX - r.left) / r.width) * shape[x]);
    next[y] = start[y] + shape[y] - 1 - Math.floor(((event.clientY - r.top) / r.height) * shape[y]);
    return within(next);
  };
  const at = (position) => position.reduce((sum, p, axis) => sum + (p - start[axis]) * strides[axis], 0);
  return { strides, planeNow, within, moveTo, move, pointAt, at };
}

/** Let `act(event)` follow the first button: a press, and every move until it is let go. A finger acts when it is lifted, or moves
    sideways; one that scrolls the page does not. `right`, if given, follows the right button in the same way, and no menu opens. */
function drag(element, act, right) {
  const buttons = right ? { 0: act, 2: right } : { 0: act };
  let from = null, sideways = false; // where a press began; whether a finger has moved across
  element.addEventListener("pointerdown", (event) => {
    if (!buttons[event.button]) return;
    element.setPointerCapture(event.pointerId);
    from = [event.clientX, event.clientY];
    sideways = event.pointerType !== "touch";
    if (sideways) buttons[event.button](event);
  });
  element.addEventListener("pointermove", (event) => {
    if (!from) return;
    const across = Math.abs(event.clientX - from[0]), down = Math.abs(event.clientY - from[1]);
    sideways ||= across > 8 && across > down;
    if (sideways && event.buttons & 1) act(event);
    if (sideways && event.buttons & 2) right?.(event);
  });
  element.addEventListener("pointerup", (event) => { if (from && event.button === 0) act(event); from = null; });
  element.addEventListener("pointercancel", () => { from = null; });
  // JupyterLab opens its own menu, whatever is prevented, unless the event ends here.
  if (right) element.addEventListener("contextmenu", (event) => { event.preventDefault(); event.stopPropagation(); });
}

/** Let wheel and keys of a slice picture `move(axis, voxels)` along the axes of `planeNow()`, in arrays of `shape`. `move` returns
    false where there is no further slice. The wheel counts only while the picture has focus, so that a page scrolls past it, and
    past its ends; with Ctrl it is the browser's. A mouse notch is one slice; a touchpad's small steps add up. */
function steer(stage, planeNow, shape, move) {
  let turned = 0;
  stage.addEventListener("wheel", (event) => {
    const { deltaX, deltaY, deltaMode, cancelable } = event;
    if (event.ctrlKey || event.metaKey || !cancelable || !stage.matches(":focus") || Math.abs(deltaX) > Math.abs(deltaY)) return;
    if (turned * deltaY < 0) turned = 0;
    turned = clamp(turned + deltaY * (deltaMode ? 20 : 1), -50, 50);
    if (Math.abs(turned) === 50) {
      if (move(planeNow().cut, -Math.sign(turned)) === false) return;
      turned = 0;
    }
    event.preventDefault();
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

/** Return "#rrggbb" and alpha 0..255 as one pixel, in the byte order that ImageData has on every current machine. */
function pixel(colour, alpha = 255) {
  const rgb = parseInt(colour.slice(1), 16);
  return ((alpha << 24) | ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16)) >>> 0;
}

/** Return a slice of a volume (three axes of `size`, beginning at `from`) as an image turned for display: both axes run against the
    array's, so pixel (u, v) shows index (nx - 1 - u, ny - 1 - v). `colours` maps bytes to pixels. */
function sliceImage(data, size, from, plane, index, colours) {
  const step = [size[1] * size[2], size[2], 1], width = size[plane.x], height = size[plane.y];
  const image = new ImageData(width, height), out = new Uint32Array(image.data.buffer), sx = step[plane.x], sy = step[plane.y];
  let row = from + index * step[plane.cut] + (width - 1) * sx + (height - 1) * sy;
  for (let v = 0, o = 0; v < height; v++, row -= sy)
    for (let u = 0, i = row; u < width; u++, i -= sx) out[o++] = colours[data[i]];
  return image;
}

const NUMBERS = Uint32Array.from({ length: 256 }, (_, k) => k);

/** Return the borders in a slice of labels as a path along the edges of voxels, in voxels from the upper left corner. They lie where
    `differ(a, b)` is true of two neighbours; outside the picture all is 0. No edge is drawn twice, so dashes stay dashes. */
function borders(data, size, plane, index, differ) {
  const values = new Uint32Array(sliceImage(data, size, 0, plane, index, NUMBERS).data.buffer);
  const width = size[plane.x], height = size[plane.y], w = width + 1, path = new Path2D();
  const open = new Uint8Array(w * (height + 1)), steps = [1, w, -1, -w]; // bits of each corner: edges right, down, left, up
  const at = (u, v) => (u < 0 || v < 0 || u >= width || v >= height ? 0 : values[v * width + u]);
  const join = (corner, way) => { open[corner] |= 1 << way; open[corner + steps[way]] |= 1 << (way ^ 2); };
  for (let v = 0; v <= height; v++)
    for (let u = 0; u <= width; u++) {
      const here = at(u, v);
      if (differ(here, at(u, v - 1))) join(v * w + u, 0);
      if (differ(here, at(u - 1, v))) join(v * w + u, 1);
    }
  const walk = (corner) => { // straight on where it can be
    path.moveTo(corner % w, Math.floor(corner / w));
    for (let way = 0; open[corner];) {
      if (!((open[corner] >> way) & 1)) way = 31 - Math.clz32(open[corner]);
      open[corner] ^= 1 << way;
      corner += steps[way];
      open[corner] ^= 1 << (way ^ 2);
      path.lineTo(corner % w, Math.floor(corner / w));
    }
  };
  const odd = (bits) => (bits ^ (bits >> 1) ^ (bits >> 2) ^ (bits >> 3)) & 1;
  for (let corner = 0; corner < open.length; corner++) while (odd(open[corner])) walk(corner); // where three edges meet
  for (let corner = 0; corner < open.length; corner++) while (open[corner]) walk(corner); // closed lines
  return path;
}

const DASHES = { line: [], dashes: [7.2, 4.5], dots: [2.2, 2.9] };

/** Draw `borders` onto the canvas of a slice, `scale` = [x, y] pixels a voxel, as wide at every size; with a dark casing by default. */
function drawBorders(context, path, scale, colour, { style = "line", width = 1.8, casing = true } = {}) {
  const scaled = new Path2D(), opacity = context.globalAlpha;
  scaled.addPath(path, new DOMMatrix([scale[0], 0, 0, scale[1], 0, 0]));
  const passes = [[colour, width, DASHES[style], 1]];
  if (casing) passes.unshift(["#111111", 2.2 * width, [], 0.7]);
  for (const [strokeStyle, lineWidth, dash, share] of passes) {
    Object.assign(context, { strokeStyle, lineWidth, globalAlpha: opacity * share });
    context.setLineDash(dash);
    context.stroke(scaled);
  }
  context.setLineDash([]);
  context.globalAlpha = opacity;
}

/** Outline labels in one colour: a line round all classes, and a thin one between them. `slice`: the first arguments of `borders`. */
function drawOutline(context, slice, scale, colour, style) {
  drawBorders(context, borders(...slice, (a, b) => !a !== !b), scale, colour, { style });
  drawBorders(context, borders(...slice, (a, b) => a && b && a !== b), scale, colour, { style, width: 1.1, casing: false });
}

const scratch = make("canvas"), scratchContext = scratch.getContext("2d");

/** Draw an image stretched into a rectangle of a canvas. */
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

/** Return the grey pixel of each stored byte, of a volume whose bytes span `low` to `high`, seen through a window. */
function greyTable({ low, high, window: [black, white] }) {
  return Uint32Array.from({ length: 256 }, (_, q) => {
    const g = Math.round(clamp(((low + (q * (high - low)) / 255 - black) * 255) / (white - black), 0, 255));
    return (0xff000000 | (g << 16) | (g << 8) | g) >>> 0;
  });
}

/** Draw lines through a position on the canvas of a slice, `width` × `height` pixels for the `shape` that begins at `start`. */
function drawCrosshair(context, { x, y }, position, { start, shape }, width, height, colour) {
  const middle = (axis) => (shape[axis] - (position[axis] - start[axis]) - 0.5) / shape[axis];
  context.fillStyle = colour;
  context.fillRect(0, middle(y) * height - 0.5, width, 1);
  context.fillRect(middle(x) * width - 0.5, 0, 1, height);
}

/** Write the letters of a plane's edges (left, right, top, bottom) on the canvas of a slice. */
function drawLetters(context, { edges }, width, height) {
  const places = [[5, height / 2, "left", "middle"], [width - 5, height / 2, "right", "middle"], [width / 2, 4, "center", "top"], [width / 2, height - 4, "center", "bottom"]];
  context.font = "12px system-ui, sans-serif";
  [...edges].forEach((letter, i) => {
    const [u, v, textAlign, textBaseline] = places[i];
    Object.assign(context, { textAlign, textBaseline, lineWidth: 3, strokeStyle: "#000", fillStyle: "#fff" });
    context.strokeText(letter, u, v);
    context.fillText(letter, u, v);
  });
}

/** Show facts, pairs of a name and a text, in the read-out. */
const tell = (readout, facts) => readout.replaceChildren(...facts.map(([key, text]) => make("span", {}, make("em", {}, key), text)));
const makeReadout = (label) => make("output", { class: "readout", "aria-live": "polite", "aria-label": label });

const makeRange = (label, oninput, attributes = {}) => make("input", { type: "range", "aria-label": label, oninput, ...attributes });

const makeOpacity = (model, label) =>
  makeRange(label, (event) => setter(model)("opacity", +event.target.value), { min: 0, max: 1, step: 0.05 });

/** Return a slider for the slice of the present plane with its number, and `show`, which sets both. */
function makeSlice(model, { start, shape }, { planeNow, move }) {
  const now = () => model.get("position")[planeNow().cut], number = make("span", { class: "number" });
  const slider = makeRange("Slice", () => move(planeNow().cut, +slider.value - now()));
  const show = () => {
    const { cut } = planeNow(), last = start[cut] + shape[cut] - 1;
    Object.assign(slider, { min: start[cut], max: last, disabled: shape[cut] === 1 });
    slider.value = now();
    number.textContent = `${now()} / ${last}`;
  };
  return { box: make("label", {}, slider, number), show };
}

/** Return a labelled choice of the trait `key` among `options`, and `show`, which sets it. `name` tells screen readers what it is. */
function makeChoice(model, title, key, options, name = title) {
  const select = make("select", { "aria-label": name, onchange: () => setter(model)(key, select.value) }, ...options.map((o) => make("option", { value: o }, o)));
  const box = make("label", {}, ...(title ? [make("span", {}, title)] : []), select);
  return { key, select, box, show: () => { select.value = model.get(key); } };
}

const makeHelp = (text) => make("details", {}, make("summary", {}, "Keys and mouse"), make("p", {}, text));
