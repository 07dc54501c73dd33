// Vote tree: votes of several networks fall down a tree of three questions. All scores follow from a histogram of votes and truth.

/** Return the class, 0 to 3, that the tree gives votes for tumour, core and enhancing core of `n` networks, as ensembles.hierarchical_vote does. */
function decide([tumour, core, enhancing], n, [one, two, three]) {
  if (!tumour || tumour < one * n - 1e-9) return 0;
  if (core < two * tumour - 1e-9) return 2;
  return enhancing >= three * core - 1e-9 ? 3 : 1;
}

/** Count the votes of maps of classes in each voxel, as one number with three digits to the base of networks + 1: tumour, core, enhancing core. */
function countVotes(maps) {
  const base = maps.length + 1, one = [0, base * base + base, base * base, base * base + base + 1], codes = new Uint16Array(maps[0].length);
  for (const map of maps) for (let i = 0; i < codes.length; i++) codes[i] += one[map[i]];
  return codes;
}
/** Return the class for each number of `countVotes`. */
const tabulate = (n, thresholds) => Uint8Array.from({ length: (n + 1) ** 3 }, (_, code) => decide([Math.floor(code / (n + 1) ** 2), Math.floor(code / (n + 1)) % (n + 1), code % (n + 1)], n, thresholds));

/** Return Dice, sensitivity and specificity of each region from the numbers of voxels with the same votes and truth. */
function score({ histogram, regions, names }, thresholds) {
  return Object.values(regions).map((members) => {
    const counts = [0, 0, 0, 0], ratio = (part, whole, empty) => (whole ? part / whole : empty); // true and false negatives, false and true positives
    for (const [tumour, core, enhancing, truth, voxels] of histogram)
      counts[2 * members.includes(decide([tumour, core, enhancing], names.length, thresholds)) + members.includes(truth)] += voxels;
    const [tn, fn, fp, tp] = counts;
    return [ratio(2 * tp, 2 * tp + fp + fn, 1), ratio(tp, tp + fn, fp ? 0 : 1), ratio(tn, tn + fp, 1)];
  });
}

function render({ model, el }) {
  const scene = model.get("_scene"), { names, questions, classes, colours, single, lowest, paper, shape, start, spacing } = scene, set = setter(model), n = names.length, regions = Object.keys(scene.regions), members = Object.values(scene.regions);
  const nav = navigate(model, scene), { planeNow, move, moveTo, pointAt, at } = nav, plane = planeNow(), size = [shape[0], shape[1], 1];
  const fill = Uint32Array.from({ length: 256 }, (_, k) => (k && k < 4 ? pixel(colours[k], 155) : 0)), rest = [classes[0], classes[2], classes[1]];
  const percent = (x) => `${(100 * x).toFixed(1)} %`, three = (x) => x.toFixed(3), now = () => model.get("thresholds");
  const choose = (k, value) => set("thresholds", now().map((t, i) => (i === k ? clamp(value, lowest, 1) : t)));
  let image = null, truth = null, maps = null, codes = null, shown = null;

  // -------------------------------------------------------------------------------------------------- slice and tree
  const canvas = make("canvas"), stage = make("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": "vote" }, canvas);
  drag(stage, (event) => moveTo(pointAt(stage, event)));
  steer(stage, planeNow, shape, move);
  const slice = makeSlice(model, scene, nav);
  slice.box.prepend(make("span", {}, "Slice"));
  const chip = (network, kinds) => {
    const kind = kinds[network];
    return make("i", { class: `chip${kind ? "" : " none"}`, style: kind ? `background: ${colours[kind]}` : "", title: `${names[network]}: ${classes[kind]}` }, String(network + 1));
  };
  const top = make("div", { class: "top", "aria-hidden": "true" });
  const nodes = questions.map((question, k) => {
    const told = make("span", { class: "number" }), no = make("div", { class: "chips", "aria-hidden": "true" }), yes = make("div", { class: "chips", "aria-hidden": "true" });
    const slider = makeRange(`Threshold of ${question}`, () => choose(k, +slider.value), { min: lowest, max: 1, step: 0.01 }), number = make("span", { class: "number" });
    const leaf = (name, chips, text) => make("div", { class: `leaf ${name}` }, make("small", {}, text), chips);
    const row = make("li", { style: `--depth: ${k}` }, make("div", { class: "ask" }, make("b", {}, `${question}?`), told),
      make("div", { class: "ways" }, leaf("no", no, `no: ${rest[k]}`), leaf("yes", yes, k < 2 ? "yes: asked further" : `yes: ${classes[3]}`)),
      make("label", {}, make("span", {}, "threshold"), slider, number));
    return { told, no, yes, slider, number, row };
  });
  const verdict = make("output", { class: "verdict", "aria-live": "polite", "aria-label": "The voxel" });

  function drawSlice() {
    const position = model.get("position"), index = position[plane.cut] - start[plane.cut], depth = shape[plane.cut], table = tabulate(n, now());
    const merged = Uint8Array.from({ length: shape[0] * shape[1] }, (_, i) => table[codes[i * depth + index]]);
    const aspect = spacing[plane.y] / spacing[plane.x], width = stage.clientWidth || 300, height = (width * shape[plane.y] * aspect) / shape[plane.x];
    stage.style.aspectRatio = `${shape[plane.x]} / ${shape[plane.y] * aspect}`;
    const context = fit(canvas, width, height), scale = [width / shape[plane.x], height / shape[plane.y]];
    stamp(context, sliceImage(image, shape, 0, plane, index, greyTable(scene.sequences[0])), 0, 0, width, height);
    stamp(context, sliceImage(merged, size, 0, plane, 0, fill), 0, 0, width, height);
    drawOutline(context, [truth, shape, plane, index], scale, scene.truth, "line");
    drawCrosshair(context, plane, position, scene, width, height, "rgb(255 255 255 / 55%)");
    drawLetters(context, plane, width, height);
    stage.setAttribute("aria-label", `Axial slice ${position[plane.cut]} with the merged vote and the outline of the truth. Arrow keys choose another voxel, Page Up and Page Down another slice.`);
  }
  function drawTree() {
    const position = model.get("position"), place = at(position), kinds = maps.map((map) => map[place]), result = tabulate(n, now())[codes[place]], falls = shown !== null && shown !== place;
    top.replaceChildren(make("small", {}, "votes"), ...kinds.map((_, network) => chip(network, kinds)));
    let asked = true, here = [...kinds.keys()];
    nodes.forEach(({ told, no, yes, slider, number, row }, k) => {
      const answer = asked && members[k].includes(result), stay = here.filter((network) => members[k].includes(kinds[network])), written = now()[k].toFixed(2);
      row.className = !asked ? "skipped" : answer ? "says-yes" : "says-no";
      told.textContent = asked ? `${stay.length} of ${here.length} = ${short(stay.length / here.length)} ${answer ? "≥" : "<"} ${written}` : "not asked";
      no.replaceChildren(...(asked ? here.filter((network) => !stay.includes(network)) : []).map((network) => chip(network, kinds)));
      yes.replaceChildren(...(asked ? stay : []).map((network) => chip(network, kinds)));
      slider.value = now()[k];
      number.textContent = written;
      if (falls) for (const one of row.querySelectorAll(".chip")) { one.classList.add("falls"); one.style.animationDelay = `${0.3 * k}s`; }
      [asked, here] = [answer, stay];
    });
    shown = place;
    const text = `Voxel ${position.join(", ")}: the tree says ${classes[result]}; the truth is ${classes[truth[place]]}. ${kinds.map((kind, k) => `${k + 1} ${names[k]}: ${classes[kind]}`).join("; ")}.`;
    if (verdict.textContent !== text) verdict.textContent = text;
  }

  // ---------------------------------------------------------------------------------------------------------- curves
  const upTo = (last) => Array.from({ length: last }, (_, a) => a + 1); // thresholds that make a difference: shares of all votes, or of fewer, on the steps of the sliders
  const shares = (whole) => [...new Set(whole.flatMap((b) => upTo(b).map((a) => Math.floor((100 * a) / b + 1e-9) / 100)))].sort((a, b) => a - b), levels = [[n], upTo(n), upTo(n)].map(shares);
  const scored = (k, t) => score(scene, now().map((old, i) => (i === k ? t : old)))[k];
  const panels = regions.map((region, k) => {
    const canvas = make("canvas"), plot = make("div", { class: "plot", role: "img", "data-view": `curve${k}` }, canvas), told = make("span", { class: "number" }), fact = make("div", { class: "fact" });
    return { canvas, plot, told, fact, box: make("figure", {}, make("figcaption", {}, make("b", {}, region), told), plot, fact) };
  });
  /** Draw sensitivity against specificity of region `k` as its threshold moves, the single networks, and the point of now. */
  function drawCurve(k, here) {
    const { canvas, plot, told, fact } = panels[k], line = levels[k].map((t) => scored(k, t)), others = single.map((s) => s[k]), width = plot.clientWidth || 240, right = width - 8, foot = 116;
    const [side, up] = [2, 1].map((i) => { const all = [...line, ...others].map((p) => p[i]), low = Math.min(...all); return [low, Math.max(...all) - low || 1]; });
    const context = fit(canvas, width, 150), colour = getComputedStyle(root).color, place = (p) => [44 + ((p[2] - side[0]) / side[1]) * (right - 52), 14 + (1 - (p[1] - up[0]) / up[1]) * (foot - 22)];
    const write = (text, x, y, textAlign) => { context.textAlign = textAlign; context.fillText(text, x, y); };
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "middle", globalAlpha: 0.3 });
    context.strokeRect(36, 6, right - 36, foot - 6);
    context.globalAlpha = 1;
    for (const share of [0, 1]) {
      write((up[0] + share * up[1]).toFixed(2), 32, share ? 14 : foot - 8, "right");
      write((side[0] + share * side[1]).toFixed(3), share ? right : 36, foot + 9, share ? "right" : "left");
    }
    write("specificity →, sensitivity ↑", (36 + right) / 2, foot + 25, "center");
    const stroke = (points) => { context.beginPath(); for (const p of points) context.lineTo(...p); context.stroke(); };
    stroke(line.map(place));
    for (const [x, y] of line.map(place)) context.fillRect(x - 2, y - 2, 4, 4);
    for (const [x, y] of others.map(place)) stroke([[x, y - 5], [x + 4.5, y + 3.5], [x - 4.5, y + 3.5], [x, y - 5]]);
    context.beginPath();
    context.arc(...place(here), 6, 0, 7);
    context.fill();
    const [dice, sensitivity, specificity] = [three(here[0]), percent(here[1]), percent(here[2])];
    told.textContent = `Dice ${dice}`;
    fact.textContent = `sensitivity ${sensitivity}, specificity ${specificity}; mean Dice of the networks ${three(others.reduce((sum, p) => sum + p[0], 0) / n)}`;
    plot.setAttribute("aria-label", `${regions[k]}: sensitivity ${sensitivity}, specificity ${specificity}, on the curve as its threshold moves`);
    nodes[k].slider.setAttribute("aria-valuetext", `${now()[k].toFixed(2)}, Dice of ${regions[k]} ${dice}`);
  }

  function draw() {
    if (!codes) return;
    slice.show();
    drawSlice();
    drawTree();
    score(scene, now()).forEach((scores, k) => drawCurve(k, scores));
    root.dataset.ready = "true";
  }
  const swatch = (name, k) => make("li", {}, make("i", { style: `background: ${colours[k]}` }), name);
  const root = make("div", { class: "medseg-votes", role: "group", "aria-label": `Votes of ${n} networks on ${scene.title}` },
    make("div", { class: "toolbar" }, slice.box, make("button", { type: "button", onclick: () => set("thresholds", [...paper]) }, "The paper's thresholds")),
    make("div", { class: "both" }, make("div", { class: "left" }, stage, make("ul", { class: "key", "aria-label": "Colours" }, ...classes.map(swatch).slice(1), make("li", {}, make("i", { class: "line", style: `background: ${scene.truth}` }), "truth"))),
      make("div", { class: "right" }, top, make("ol", { class: "tree", "aria-label": "The questions" }, ...nodes.map((node) => node.row)), verdict)),
    make("div", { class: "panels" }, ...panels.map((panel) => panel.box)),
    makeHelp("Click the slice, or arrow keys on it: another voxel. Page Up and Page Down, or the wheel after a click: another slice. A chip is a network's vote, in the colour of its class; a dashed one says background. "
      + "A question counts only the votes that came down to it. Scores are those of the whole case. Triangles: single networks. The disc: the thresholds as they are."));
  const leave = mount(model, el, root, { thresholds: draw, position: draw }, { resized: draw });
  Promise.all(model.get("_volumes").map(unpack)).then((all) => { [image, truth, ...maps] = all; codes = countVotes(maps); draw(); });
  return leave;
}
