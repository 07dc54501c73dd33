// Sliding kernel: a picture, a kernel of numbers to edit, their products at one place, and the feature map, computed here with every key pressed.

const rgb = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
/** Round to so many significant digits, but never a digit before the point. */
const rounded = (x, digits) => Number(Math.abs(x) < 1000 ? x.toPrecision(digits) : x.toFixed(2));
const written = (x, digits = 4) => String(rounded(x, digits)).replace("-", "−");
const same = (a, b) => a.length === b.length && a.every((row, i) => row.every((w, j) => w === b[i][j]));

/** Return the sums of products of the kernel and the pixels under it, row by row: (rows - k + 1) × (columns - k + 1). */
function correlate({ rows, columns, values }, kernel) {
  const k = kernel.length, high = rows - k + 1, wide = columns - k + 1, out = new Float64Array(high * wide);
  for (let i = 0; i < k; i++)
    for (let j = 0; j < k; j++) {
      const weight = kernel[i][j];
      if (weight === 0) continue;
      for (let r = 0, o = 0; r < high; r++)
        for (let c = 0, p = (r + i) * columns + j; c < wide; c++) out[o++] += weight * values[p++];
    }
  return out;
}

/** Return Dice of "map above t" and the truth for the threshold t that makes it largest, and that t: halfway to the next lower value. */
function bestThreshold(map, truth, total) {
  const order = Array.from(map.keys()).sort((a, b) => map[b] - map[a]);
  let hits = 0, best = { dice: -1, threshold: 0 };
  order.forEach((p, n) => {
    hits += truth[p];
    const next = map[order[n + 1]] ?? map[p] - 1, dice = (2 * hits) / (n + 1 + total);
    if (next < map[p] && dice > best.dice) best = { dice, threshold: (map[p] + next) / 2 };
  });
  return best;
}

function render({ model, el }) {
  const { presets, own, colours, outlines, quantile, heaviest } = model.get("_scene");
  const [negative, zero, positive] = colours.map(rgb);
  const flat = { cut: 0, x: 2, y: 1 }; // the plane of a picture, for the shared functions
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let picture = null; // rows, columns, values, window, truth
  let map = null, limit = 1; // the feature map, and where its colours end
  let filled = Infinity, playing = null; // how many places of the map are shown, row by row; the timer

  const set = setter(model), half = () => model.get("kernel").length >> 1;
  const presetNow = () => Object.keys(presets).find((name) => same(presets[name][model.get("kernel").length], model.get("kernel")));
  const tint = (value, most) => `color-mix(in srgb, ${value < 0 ? colours[0] : colours[2]} ${Math.round((45 * Math.abs(value)) / most)}%, transparent)`;
  const within = ([row, column]) => [clamp(row, half(), picture.rows - 1 - half()), clamp(column, half(), picture.columns - 1 - half())];
  /** Return the marked pixel, moved to where the kernel fits, and its place in the map. */
  const marked = () => within(model.get("position"));
  const wide = () => picture.columns - 2 * half();
  const place = ([row, column]) => (row - half()) * wide() + column - half();

  // ------------------------------------------------------------------------------------------------------ pictures
  function stage(name, label, key) {
    const canvas = make("canvas"), lines = make("canvas", { class: "lines" }), mark = make("i", { class: "mark" });
    const box = make("div", {
      class: `stage ${key}`, tabindex: 0, role: "application", "aria-roledescription": "picture", "data-view": key,
      "aria-label": `${label}. Arrow keys move the kernel, with Shift ten pixels.`,
    }, canvas, lines, mark);
    drag(box, (event) => {
      const { rows, columns } = picture, r = box.getBoundingClientRect();
      const row = Math.floor(((event.clientY - r.top) / r.height) * rows), column = Math.floor(((event.clientX - r.left) / r.width) * columns);
      pause();
      set("position", within([row, column]));
    });
    box.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const step = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far] }[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      pause();
      const [row, column] = marked();
      set("position", within([row + step[0], column + step[1]]));
    });
    return { canvas, lines, mark, box, context: canvas.getContext("2d"), figure: make("figure", {}, make("figcaption", {}, name), box) };
  }
  const left = stage("image", "The image", "image"), right = stage("feature map", "The feature map", "map");
  const legend = make("div", { class: "legend", role: "group" });
  right.figure.append(legend);

  function frame({ canvas, mark, box }, side) { // side: what the mark encloses, in pixels
    const { rows, columns } = picture, [row, column] = marked(), reach = (side - 1) / 2;
    mark.style.left = `${((column - reach) / columns) * 100}%`;
    mark.style.top = `${((row - reach) / rows) * 100}%`;
    mark.style.width = `${(side / columns) * 100}%`;
    mark.style.height = `${(side / rows) * 100}%`;
    box.style.aspectRatio = `${columns} / ${rows}`;
    canvas.classList.toggle("squares", columns <= 100);
  }

  function drawImage() {
    const { rows, columns, values, window: [black, white] } = picture, data = new ImageData(columns, rows);
    for (let p = 0, o = 0; p < values.length; p++) {
      const grey = ((values[p] - black) * 255) / (white - black);
      data.data[o++] = data.data[o++] = data.data[o++] = grey;
      data.data[o++] = 255;
    }
    Object.assign(left.canvas, { width: columns, height: rows });
    left.context.putImageData(data, 0, 0);
  }

  function computeMap() {
    const bias = model.get("bias"), relu = model.get("relu");
    map = correlate(picture, model.get("kernel"));
    for (let p = 0; p < map.length; p++) map[p] = relu ? Math.max(map[p] + bias, 0) : map[p] + bias;
  }

  function drawMap() {
    const { rows, columns } = picture;
    if (model.get("locked")) limit = model.get("limit");
    else {
      const magnitudes = map.map(Math.abs).sort();
      limit = magnitudes[Math.floor(quantile * (map.length - 1))] || magnitudes[map.length - 1] || 1;
    }
    const data = new ImageData(wide(), map.length / wide());
    for (let p = 0, o = 0; p < Math.min(map.length, filled); p++) {
      const t = Math.min(Math.abs(map[p]) / limit, 1), end = map[p] < 0 ? negative : positive;
      for (let channel = 0; channel < 3; channel++) data.data[o++] = zero[channel] + (end[channel] - zero[channel]) * t;
      data.data[o++] = 255;
    }
    Object.assign(right.canvas, { width: columns, height: rows }); // clears it: places without a value stay transparent
    right.context.putImageData(data, half(), half());
    const bar = make("i", { class: "bar", style: `background: linear-gradient(to right, ${colours.join(", ")})` });
    legend.replaceChildren(make("span", {}, short(-limit)), bar, make("span", {}, `+${short(limit)}`),
      make("small", {}, "blue: below zero, white: zero, vermilion: above; full colour also beyond these ends; hatched: no value"));
    legend.setAttribute("aria-label", `Colours from ${short(-limit)}, blue, over zero, white, to ${short(limit)}, vermilion`);
  }

  /** Outline the truth, and what lies above the threshold; say how well they agree. */
  function drawLines() {
    if (!picture) return;
    const { rows, columns, truth } = picture, size = [1, rows, columns], threshold = model.get("threshold"), count = Math.min(map.length, filled);
    const found = new Uint8Array(rows * columns);
    let hits = 0, called = 0, total = 0;
    for (let p = 0; p < count; p++) if (map[p] > threshold) {
      const at = (Math.floor(p / wide()) + half()) * columns + (p % wide()) + half();
      found[at] = 1;
      called++;
      if (truth) hits += truth[at];
    }
    const outline = (mask, context, scale, colour, look) => drawBorders(context, borders(mask.slice().reverse(), size, flat, 0, (a, b) => a !== b), scale, colour, look);
    for (const { lines, box } of [left, right]) {
      const width = box.clientWidth || 300, height = (width * rows) / columns, context = fit(lines, width, height), scale = [width / columns, height / rows];
      if (!truth) continue;
      outline(truth, context, scale, outlines.truth);
      if (box === right.box) continue;
      outline(found, context, scale, outlines.prediction);
      outline(truth, context, scale, outlines.truth, { style: "dashes", casing: false }); // both are seen where they meet
    }
    const lowest = map.reduce((a, b) => Math.min(a, b), Infinity), highest = map.reduce((a, b) => Math.max(a, b), -Infinity);
    Object.assign(slider, { min: lowest, max: highest, step: (highest - lowest) / 400 || 1 });
    slider.value = threshold;
    level.textContent = written(threshold, 3);
    if (truth) for (const value of truth) total += value;
    const dice = called + total ? (2 * hits) / (called + total) : 1;
    score.replaceChildren("Dice ", make("b", {}, dice.toFixed(3)), filled < map.length ? " so far" : "");
    slider.setAttribute("aria-valuetext", truth ? `${written(threshold, 3)}, Dice ${dice.toFixed(3)}` : written(threshold, 3));
  }

  // ------------------------------------------------------------------------------------------------------- sliding
  /** Show the first `count` places of the map, with the kernel on the last of them. */
  function fill(count) {
    filled = clamp(count, 1, map.length);
    const last = filled - 1;
    model.set("position", [Math.floor(last / wide()) + half(), (last % wide()) + half()]);
    if (filled === map.length) pause();
    drawMap();
    drawLines();
  }
  function pause() {
    if (playing) { clearInterval(playing); model.save_changes(); }
    playing = null;
    result.setAttribute("aria-live", "polite");
    button.textContent = still ? "Next row" : "Play";
    button.setAttribute("aria-label", still ? "Fill the next row of the map" : "Let the kernel slide");
  }
  /** Two places in the first row, a row in all others. */
  const onwards = () => fill(filled < wide() && !still ? Math.min(filled + 2, wide()) : (Math.floor(filled / wide()) + 1) * wide());
  function play() {
    if (!picture) return;
    if (playing) return pause();
    if (filled >= map.length) filled = 0;
    if (still) { onwards(); return model.save_changes(); }
    result.setAttribute("aria-live", "off");
    playing = setInterval(onwards, 40);
    button.textContent = "Pause";
    button.setAttribute("aria-label", "Stop the kernel");
  }
  function step() {
    if (!picture) return;
    pause();
    fill((place(marked()) + 1) % map.length + 1);
    model.save_changes();
  }
  function showAll() {
    pause();
    filled = Infinity;
    drawMap();
    drawLines();
  }
  const button = make("button", { type: "button", class: "play", onclick: play });

  // -------------------------------------------------------------------------------------------------------- kernel
  const grid = make("div", { class: "grid weights", role: "group", "aria-label": "Kernel" });
  const under = make("div", { class: "grid under", "aria-hidden": "true" }), products = make("div", { class: "grid products", "aria-hidden": "true" });
  const result = make("output", { class: "result", "aria-live": "polite" });
  const complaint = make("p", { class: "complaint", role: "alert" });
  let inputs = []; // rows of inputs

  function edit(i, j) {
    const input = inputs[i][j], value = input.valueAsNumber, fine = Math.abs(value) <= heaviest; // NaN is not fine
    input.setAttribute("aria-invalid", String(!fine));
    complaint.textContent = fine ? "" : Number.isNaN(value)
      ? `Row ${i + 1}, column ${j + 1} is not a number yet; the map still uses ${written(model.get("kernel")[i][j])}.`
      : `Row ${i + 1}, column ${j + 1} is too large; the map still uses ${written(model.get("kernel")[i][j])}.`;
    if (fine) set("kernel", model.get("kernel").map((row, a) => row.map((w, b) => (a === i && b === j ? value : w))));
  }

  function buildGrid(k) {
    inputs = Array.from({ length: k }, (_, i) => Array.from({ length: k }, (_, j) => make("input", {
      type: "number", step: 0.25, "aria-label": `Weight in row ${i + 1}, column ${j + 1}`,
      oninput: () => edit(i, j),
      onfocus: (event) => event.target.select(),
      onblur: () => showWeights(),
    })));
    grid.replaceChildren(...inputs.flat());
    for (const box of [under, products]) box.replaceChildren(...inputs.flat().map(() => make("span")));
    for (const box of [grid, under, products]) box.style.setProperty("--k", k);
  }

  function showWeights() {
    const kernel = model.get("kernel"), most = Math.max(...kernel.flat().map(Math.abs)) || 1;
    if (inputs.length !== kernel.length) buildGrid(kernel.length);
    kernel.forEach((row, i) => row.forEach((weight, j) => {
      const input = inputs[i][j];
      if (input !== input.getRootNode().activeElement) { // never overwrite what is being typed
        input.value = rounded(weight, 4);
        input.setAttribute("aria-invalid", "false");
      }
      input.style.background = tint(weight, most);
    }));
    if (!inputs.flat().some((input) => input.getAttribute("aria-invalid") === "true")) complaint.textContent = "";
    const name = presetNow(), sum = kernel.flat().reduce((a, b) => a + b, 0);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.textContent === name));
    for (const button of sizes) button.setAttribute("aria-pressed", String(+button.dataset.size === kernel.length));
    total.textContent = `${name ?? own}; its weights add up to ${written(Math.abs(sum) < 1e-9 ? 0 : sum, 6)}`;
  }

  function resize(k) {
    const kernel = model.get("kernel"), name = presetNow(), shift = (k - kernel.length) / 2;
    if (shift === 0) return;
    set("kernel", name ? presets[name][k] // else zeros around it, or only its middle
      : Array.from({ length: k }, (_, i) => Array.from({ length: k }, (_, j) => kernel[i - shift]?.[j - shift] ?? 0)));
  }

  const buttons = Object.keys(presets).map((name) => make("button", {
    type: "button", onclick: () => set("kernel", presets[name][model.get("kernel").length]),
  }, name));
  const sizes = [3, 5].map((k) => make("button", { type: "button", "data-size": k, onclick: () => resize(k) }, `${k}×${k}`));
  const total = make("p", { class: "total" });
  const bias = make("input", { type: "number", step: 0.25, class: "bias", "aria-label": "Bias", oninput: () => {
    const value = bias.valueAsNumber, fine = Math.abs(value) <= heaviest;
    bias.setAttribute("aria-invalid", String(!fine));
    if (fine) set("bias", value);
  }, onblur: () => showSwitches() });
  const relu = make("input", { type: "checkbox", onchange: () => set("relu", relu.checked) });
  const locked = make("input", { type: "checkbox", onchange: () => {
    const lock = locked.checked; // setting the limit shows the switches anew
    if (lock) set("limit", limit);
    set("locked", lock);
  } });
  const slider = makeRange("Threshold", () => set("threshold", Number((+slider.value).toPrecision(6)))), level = make("span", { class: "number" });
  const score = make("output", { class: "score", "aria-live": "polite" });
  const best = make("button", { type: "button", onclick: () => {
    const { rows, columns, truth } = picture, inside = new Uint8Array(map.length);
    for (let p = 0; p < map.length; p++) inside[p] = truth[(Math.floor(p / wide()) + half()) * columns + (p % wide()) + half()];
    set("threshold", bestThreshold(map, inside, truth.reduce((a, b) => a + b, 0)).threshold);
  } }, "best for this map");
  function showSwitches() {
    if (bias !== bias.getRootNode().activeElement) { bias.value = rounded(model.get("bias"), 4); bias.setAttribute("aria-invalid", "false"); }
    relu.checked = model.get("relu");
    locked.checked = model.get("locked");
  }
  const help = makeHelp(`Type a number, or press the up and down keys in a field; Tab goes to the next one. Click or drag in a picture, or use the arrow keys there (with Shift: ten pixels), to lay the kernel elsewhere. P: ${
    still ? "next row" : "play or pause"}. S: one pixel on.`);
  const swatch = (name, text) => make("li", {}, make("i", { style: `background: ${outlines[name]}; border: 1px solid #111` }), text);
  const judge = make("div", { class: "toolbar judge" },
    make("label", {}, make("span", {}, "tumour where map >"), slider, level), best, score,
    make("ul", { class: "key" }, swatch("truth", "truth"), swatch("prediction", "map > threshold")));
  const part = (title, content) => make("div", {}, make("div", { class: "title" }, title), content);
  const sign = (text) => make("b", { class: "sign", "aria-hidden": "true" }, text);

  const root = make("div", { class: "medseg-kernel", role: "group", "aria-label": "Sliding kernel" },
    make("div", { class: "toolbar" },
      make("span", { class: "choice", role: "group", "aria-label": "Preset" }, ...buttons),
      make("span", { class: "choice", role: "group", "aria-label": "Size" }, ...sizes)),
    make("div", { class: "toolbar" }, button,
      make("button", { type: "button", onclick: step, "aria-label": "One pixel on" }, "Step"),
      make("button", { type: "button", onclick: showAll }, "Whole map"),
      make("label", {}, make("span", {}, "Bias"), bias), make("label", {}, relu, "ReLU"), make("label", {}, locked, "Lock the colours")),
    make("div", { class: "panels" }, left.figure, right.figure),
    judge,
    make("div", { class: "arithmetic" }, part("pixels", under), sign("×"), part("kernel", grid), sign("="), part("products", products)),
    result, complaint, total, help);

  // -------------------------------------------------------------------------------------------- from state to view
  function onPosition() {
    if (!picture) return;
    const kernel = model.get("kernel"), k = kernel.length, [row, column] = marked(), weights = kernel.flat();
    frame(left, k);
    frame(right, 1);
    const pixels = weights.map((_, n) => picture.values[(row - half() + Math.floor(n / k)) * picture.columns + column - half() + (n % k)]);
    const terms = pixels.map((value, n) => value * weights[n]), most = Math.max(...terms.map(Math.abs)) || 1;
    const show = (cell, value, digits = 2) => { cell.textContent = (value || 0).toFixed(digits).replace("-", "−"); }; // no minus before a zero
    [...under.children].forEach((cell, n) => show(cell, pixels[n]));
    [...products.children].forEach((cell, n) => { show(cell, terms[n], most < 0.1 ? 3 : 2); cell.style.background = tint(terms[n], most); });
    const sum = terms.reduce((a, b) => a + b, 0), added = model.get("bias"), value = map[place([row, column])];
    const steps = [`the products add up to ${written(sum)}`, ...(added ? [`with the bias ${written(sum + added)}`] : []), ...(model.get("relu") ? ["after ReLU"] : ["the feature is"])];
    result.replaceChildren(make("span", {}, `row ${row}, column ${column}: ${steps.join("; ")} `), make("b", {}, written(value)));
  }

  function onMap() {
    showSwitches();
    if (!picture) return;
    computeMap();
    drawMap();
    drawLines();
    onPosition();
  }
  function onColours() { showSwitches(); if (picture) drawMap(); }
  function onKernel() {
    pause();
    filled = Infinity;
    showWeights();
    onMap();
  }

  async function onPicture() {
    const given = model.get("_picture"), values = new Float32Array((await unpack(given.data)).buffer), truth = given.truth ? await unpack(given.truth) : null;
    if (given !== model.get("_picture")) return; // replaced meanwhile
    picture = { rows: given.shape[0], columns: given.shape[1], values, window: given.window, truth };
    judge.hidden = !truth;
    drawImage();
    onKernel();
  }

  const listeners = { kernel: onKernel, position: onPosition, _picture: onPicture, bias: onMap, relu: onMap, locked: onColours, limit: onColours, threshold: drawLines };
  const press = ({ key, target }) => {
    if (target.type === "number") return;
    if (key.toLowerCase() === "p") play();
    if (key.toLowerCase() === "s") step();
  };
  const leave = mount(model, el, root, listeners, { press, resized: drawLines });
  onPicture().then(() => { root.dataset.ready = "true"; });
  return () => { clearInterval(playing); leave(); };
}
