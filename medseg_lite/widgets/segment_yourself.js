// Segment it yourself: paint an object on a slice, then see what was found, missed and made up, beside a network and other readers.

const OUTCOMES = ["found", "missed", "made up"], MOST = 16, PERIOD = 8;
const SCORES = ["Dice", "precision", "sensitivity"];

/** Draw the sign of an outcome on a square of `PERIOD` pixels: found is plain, missed has strokes, made up has dots. */
function drawSign(context, name) {
  Object.assign(context, { strokeStyle: "#ffffff", fillStyle: "#ffffff", lineWidth: 1.7 });
  context.beginPath();
  if (name === "missed") for (const x of [-PERIOD, 0, PERIOD]) { context.moveTo(x - 1, PERIOD + 1); context.lineTo(x + PERIOD + 1, -1); }
  context.stroke();
  if (name === "made up") for (const p of [2, 6]) { context.beginPath(); context.arc(p, p, 1.5, 0, 7); context.fill(); }
}

function render({ model, el }) {
  const scene = model.get("_scene"), { shape, spacing, plane, sequences, names, colours } = scene, set = setter(model);
  const [, high] = shape, wide = shape[plane.x], tall = shape[plane.y], everybody = ["you", ...names], pixelSize = Math.min(...spacing);
  let images = null, truth = null, others = null, painted = new Uint8Array(shape[0] * high), shown = "you";
  let brush = 4, erasing = false, hovers = false, cursor = [shape[0] >> 1, high >> 1], last = null, before = null;
  const undone = [];
  const radius = () => (brush * pixelSize) / 2; // in mm
  const parse = () => Uint8Array.from(model.get("painted"), Number);
  const drawn = (name) => (name === "you" ? painted : others[names.indexOf(name)]);

  // --------------------------------------------------------------------------------------------------------- painting
  /** Paint or erase a disc; its middle is in pixels from the array's corner, and the pixel there is always part of it. */
  function dab([d, h], value) {
    for (let i = 0; i < shape[0]; i++)
      for (let j = 0; j < high; j++)
        if (((i + 0.5 - d) * spacing[0]) ** 2 + ((j + 0.5 - h) * spacing[1]) ** 2 <= radius() ** 2) painted[i * high + j] = value;
    painted[clamp(Math.floor(d), 0, shape[0] - 1) * high + clamp(Math.floor(h), 0, high - 1)] = value;
  }
  function keep(old) { // a step that can be undone, and the new state, here and in the kernel
    if (old.every((v, k) => v === painted[k])) return;
    undone.push(old);
    set("painted", painted.join(""));
  }
  function change(next) { const old = painted; painted = next; keep(old); draw(); }
  const undo = () => { if (!undone.length) return; painted = undone.pop(); set("painted", painted.join("")); draw(); };
  function pointAt(event) { // in pixels from the array's corner
    const r = stage.getBoundingClientRect();
    return [shape[0] - ((event.clientX - r.left) / r.width) * shape[0], high - ((event.clientY - r.top) / r.height) * high];
  }
  const aim = (point) => { cursor = point.map((p, axis) => clamp(Math.floor(p), 0, shape[axis] - 1)); };
  function stroke(event, value) {
    const to = pointAt(event);
    if (!last) { before = painted; painted = painted.slice(); shown = "you"; }
    const from = last ?? to, steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let k = 1; k <= steps; k++) dab(from.map((a, axis) => a + ((to[axis] - a) * k) / steps), value);
    last = to;
    aim(to);
    draw();
  }
  function finish() {
    if (!last) return;
    last = null;
    keep(before);
    draw();
  }
  function dabHere() {
    const old = painted;
    painted = painted.slice();
    shown = "you";
    dab(cursor.map((c) => c + 0.5), erasing ? 0 : 1);
    keep(old);
    draw();
  }

  // ---------------------------------------------------------------------------------------------------------- numbers
  function score(name) { // the rules of empty objects are those of medseg_lite.metrics; the truth is not empty
    const counts = [0, 0, 0, 0], array = drawn(name);
    truth.forEach((t, k) => { counts[t ? 2 - array[k] : 3 * array[k]]++; });
    const [, found, missed, wrong] = counts, ratio = (a, b) => (b ? a / b : 0);
    return { found, missed, wrong, values: [ratio(2 * found, 2 * found + missed + wrong), ratio(found, found + wrong), ratio(found, found + missed)] };
  }

  // --------------------------------------------------------------------------------------------------------- pictures
  const canvas = make("canvas");
  const stage = make("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": "slice",
    style: `aspect-ratio: ${wide * spacing[plane.x]} / ${tall * spacing[plane.y]}` }, canvas);
  const squares = (inside) => { // the pixels where `inside(k)` holds, as a path in pixels of the slice
    const path = new Path2D();
    for (let d = 0; d < shape[0]; d++) for (let h = 0; h < high; h++) if (inside(d * high + h)) path.rect(wide - 1 - d, tall - 1 - h, 1, 1);
    return path;
  };
  function fill(context, path, scale, colour, alpha, sign) {
    const scaled = new Path2D(), tile = make("canvas", { width: 2 * PERIOD, height: 2 * PERIOD }), pen = tile.getContext("2d");
    scaled.addPath(path, new DOMMatrix([scale[0], 0, 0, scale[1], 0, 0]));
    Object.assign(context, { fillStyle: colour, globalAlpha: alpha });
    context.fill(scaled);
    pen.scale(2, 2);
    drawSign(pen, sign);
    const pattern = context.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix([0.5, 0, 0, 0.5, 0, 0]));
    Object.assign(context, { fillStyle: pattern, globalAlpha: 0.9 });
    context.fill(scaled);
    context.globalAlpha = 1;
  }
  function drawSlice() {
    const width = stage.clientWidth || 400, height = (width * tall * spacing[plane.y]) / (wide * spacing[plane.x]), scale = [width / wide, height / tall];
    const context = fit(canvas, width, height), number = sequences.findIndex((s) => s.name === model.get("channel"));
    context.imageSmoothingEnabled = true;
    stamp(context, sliceImage(images[number], shape, 0, plane, 0, greyTable(sequences[number])), 0, 0, width, height);
    const array = drawn(shown), outline = (data) => borders(data, shape, plane, 0, (a, b) => a !== b);
    if (model.get("revealed")) {
      const outcome = (k) => (truth[k] ? 2 - array[k] : 3 * array[k]);
      OUTCOMES.forEach((name, n) => fill(context, squares((k) => outcome(k) === n + 1), scale, colours[name], 0.55, name));
      drawBorders(context, outline(truth), scale, colours.truth);
      drawBorders(context, outline(array), scale, colours.prediction, { style: "dashes", width: 1.4 });
    } else {
      fill(context, squares((k) => array[k]), scale, colours.prediction, 0.45);
      drawBorders(context, outline(array), scale, colours.prediction, { width: 1.4 });
    }
    drawLetters(context, plane, width, height);
    if (!hovers && !stage.matches(":focus")) return;
    const u = (wide - cursor[0] - 0.5) * scale[0], v = (tall - cursor[1] - 0.5) * scale[1];
    context.beginPath();
    context.ellipse(u, v, Math.max((radius() / spacing[0]) * scale[0], scale[0] / 2), Math.max((radius() / spacing[1]) * scale[1], scale[1] / 2), 0, 0, 7);
    for (const [strokeStyle, lineWidth] of [["#111111", 3.4], [erasing ? "#ffffff" : "#F0E442", 1.6]]) { Object.assign(context, { strokeStyle, lineWidth }); context.stroke(); }
  }

  function draw() {
    if (!images) return;
    const revealed = model.get("revealed"), mine = score("you"), area = painted.reduce((a, b) => a + b, 0);
    if (!revealed) shown = "you";
    drawSlice();
    stage.setAttribute("aria-label", `${scene.title}, ${model.get("channel")}${revealed ? `, with what ${shown} found, missed and made up` : ""}. Arrow keys move the brush, the space bar ${erasing ? "erases" : "paints"}.`);
    for (const { name, button } of channels) button.setAttribute("aria-pressed", model.get("channel") === name);
    for (const [button, on] of [[paint, !erasing], [erase, erasing], [reveal, revealed]]) button.setAttribute("aria-pressed", on);
    reveal.textContent = revealed ? "Hide the answer" : "Reveal";
    back.disabled = !undone.length;
    slider.value = brush;
    size.textContent = `${short(radius())} mm`;
    slider.setAttribute("aria-valuetext", `radius ${short(radius())} mm`);
    tell(readout, [["painted", `${area} pixels, ${short((area * spacing[0] * spacing[1]) / 100)} cm²`],
      ...(revealed ? [["found", mine.found], ["missed", mine.missed], ["made up", mine.wrong]] : [["", area ? "Press Reveal when you are done." : "Paint what does not belong into this brain."]])]);
    key.hidden = results.hidden = !revealed;
    if (!revealed) return;
    everybody.forEach((name, n) => {
      score(name).values.forEach((value, k) => { cells[n][k].textContent = value.toFixed(3); });
      choices[n].setAttribute("aria-pressed", name === shown);
      bars[n].style.width = `${100 * score(name).values[0]}%`;
    });
  }

  // --------------------------------------------------------------------------------------------------------- controls
  const press = (text, onclick, attributes = {}) => make("button", { type: "button", onclick, ...attributes }, text);
  const channels = sequences.map(({ name }) => ({ name, button: press(name, () => set("channel", name)) }));
  const paint = press("Paint", () => { erasing = false; draw(); }), erase = press("Erase", () => { erasing = true; draw(); });
  const slider = makeRange("Radius of the brush", () => { brush = +slider.value; draw(); }, { min: 1, max: MOST }), size = make("span", { class: "number" });
  const back = press("Undo", undo), clear = press("Clear", () => change(new Uint8Array(painted.length)));
  const reveal = press("Reveal", () => set("revealed", !model.get("revealed")), { class: "reveal" });
  const hold = make("input", { type: "checkbox", onchange: () => { stage.style.touchAction = hold.checked ? "none" : ""; } });
  const readout = makeReadout("Painted area");
  const choices = everybody.map((name) => press(name, () => { shown = name; draw(); }, { "aria-label": `Show ${name}` }));
  const cells = everybody.map(() => SCORES.map(() => make("td"))), bars = everybody.map(() => make("i"));
  const rows = everybody.map((name, n) => make("tr", {}, make("th", { scope: "row" }, choices[n], make("span", { class: "bar" }, bars[n])), ...cells[n]));
  const head = make("tr", {}, make("td"), ...SCORES.map((name) => make("th", { scope: "col" }, name)));
  const results = make("table", { "aria-label": "Scores in this slice" }, make("thead", {}, head), make("tbody", {}, ...rows));
  const swatch = (name) => {
    const tile = make("canvas", { width: 4 * PERIOD, height: 4 * PERIOD }), pen = tile.getContext("2d");
    pen.scale(2, 2);
    Object.assign(pen, { fillStyle: colours[name] });
    pen.fillRect(0, 0, 2 * PERIOD, 2 * PERIOD);
    for (const [u, v] of [[0, 0], [PERIOD, 0], [0, PERIOD], [PERIOD, PERIOD]]) { pen.setTransform(2, 0, 0, 2, 2 * u, 2 * v); drawSign(pen, name); }
    return make("li", {}, make("i", { class: "swatch" }, tile), name);
  };
  const key = make("ul", { class: "key", "aria-label": "Patterns and lines" }, ...OUTCOMES.map(swatch), make("li", {}, "─ truth"), make("li", {}, "┄ outline that is shown"));
  const root = make("div", { class: "medseg-yourself", role: "group", "aria-label": `Segment it yourself, ${scene.title}` },
    make("div", { class: "toolbar" }, make("span", { class: "group", role: "group", "aria-label": "Sequence" }, ...channels.map((c) => c.button)),
      make("span", { class: "group", role: "group", "aria-label": "Tool" }, paint, erase), make("label", {}, make("span", {}, "Radius"), slider, size), back, clear,
      make("label", { class: "hold" }, hold, "Hold the page still")),
    make("div", { class: "panels" }, stage, make("div", { class: "side" }, reveal, readout, key, results)),
    makeHelp("Drag to paint; the right button erases. Arrow keys on the picture move the brush, with Shift five pixels, and the space bar paints. [ and ] change the radius, E changes to the eraser and back, "
      + "Z undoes, R shows or hides the answer, 1 to 9 choose the sequence. A finger paints when it starts sideways; hold the page still to paint in all directions."));

  drag(stage, (event) => stroke(event, erasing ? 0 : 1), (event) => stroke(event, 0));
  for (const event of ["pointerup", "pointercancel"]) stage.addEventListener(event, finish);
  for (const event of ["focus", "blur"]) stage.addEventListener(event, draw);
  stage.addEventListener("pointermove", (event) => {
    const finger = event.pointerType === "touch";
    if (finger && hold.checked && event.buttons & 1) stroke(event, erasing ? 0 : 1); // in all directions
    if (last || finger || !images) return;
    hovers = true;
    aim(pointAt(event));
    drawSlice();
  });
  stage.addEventListener("pointerleave", () => { hovers = false; draw(); });
  stage.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 5 : 1, step = { ArrowLeft: [far, 0], ArrowRight: [-far, 0], ArrowUp: [0, far], ArrowDown: [0, -far] }[event.key];
    if ((!step && event.key !== " ") || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (!step) return dabHere();
    aim(cursor.map((c, axis) => c + step[axis]));
    draw();
  });
  const leave = mount(model, el, root, { channel: draw, revealed: draw, painted: () => { if (painted.join("") !== model.get("painted")) change(parse()); } }, {
    press({ key: k }) {
      if (k === "[" || k === "]") brush = clamp(brush + (k === "[" ? -1 : 1), 1, MOST);
      else if (k.toLowerCase() === "e") erasing = !erasing;
      else if (k.toLowerCase() === "z") undo();
      else if (k.toLowerCase() === "r") set("revealed", !model.get("revealed"));
      else if (sequences[k - 1]) set("channel", sequences[k - 1].name);
      else return;
      draw();
    },
    resized: draw,
  });
  Promise.all([model.get("_images"), model.get("_drawn")].map((all) => Promise.all(all.map(unpack)))).then(([slices, [label, ...rest]]) => {
    [images, truth, others, painted] = [slices, label, rest, parse()];
    draw();
    root.dataset.ready = "true";
  });
  return leave;
}
