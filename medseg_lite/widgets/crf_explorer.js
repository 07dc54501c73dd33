// CRF explorer: one slice before and after the dense CRF, and the influence of every voxel on a marked one. The whole CRF runs here, as crf/ computes it.

/** Return the permutohedral lattice of points with `d` features each, as a filter of a signal. It is `crf.Permutohedral`. */
function lattice(features, d, shear) {
  const n = features.length / d, vertex = new Int32Array(n * (d + 1)), weight = new Float64Array(n * (d + 1));
  // A vertex's integer coordinates become one number, with steps that have no small common multiples.
  const steps = Array.from({ length: d }, (_, i) => Math.floor(2 ** 36 * (Math.exp((i + 1) / 7) % 1)));
  const numbers = new Map(), rest = new Float64Array(d), axes = steps.map((_, i) => i);
  for (let p = 0, o = 0; p < n; p++) {
    let key = 0, before = 1;
    for (let i = 0; i < d; i++) {
      let t = 0;
      for (let j = 0; j <= i; j++) t += shear[i][j] * features[p * d + j];
      rest[i] = t - Math.floor(t);
      key += Math.floor(t) * steps[i];
    }
    axes.sort((a, b) => rest[b] - rest[a]);
    for (let i = 0; i <= d; i++, o++) {
      const fraction = i < d ? rest[axes[i]] : 0;
      if (!numbers.has(key)) numbers.set(key, numbers.size);
      vertex[o] = numbers.get(key);
      weight[o] = before - fraction;
      before = fraction;
      key += steps[axes[i]];
    }
  }
  const along = [...steps, steps.reduce((a, b) => a + b)].map((step) => Int32Array.from(numbers.keys(), (key) => numbers.get(key + step) ?? -1));
  return (signal) => {
    const values = new Float64Array(numbers.size), out = new Float64Array(n), scale = 1 / (1 + 2 ** -d);
    for (let o = 0; o < vertex.length; o++) values[vertex[o]] += weight[o] * signal[Math.floor(o / (d + 1))];
    for (const next of along) {
      const old = values.slice();
      next.forEach((there, here) => {
        if (there < 0) return;
        values[here] += old[there] / 2;
        values[there] += old[here] / 2;
      });
    }
    for (let o = 0; o < vertex.length; o++) out[Math.floor(o / (d + 1))] += weight[o] * values[vertex[o]] * scale;
    return out;
  };
}

/** Return a Gaussian filter of a signal on the voxels `inside` a picture. */
function gaussian(inside, rows, columns, sigma) {
  const reach = Math.ceil(6 * sigma), g = Float64Array.from({ length: reach + 1 }, (_, k) => Math.exp(-((k / sigma) ** 2) / 2));
  const along = (grid, step, length) => grid.map((_, i) => {
    const place = Math.floor(i / step) % length;
    let sum = 0;
    for (let k = Math.max(-reach, -place); k <= Math.min(reach, length - 1 - place); k++) sum += g[Math.abs(k)] * grid[i + k * step];
    return sum;
  });
  return (signal) => {
    const grid = new Float64Array(rows * columns);
    inside.forEach((i, n) => { grid[i] = signal[n]; });
    const blurred = along(along(grid, 1, columns), columns, rows);
    return Float64Array.from(inside, (i) => blurred[i]);
  };
}

/** Divide a filter's kernel K by its row sums n: n^-½ K n^-½. */
function normalise(filter, count) {
  const root = filter(new Float64Array(count).fill(1)).map((sum) => 1 / Math.sqrt(sum + 1e-20));
  return (signal) => filter(signal.map((v, i) => v * root[i])).map((v, i) => v * root[i]);
}

function render({ model, el }) {
  const scene = model.get("_scene"), { colours, ranges } = scene, set = setter(model), alone = model.get("_alone");
  let slice = null; // rows, columns, image, probability, mask, truth, inside
  let kernels = {}; // name -> [the sigmas it was built with, its filter]
  let after = null, chance = null, energies = null; // foreground after the CRF, its probability; energies before and after
  const kernelNames = ["smoothness", "appearance"];

  // ------------------------------------------------------------------------------------------------------ pictures
  const limit = (row, column) => [clamp(row, 0, slice.rows - 1), clamp(column, 0, slice.columns - 1)];
  const markAt = (row, column) => { [row, column] = limit(row, column); model.set("row", row); set("column", column); };
  const turnTo = (index) => { // whether there is such a slice
    const next = clamp(index, ...scene.slices), turns = !alone && next !== model.get("index");
    if (turns) set("index", next);
    return turns;
  };
  const away = [(by) => markAt(model.get("row"), model.get("column") - by), (by) => markAt(model.get("row") - by, model.get("column")),
    (by) => turnTo(model.get("index") + by)]; // both axes of a picture run against the array's

  const whole = { zoom: 1, top: 0, left: 0 }; // of a picture: how large its voxels are, and the first row and column that it shows
  const views = [whole, whole, whole, whole];
  let held = false; // whether a pointer is down: views stay until it is let go
  const panels = ["network", "smoothness kernel", "appearance kernel", "after the CRF"].map((title, number) => {
    const canvas = make("canvas"), mark = make("i", { class: "mark", style: `--mark: ${colours.mark}` }), fact = make("small"), key = make("ul", { class: "key" });
    const stage = make("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": number }, canvas, mark);
    const pick = (event) => {
      const r = stage.getBoundingClientRect();
      const { zoom, top, left } = views[number];
      markAt(Math.floor(top + ((event.clientY - r.top) / r.height / zoom) * slice.rows), Math.floor(left + ((event.clientX - r.left) / r.width / zoom) * slice.columns));
    };
    stage.addEventListener("pointerdown", () => { held = true; });
    drag(stage, pick);
    for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { held = false; drawAll(); });
    steer(stage, () => ({ x: 0, y: 1, cut: 2 }), scene.picture, (axis, by) => away[axis](by));
    return { title, canvas, mark, fact, key, stage, box: make("figure", {}, make("figcaption", {}, title, fact), stage, key) };
  });

  /** Draw a panel: the slice in grey, times `shade`, under layers of a strength by voxel, a colour and an opacity. */
  function draw(panel, fact, entries, layers, { shade = 1, outlined = true, lines = [], view = whole } = {}) {
    const { rows, columns, grey, truth } = slice, { canvas, stage, mark } = panel, image = new ImageData(columns, rows);
    const shades = layers.map(([strength, colour, opacity]) => [strength, [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)), opacity]);
    for (let i = 0; i < grey.length; i++) {
      for (let c = 0; c < 3; c++)
        image.data[4 * i + c] = shades.reduce((v, [strength, rgb, opacity]) => v + (rgb[c] - v) * strength[i] * opacity, grey[i] * shade);
      image.data[4 * i + 3] = 255;
    }
    stage.style.aspectRatio = `${columns} / ${rows * scene.aspect}`;
    const width = stage.clientWidth || 200, height = (width * rows * scene.aspect) / columns, context = fit(canvas, width, height);
    context.scale(view.zoom, view.zoom);
    context.translate((-view.left * width) / columns, (-view.top * height) / rows);
    stamp(context, image, 0, 0, width, height);
    if (truth && outlined) drawOutline(context, [slice.turned, [1, rows, columns], { cut: 0, x: 2, y: 1 }, 0], [width / columns, height / rows], colours.truth);
    for (const [r, c, strength, colour] of lines) {
      Object.assign(context, { strokeStyle: colour, lineWidth: (7 * strength) / view.zoom, globalAlpha: 0.85 });
      context.beginPath();
      for (const [y, x] of [[r, c], limit(model.get("row"), model.get("column"))]) context.lineTo(((x + 0.5) * width) / columns, ((y + 0.5) * height) / rows);
      context.stroke();
    }
    context.globalAlpha = 1;
    mark.style.left = `${((model.get("column") + 0.5 - view.left) / columns) * 100 * view.zoom}%`;
    mark.style.top = `${((model.get("row") + 0.5 - view.top) / rows) * 100 * view.zoom}%`;
    mark.style.setProperty("--voxel", `${(width / columns) * view.zoom}px`);
    views[panels.indexOf(panel)] = view;
    panel.fact.textContent = fact;
    panel.key.replaceChildren(...entries.map(([text, look]) => make("li", {}, make("i", { style: look, class: look ? "" : "truth" }), text)));
    stage.setAttribute("aria-label", `${panel.title}: ${fact}. Arrow keys move the marked voxel, with Shift ten voxels.`);
  }

  function score(foreground) {
    let size = 0, both = 0, real = 0;
    foreground.forEach((f, i) => { size += f; real += slice.truth?.[i] ?? 0; both += f && slice.truth?.[i]; });
    return `${size} voxels${slice.truth ? `, Dice ${Math.round(size + real ? (200 * both) / (size + real) : 100)} %` : ""}`;
  }

  /** Return the weight of every voxel in the two kernels of the marked one, before they are normalised. */
  function influences() {
    const { rows, columns, image, mask } = slice, [row, column] = limit(model.get("row"), model.get("column")), size = rows * columns;
    const weigh = (sigma, gamma) => Float64Array.from(mask, (m, i) => {
      let energy = ((Math.floor(i / columns) - row) ** 2 + ((i % columns) - column) ** 2) / sigma ** 2;
      for (let c = 0; c < image.length && gamma; c += size) energy += ((image[c + i] - image[c + row * columns + column]) / gamma) ** 2;
      return m * Math.exp(-energy / 2);
    });
    return [weigh(model.get("smoothness_sigma")), weigh(model.get("appearance_sigma"), model.get("intensity_sigma"))];
  }

  /** Return lines from some voxels, evenly spaced, to the marked one: place, weight times the network's certainty, colour of the vote. */
  function votes(kernel, sigma) {
    const { rows, columns, probability } = slice, [row, column] = limit(model.get("row"), model.get("column")), step = Math.max(2, Math.round(0.7 * sigma)), found = [];
    for (let r = row % step; r < rows; r += step)
      for (let c = column % step; c < columns; c += step) {
        const i = r * columns + c, strength = kernel[i] * Math.abs(2 * probability[i] - 1);
        if (strength > 0.03 && (r !== row || c !== column)) found.push([r, c, strength, probability[i] > 0.5 ? colours.lesion : colours.background]);
      }
    return found;
  }

  /** Return the view of a kernel's picture: three standard deviations round the mark, or the whole slice. */
  function near(k, sigma) {
    if (held) return views[k + 1];
    const { rows, columns } = slice, zoom = clamp(Math.min(rows, columns) / (6 * sigma + 1), 1, 6), [row, column] = limit(model.get("row"), model.get("column"));
    const first = (place, length) => clamp(place + 0.5 - length / zoom / 2, 0, length - length / zoom);
    return closer.checked ? { zoom, top: first(row, rows), left: first(column, columns) } : whole;
  }

  function drawAll() {
    if (!after) return;
    const before = slice.probability.map((p) => p > 0.5), truth = slice.truth ? [["truth", ""]] : [], fill = (colour) => `background: ${colour}`;
    draw(panels[0], score(before), [["lesion", fill(colours.kept)], ...truth], [[before, colours.kept, 0.6]]);
    const votesKey = [["votes lesion", fill(colours.lesion)], ["votes background", `${fill(colours.background)}; outline: 1px solid #777`]];
    influences().forEach((kernel, k) => draw(panels[k + 1],
      model.get(kernelNames[k]) ? `the sum of the weights is ${Math.round(kernel.reduce((a, b) => a + b))}` : "switched off",
      [["weight 0 to 1", `width: 40px; background: linear-gradient(to right, #333, ${colours.influence})`], ...votesKey], [[kernel, colours.influence, 1]],
      { shade: 0.6, outlined: false, view: near(k, model.get(`${kernelNames[k]}_sigma`)), lines: model.get(kernelNames[k]) ? votes(kernel, model.get(`${kernelNames[k]}_sigma`)) : [] }));
    const changes = { kept: before.map((b, i) => b && after[i]), removed: before.map((b, i) => b && !after[i]), added: before.map((b, i) => !b && after[i]) };
    const names = Object.keys(changes), count = (where) => where.reduce((a, b) => a + b);
    draw(panels[3], score(after), [...names.map((name) => [`${name} ${count(changes[name])}`, fill(colours[name])]), ...truth],
      names.map((name) => [changes[name], colours[name], 0.6]));
    const [row, column] = limit(model.get("row"), model.get("column")), i = row * slice.columns + column;
    tell(readout, [["marked voxel", `row ${row}, column ${column}`], ["network", slice.probability[i].toFixed(2)], ["after the CRF", chance[i].toFixed(2)],
      ["energy of the slice's labels", `network ${energies[0].toFixed(0)}, after the CRF ${energies[1].toFixed(0)}`]]);
  }

  // ------------------------------------------------------------------------------------------------------- the CRF
  function filter(name, sigmas, build) {
    if (kernels[name]?.[0] !== String(sigmas)) kernels[name] = [String(sigmas), normalise(build(...sigmas), slice.inside.length)];
    return kernels[name][1];
  }

  /** Run mean field for two classes: z is the logit of the background. */
  function refine() {
    if (!slice) return;
    const { inside, rows, columns, image, probability } = slice, value = (name) => model.get(name), size = rows * columns, channels = image.length / size;
    const smooth = filter("smoothness", [value("smoothness_sigma")], (sigma) => gaussian(inside, rows, columns, sigma));
    const appear = filter("appearance", [value("appearance_sigma"), value("intensity_sigma")], (sigma, gamma) => lattice(
      Float64Array.from([...inside].flatMap((i) => [Math.floor(i / columns) / sigma, (i % columns) / sigma,
        ...Array.from({ length: channels }, (_, c) => image[c * size + i] / gamma)])), channels + 2, scene.shear));
    const [w1, w2] = kernelNames.map((name) => (value(name) ? value(`${name}_weight`) : 0));
    const unary = Float64Array.from(inside, (i) => Math.log(Math.max(1 - probability[i], 1e-5) / Math.max(probability[i], 1e-5)));
    let z = unary;
    for (let turn = 0; turn < value("iterations"); turn++) {
      const q = z.map((v) => Math.tanh(v / 2)), near = smooth(q), alike = appear(q);
      z = unary.map((u, n) => u + w1 * near[n] + w2 * alike[n]);
    }
    /** The energy of labels: what each costs by itself, and the weight of every pair of a foreground and a background voxel. */
    const energy = (label) => {
      const near = w1 && smooth(label), alike = w2 && appear(label);
      return label.reduce((sum, l, n) => {
        const p = probability[inside[n]], pairs = l ? 0 : (w1 && w1 * near[n]) + (w2 && w2 * alike[n]);
        return sum - Math.log(Math.max(l ? p : 1 - p, 1e-5)) + pairs;
      }, 0);
    };
    energies = [Float64Array.from(inside, (i) => +(probability[i] > 0.5)), z.map((v) => +(v < 0))].map(energy);
    after = new Array(size).fill(false);
    chance = new Float64Array(size);
    inside.forEach((i, n) => { after[i] = z[n] < 0; chance[i] = 1 / (1 + Math.exp(z[n])); });
  }

  // ------------------------------------------------------------------------------------------------------ controls
  const sign = (letter, index) => make("i", {}, letter, make("sub", {}, index));
  const mm = (v) => [...new Set(scene.spacing.map((s) => (v * s).toFixed(1)))].join(" × ");
  const far = (v) => `${mm(v)} mm, ${v.toFixed(2)} voxels`;
  const sliders = {}; // parameter -> [slider, shown value, how the value is written]
  function row(name, symbol, words, write = (v) => v.toFixed(2)) {
    const [low, high] = ranges[name], shown = make("span", { class: "number" });
    const slider = makeRange(`${symbol.textContent}, ${words}`, () => set(name, clamp(10 ** +slider.value, low, high)), { min: Math.floor(100 * Math.log10(low)) / 100, max: Math.ceil(100 * Math.log10(high)) / 100, step: 0.01 });
    sliders[name] = [slider, shown, write];
    return make("label", {}, make("span", {}, symbol, ` ${words}`), shown, slider);
  }
  const turn = makeRange(`${scene.plane} slice`, () => turnTo(+turn.value), { min: scene.slices[0], max: scene.slices[1] }), turned = make("span", { class: "number" });
  const reset = make("button", { type: "button", onclick: () => Object.entries(scene.first).forEach(([name, value]) => { if (name !== "index" || !alone) set(name, value); }) }, "Reset");
  const switches = {}; // kernel -> its box
  const use = (name) => {
    const box = make("input", { type: "checkbox", "aria-label": `use the ${name} kernel`, onchange: () => set(name, box.checked) });
    switches[name] = box;
    return make("label", { class: "use" }, box, "use it");
  };
  const updates = makeRange("mean-field updates", () => set("iterations", +updates.value), { min: 0, max: scene.most }), updated = make("span", { class: "number" });
  const closer = make("input", { type: "checkbox", checked: true, onchange: () => drawAll() });
  const step = make("button", { type: "button", onclick: () => set("iterations", (model.get("iterations") + 1) % (scene.most + 1)) }, "One update more");
  const group = (title, ...rows) => make("fieldset", {}, make("legend", {}, title), ...rows);
  const readout = makeReadout("At the marked voxel");
  const root = make("div", { class: "medseg-crf", role: "group", "aria-label": `CRF explorer: ${scene.title}` },
    make("div", { class: "groups" },
      group("Smoothness kernel: near voxels", row("smoothness_weight", sign("w", 1), "how strong"), row("smoothness_sigma", sign("σ", "α"), "how far", far), use("smoothness")),
      group("Appearance kernel: near and alike", row("appearance_weight", sign("w", 2), "how strong"), row("appearance_sigma", sign("σ", "β"), "how far", far),
        row("intensity_sigma", sign("σ", "γ"), "how different in intensity"), use("appearance")),
      group("Mean field", make("label", {}, make("span", {}, "updates"), updated, updates), step),
      group("View", make("label", {}, make("span", {}, `${scene.plane} slice`), turned, ...(alone ? [] : [turn])), make("label", { class: "use" }, closer, "kernels: near the mark"), reset)),
    make("div", { class: "panels" }, ...panels.map(({ box }) => box)), readout,
    makeHelp(`Click or drag in a picture: mark a voxel. Arrow keys in a picture: move the mark, with Shift ten voxels. ${alone ? "" : "Page Up and Page Down: slice. "}`
      + "The middle pictures show how strongly each voxel influences the marked one. Their lines are as thick as the voxel's weight times the network's certainty, |2p − 1|. Reset: back to the first parameters and mark."));

  function showControls() {
    for (const [name, [slider, shown, write]] of Object.entries(sliders)) {
      const value = model.get(name);
      slider.value = Math.log10(value);
      shown.textContent = write(value);
      slider.setAttribute("aria-valuetext", write(value));
    }
    for (const [name, box] of Object.entries(switches)) box.checked = model.get(name);
    updates.value = model.get("iterations");
    updated.textContent = `${model.get("iterations")} of ${scene.most}`;
    turn.value = model.get("index");
    turned.textContent = alone ? model.get("index") : `${model.get("index")} / ${scene.slices[1]}`;
  }

  // -------------------------------------------------------------------------------------------- from state to view
  function onParameter() { showControls(); refine(); drawAll(); }

  async function onSlice() {
    const given = model.get("_slice"), [rows, columns] = given.shape;
    const [image, probability, mask, truth] = await Promise.all([given.image, given.probability, given.mask, given.truth].map((b) => b && unpack(b)));
    if (given !== model.get("_slice")) return; // replaced meanwhile
    const [black, white] = scene.window, values = new Float32Array(image.buffer);
    slice = { rows, columns, image: values, probability: [...new Float32Array(probability.buffer)], mask, truth, inside: Int32Array.from([...mask.keys()].filter((i) => mask[i])) };
    slice.grey = Float32Array.from({ length: rows * columns }, (_, i) => clamp(((values[i] - black) * 255) / (white - black), 0, 255));
    slice.turned = truth?.slice().reverse(); // volumes' axes run against the picture's
    kernels = {};
    onParameter();
  }

  const listeners = { _slice: onSlice, row: drawAll, column: drawAll, index: showControls };
  for (const name of [...Object.keys(ranges), ...kernelNames, "iterations"]) listeners[name] = onParameter;
  const leave = mount(model, el, root, listeners, { resized: drawAll });
  onSlice().then(() => { root.dataset.ready = "true"; });
  return leave;
}
