// Kernel editor: a picture, a kernel of numbers to edit, and their feature map, computed here with every key pressed.

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

function render({ model, el }) {
  const { presets, own, colours, quantile, heaviest } = model.get("_scene");
  const [negative, zero, positive] = colours.map(rgb);
  let picture = null; // rows, columns, values, window
  let map = null, limit = 1; // the feature map, and where its colours end

  const set = setter(model);
  const presetNow = () => Object.keys(presets).find((name) => same(presets[name][model.get("kernel").length], model.get("kernel")));
  /** Return the marked pixel, moved to where the kernel fits. */
  const marked = () => {
    const half = model.get("kernel").length >> 1, [row, column] = model.get("position");
    return [clamp(row, half, picture.rows - 1 - half), clamp(column, half, picture.columns - 1 - half)];
  };

  // ------------------------------------------------------------------------------------------------------ pictures
  function stage(name, label, key) {
    const canvas = make("canvas"), mark = make("i", { class: "mark" });
    const box = make("div", {
      class: `stage ${key}`, tabindex: 0, role: "application", "aria-roledescription": "picture", "data-view": key,
      "aria-label": `${label}. Arrow keys move the marked pixel, with Shift ten pixels.`,
    }, canvas, mark);
    const pick = (event) => {
      const { rows, columns } = picture, half = model.get("kernel").length >> 1, r = box.getBoundingClientRect();
      const row = Math.floor(((event.clientY - r.top) / r.height) * rows), column = Math.floor(((event.clientX - r.left) / r.width) * columns);
      set("position", [clamp(row, half, rows - 1 - half), clamp(column, half, columns - 1 - half)]);
    };
    drag(box, pick);
    box.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const step = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far] }[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const [row, column] = marked();
      model.set("position", [row + step[0], column + step[1]]);
      set("position", marked());
    });
    return { canvas, mark, box, context: canvas.getContext("2d"), figure: make("figure", {}, make("figcaption", {}, name), box) };
  }
  const left = stage("image", "The image", "image"), right = stage("feature map", "The feature map", "map");
  const legend = make("div", { class: "legend", role: "group" });
  right.figure.append(legend);

  function frame({ canvas, mark, box }, side) { // side: what the mark encloses, in pixels
    const { rows, columns } = picture, [row, column] = marked(), half = (side - 1) / 2;
    mark.style.left = `${((column - half) / columns) * 100}%`;
    mark.style.top = `${((row - half) / rows) * 100}%`;
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

  function drawMap() {
    const { rows, columns } = picture, k = model.get("kernel").length, half = k >> 1, wide = columns - k + 1, high = rows - k + 1;
    map = correlate(picture, model.get("kernel"));
    const magnitudes = map.map(Math.abs).sort();
    limit = magnitudes[Math.floor(quantile * (map.length - 1))] || magnitudes[map.length - 1] || 1;
    const data = new ImageData(wide, high);
    for (let p = 0, o = 0; p < map.length; p++) {
      const t = Math.min(Math.abs(map[p]) / limit, 1), end = map[p] < 0 ? negative : positive;
      for (let channel = 0; channel < 3; channel++) data.data[o++] = zero[channel] + (end[channel] - zero[channel]) * t;
      data.data[o++] = 255;
    }
    Object.assign(right.canvas, { width: columns, height: rows }); // clears it: the rim without values stays transparent
    right.context.putImageData(data, half, half);
    const bar = make("i", { class: "bar", style: `background: linear-gradient(to right, ${colours.join(", ")})` });
    legend.replaceChildren(make("span", {}, short(-limit)), bar, make("span", {}, `+${short(limit)}`),
      make("small", {}, "blue: below zero, white: zero, vermilion: above; full colour also beyond these ends; hatched: no value"));
    legend.setAttribute("aria-label", `Colours from ${short(-limit)}, blue, over zero, white, to ${short(limit)}, vermilion`);
  }

  // -------------------------------------------------------------------------------------------------------- kernel
  const grid = make("div", { class: "grid weights", role: "group", "aria-label": "Kernel" });
  const under = make("div", { class: "grid under", "aria-hidden": "true" });
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
    under.replaceChildren(...inputs.flat().map(() => make("span")));
    for (const box of [grid, under]) box.style.setProperty("--k", k);
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
      const strength = Math.round((45 * Math.abs(weight)) / most);
      input.style.background = `color-mix(in srgb, ${weight < 0 ? colours[0] : colours[2]} ${strength}%, transparent)`;
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
  const help = makeHelp("Type a number, or press the up and down keys in a field; Tab goes to the next one. Click or drag in a picture, or use the "
    + "arrow keys there (with Shift: ten pixels), to choose the pixel whose arithmetic is shown.");

  const root = make("div", { class: "medseg-kernel", role: "group", "aria-label": "Kernel editor" },
    make("div", { class: "toolbar" },
      make("span", { class: "choice", role: "group", "aria-label": "Preset" }, ...buttons),
      make("span", { class: "choice", role: "group", "aria-label": "Size" }, ...sizes)),
    make("div", { class: "panels" }, left.figure,
      make("div", { class: "arithmetic" },
        make("div", { class: "title" }, "pixels under the kernel"), under, make("b", { class: "sign", "aria-hidden": "true" }, "×"),
        make("div", { class: "title" }, "kernel"), grid, result, complaint, total),
      right.figure), help);

  // -------------------------------------------------------------------------------------------- from state to view
  function onPosition() {
    if (!picture) return;
    const kernel = model.get("kernel"), k = kernel.length, half = k >> 1, [row, column] = marked();
    frame(left, k);
    frame(right, 1);
    [...under.children].forEach((cell, n) => {
      const value = picture.values[(row - half + Math.floor(n / k)) * picture.columns + column - half + (n % k)];
      cell.textContent = value.toFixed(2).replace("-", "−");
    });
    const value = map[(row - half) * (picture.columns - k + 1) + column - half];
    result.replaceChildren(make("span", {}, `row ${row}, column ${column}: all products added up make `), make("b", {}, written(value)));
  }

  function onKernel() {
    showWeights();
    if (!picture) return;
    drawMap();
    onPosition();
  }

  async function onPicture() {
    const given = model.get("_picture"), values = new Float32Array((await unpack(given.data)).buffer);
    if (given !== model.get("_picture")) return; // replaced meanwhile
    picture = { rows: given.shape[0], columns: given.shape[1], values, window: given.window };
    drawImage();
    onKernel();
  }

  const leave = mount(model, el, root, { kernel: onKernel, position: onPosition, _picture: onPicture });
  onPicture().then(() => { root.dataset.ready = "true"; });
  return leave;
}
