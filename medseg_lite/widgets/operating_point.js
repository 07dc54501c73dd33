// Operating point: methods cut at their thresholds. The scores at each threshold are Python's. A voxel is predicted at threshold k if its level is above k.

const PLOT = { left: 42, right: 10, top: 8, bottom: 32 }; // room around the square of a curve

/** Prepare the axes of a curve from 0 to 1 on a canvas; returns its context and the place [x, y] of a point. `ticks`: [[place, text], …] to the right. */
function drawAxes(canvas, width, height, colour, [right, up], ticks) {
  const { left, top } = PLOT, across = width - left - PLOT.right, tall = height - top - PLOT.bottom, context = fit(canvas, width, height);
  const at = (x, y) => [left + x * across, top + (1 - y) * tall];
  Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "middle", textAlign: "right" });
  for (const t of [0, 0.5, 1]) {
    context.globalAlpha = 0.2;
    context.fillRect(left, Math.round(at(0, t)[1]), across, 1);
    context.globalAlpha = 1;
    context.fillText(t, left - 5, at(0, t)[1]);
  }
  Object.assign(context, { textBaseline: "top", textAlign: "center" });
  for (const [x, text] of ticks) {
    context.fillRect(Math.round(at(x, 0)[0]), top + tall, 1, 4);
    context.fillText(text, Math.min(at(x, 0)[0], width - context.measureText(text).width / 2), top + tall + 5);
  }
  context.fillText(right, left + across / 2, top + tall + 18);
  context.save();
  context.translate(2, top + tall / 2);
  context.rotate(-Math.PI / 2);
  context.fillText(up, 0, 0);
  context.restore();
  return { context, at };
}

function render({ model, el }) {
  const scene = model.get("_scene"), { methods, grid, chosen, cases, plane, colours } = scene, set = setter(model), last = grid.length - 1;
  const scores = scene.scores.map((columns) => grid.map((_, k) => Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[k]]))));
  const ties = scores.map((points) => points.flatMap((p, k) => (p.dice >= Math.max(...points.map((q) => q.dice)) - 1e-9 ? [k] : [])));
  const best = ties.map((all) => all[Math.floor(all.length / 2)]), loaded = []; // of each case: image, truth, levels of each method
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`, write = (t) => String(Number(t.toPrecision(4)));
  const now = (name) => grid.indexOf(model.get("thresholds")[name]), hereNumber = () => cases.findIndex((c) => c.title === model.get("case"));
  const these = cases.length > 1 ? "these cases" : "this case";

  /** Set a threshold, or all of them if they move together. */
  function choose(name, k) {
    const t = grid[clamp(k, 0, last)];
    set("thresholds", model.get("shared") ? Object.fromEntries(methods.map((m) => [m, t])) : { ...model.get("thresholds"), [name]: t });
  }
  function turn(by) { // whether there is such a slice
    const { start, shape } = cases[hereNumber()], next = clamp(model.get("index") + by, start[plane.cut], start[plane.cut] + shape[plane.cut] - 1);
    const turns = next !== model.get("index");
    if (turns) set("index", next);
    return turns;
  }

  const panels = methods.map((name, m) => {
    const picture = make("canvas"), plot = make("canvas"), told = make("span", { class: "number" }), numbers = make("div", { class: "numbers" });
    const verdict = make("output", { class: "verdict", "aria-live": "polite", "aria-label": `How the threshold of ${name} was found` });
    const stage = make("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": `picture${m}`,
      "aria-label": `${name}: outlines of truth and prediction. Left and right arrow keys move the threshold, Page Up and Page Down change the slice.` }, picture);
    steer(stage, () => plane, [1e4, 1e4, 1e4], (axis, by) => (axis === plane.cut ? turn(by) : choose(name, now(name) + (axis === plane.x ? -by : by))));
    const curve = make("div", { class: "plot", role: "img", "data-view": `curve${m}` }, plot);
    drag(curve, (event) => { // the nearest point of the curve
      const r = curve.getBoundingClientRect(), [x, y] = scene.curves[model.get("curve")], right = (event.clientX - r.left - PLOT.left) / (r.width - PLOT.left - PLOT.right);
      const up = 1 - (event.clientY - r.top - PLOT.top) / (r.height - PLOT.top - PLOT.bottom), far = scores[m].map((p) => Math.hypot(p[x] - right, x === "step" ? 0 : p[y] - up));
      choose(name, far.indexOf(Math.min(...far)));
    });
    const slider = makeRange(`Threshold of ${name}`, () => choose(name, +slider.value), { max: last });
    const button = (text, k) => make("button", { type: "button", "aria-label": `${text}, ${name}`, onclick: () => choose(name, k) }, text);
    const buttons = [button("best Dice here", best[m]), ...(name in chosen ? [button("chosen on validation", grid.indexOf(chosen[name]))] : [])];
    const box = make("figure", {}, make("figcaption", {}, make("b", {}, name), told), stage, curve, slider, make("div", { class: "below" }, ...buttons), numbers, verdict);
    return { name, picture, plot, told, numbers, verdict, stage, curve, slider, box };
  });

  // ------------------------------------------------------------------------------------------------------ pictures
  function drawPictures() {
    const number = hereNumber(), here = cases[number], data = loaded[number], index = model.get("index") - here.start[plane.cut];
    if (!data) return load(number);
    const [image, truth, ...levels] = data, { shape, spacing } = here, input = sliceImage(image, shape, 0, plane, index, greyTable(here));
    const aspect = spacing[plane.y] / spacing[plane.x], real = borders(truth, shape, plane, index, (a, b) => a !== b);
    panels.forEach(({ name, picture, stage }, m) => {
      const width = stage.clientWidth || 300, height = (width * shape[plane.y] * aspect) / shape[plane.x], k = now(name);
      stage.style.aspectRatio = `${shape[plane.x]} / ${shape[plane.y] * aspect}`;
      const context = fit(picture, width, height), scale = [width / shape[plane.x], height / shape[plane.y]];
      stamp(context, input, 0, 0, width, height);
      drawBorders(context, real, scale, colours.truth);
      drawBorders(context, borders(levels[m], shape, plane, index, (a, b) => a > k !== b > k), scale, colours.prediction);
      drawBorders(context, real, scale, colours.truth, { style: "dashes", casing: false }); // both are seen where they meet
      drawLetters(context, plane, width, height);
    });
    root.dataset.ready = "true";
  }
  async function load(number) {
    loaded[number] = await Promise.all(model.get("_volumes")[number].map(unpack));
    drawPictures();
  }

  function drawCurve({ name, plot, curve }, m) {
    const [x, y, ...titles] = scene.curves[model.get("curve")], byStep = x === "step", width = curve.clientWidth || 300, height = byStep ? 150 : 210;
    const ticks = byStep ? [0.001, 0.25, 0.5, 0.75, 0.999].map((t) => [grid.indexOf(t) / last, t]) : [[0, 0], [0.5, 0.5], [1, 1]];
    curve.style.height = `${height}px`;
    const colour = getComputedStyle(root).color, { context, at } = drawAxes(plot, width, height, colour, titles, ticks);
    const line = (points) => {
      context.beginPath();
      points.filter((p) => y !== "precision" || p.found + p.made_up).forEach((p) => context.lineTo(...at(p[x], p[y])));
      context.stroke();
    };
    Object.assign(context, { globalAlpha: 0.35, lineWidth: 1 });
    scores.forEach((points, other) => { if (other !== m) line(points); });
    Object.assign(context, { globalAlpha: 1, lineWidth: 2 });
    line(scores[m]);
    const place = (k) => at(scores[m][k][x], scores[m][k][y]);
    if (name in chosen) {
      const [u, v] = place(grid.indexOf(chosen[name]));
      context.beginPath();
      for (const [du, dv] of [[0, -8], [8, 0], [0, 8], [-8, 0]]) context.lineTo(u + du, v + dv);
      context.closePath();
      context.stroke();
    }
    context.beginPath();
    context.arc(...place(now(name)), 4.5, 0, 7);
    context.fill();
    const p = scores[m][now(name)];
    curve.setAttribute("aria-label", `${model.get("curve")} of ${name}: ${titles[0]} ${byStep ? write(grid[now(name)]) : p[x].toFixed(3)}, ${titles[1]} ${p[y].toFixed(3)}`);
  }

  // ------------------------------------------------------------------------------------------------------- numbers
  /** Say how the threshold of a method was found, if that can be told. */
  function judge(name, m) {
    const k = now(name), t = write(grid[k]), fair = grid.indexOf(chosen[name]);
    if (k === fair) return `${t} was chosen on validation cases. That is fair.`;
    if (!ties[m].includes(k)) return "";
    const other = fair < 0 ? "" : ` The threshold chosen on validation cases, ${write(chosen[name])}, has Dice ${percent(scores[m][fair].dice)} here.`;
    return `${t} has the best Dice on ${these}. To choose it for that is cheating: a threshold must not be judged on the cases that it was chosen on. Expect less on new cases.${other}`;
  }

  function draw() {
    panels.forEach((panel, m) => {
      const { name, slider, verdict } = panel, text = judge(name, m), k = now(name), s = scores[m][k], voxels = (n) => n.toLocaleString("en").replaceAll(",", "\u202f");
      panel.told.textContent = `above ${write(grid[k])}: Dice ${percent(s.dice)}`;
      if (verdict.textContent !== text) verdict.textContent = text; // so that it is not read out again
      slider.value = k;
      slider.setAttribute("aria-valuetext", `${write(grid[k])}, Dice ${percent(s.dice)}`);
      tell(panel.numbers, [["sensitivity", percent(s.sensitivity)], ["missed", voxels(s.missed)], ["precision", percent(s.precision)], ["made up", voxels(s.made_up)],
        ["specificity", percent(s.specificity, 2)], ["found", voxels(s.found)]]);
      drawCurve(panel, m);
    });
    const { start, shape } = cases[hereNumber()];
    Object.assign(slice, { min: start[plane.cut], max: start[plane.cut] + shape[plane.cut] - 1 });
    slice.value = model.get("index");
    sliceNumber.textContent = `${model.get("index")} / ${slice.max}`;
    together.checked = model.get("shared");
    for (const one of choices) one.show();
    drawPictures();
  }

  const slice = makeRange(`${plane.name} slice`, () => turn(slice.value - model.get("index"))), sliceNumber = make("span", { class: "number" });
  const together = make("input", { type: "checkbox", onchange: () => { set("shared", together.checked); if (together.checked) choose(methods[0], now(methods[0])); } });
  const choices = [makeChoice(model, "Case", "case", cases.map((c) => c.title)), makeChoice(model, "Curve", "curve", Object.keys(scene.curves))];
  choices[0].select.addEventListener("change", () => set("index", cases[hereNumber()].index));
  choices[0].box.hidden = cases.length === 1;
  const swatch = (name) => make("li", {}, make("i", { class: "line", style: `background: ${colours[name]}` }), name);
  const marks = [make("li", {}, "● present threshold"), ...(Object.keys(chosen).length ? [make("li", {}, "◇ chosen on validation cases")] : []), ...(methods.length > 1 ? [make("li", {}, "thin: the other methods")] : [])];
  const about = make("li", {}, cases.length > 1 ? `Numbers: all slices of ${cases.length} cases, means of the scores and sums of the voxels` : "Numbers: all slices");
  const root = make("div", { class: "medseg-operating", role: "group", "aria-label": `Thresholds: ${methods.join(", ")}` },
    make("div", { class: "toolbar" }, ...choices.map((c) => c.box), make("label", {}, make("span", {}, `${plane.name} slice`), slice, sliceNumber), ...(methods.length > 1 ? [make("label", {}, together, "One threshold for all")] : [])),
    make("div", { class: "panels", style: `--count: ${methods.length}` }, ...panels.map((p) => p.box)), make("ul", { class: "key", "aria-label": "Outlines and marks" }, swatch("truth"), swatch("prediction"), ...marks, about),
    makeHelp(`Found, missed and made up are numbers of voxels. A voxel is predicted where its probability is above the threshold. Slider, or left and right arrow keys on a picture: threshold. Click or drag in a curve: threshold. `
      + "Page Up and Page Down on a picture, or the wheel after a click: slice. The scale of thresholds is stretched below 0.01 and above 0.99."));
  const listeners = Object.fromEntries(["thresholds", "shared", "case", "index", "curve"].map((name) => [name, draw]));
  const leave = mount(model, el, root, listeners, { resized: draw });
  draw();
  return leave;
}
