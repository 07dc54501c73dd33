// V_rand explorer: segments of a membrane map, grown and scored here as metrics.v_rand and metrics.v_info do it in Python.

/** Number the 4-connected segments of a mask of `wide` columns from 1; outside them stands 0. */
function numberSegments(inside, wide) {
  const numbers = new Int32Array(inside.length), open = [];
  let count = 0;
  for (let first = 0; first < inside.length; first++) {
    if (!inside[first] || numbers[first]) continue;
    numbers[first] = ++count;
    for (open.push(first); open.length;) {
      const here = open.pop(), column = here % wide;
      for (const next of [here - wide, here + wide, ...(column ? [here - 1] : []), ...(column < wide - 1 ? [here + 1] : [])])
        if (inside[next] && !numbers[next]) { numbers[next] = count; open.push(next); }
    }
  }
  return { numbers, count };
}

/** Let segments grow in step until lines one pixel wide, numbered 0, are left. Pixel by pixel the order is that of scikit-image's
    watershed with lines, whose heap does not keep the order of equal elements, so the heap is the same here. */
function growSegments(numbers, wide) {
  const tall = numbers.length / wide, row = wide + 2, grown = new Int32Array(row * (tall + 2)), free = new Uint8Array(grown.length);
  const around = [-row, -1, 1, row], heap = [], age = [], place = [], source = [];
  let pushed = 0, count = 0; // elements ever pushed, which the heap names by their number, and those that are in it
  const swap = (a, b) => { const name = heap[a]; heap[a] = heap[b]; heap[b] = name; };
  function push(old, at, from) {
    age[pushed] = old;
    place[pushed] = at;
    source[pushed] = from;
    let k = count++;
    heap[k] = pushed++;
    for (let up = (k - 1) >> 1; k && age[heap[k]] < age[heap[up]]; k = up, up = (k - 1) >> 1) swap(k, up);
  }
  function pop() {
    swap(0, --count);
    for (let k = 0, left = 1; left < count; left = 2 * k + 1) {
      let least = age[heap[left]] < age[heap[k]] ? left : k;
      if (left + 1 < count && age[heap[left + 1]] < age[heap[least]]) least = left + 1;
      if (least === k) break;
      swap(k, least);
      k = least;
    }
    return heap[count];
  }
  for (let v = 0; v < tall; v++)
    for (let u = 0; u < wide; u++) {
      const at = (v + 1) * row + u + 1;
      free[at] = 1;
      if ((grown[at] = numbers[v * wide + u])) push(0, at, at);
    }
  for (let time = 1; count;) {
    const name = pop(), at = place[name], from = source[name], number = grown[from];
    if (grown[at] && at !== from) continue; // another neighbour was here first
    for (const step of around) if (free[at + step] && grown[at + step] && grown[at + step] !== number) free[at] = 0; // a line
    if (free[at]) grown[at] = number;
    for (const step of around) if (free[at + step] && !grown[at + step]) push(++time, at + step, from);
  }
  return numbers.map((_, k) => grown[(Math.floor(k / wide) + 1) * row + (k % wide) + 1]);
}

/** Return V_rand and V_info of grown segments against true cells, both numbered. Each pixel of a line is a segment of its own. */
function scorePartition(grown, cells) {
  const joint = new Map(), found = new Map(), truth = new Map(), add = (map, key) => map.set(key, (map.get(key) ?? 0) + 1), many = cells.length + 1;
  let n = 0, lines = 0;
  cells.forEach((cell, k) => {
    if (!cell) return;
    n++;
    add(truth, cell);
    if (!grown[k]) return lines++;
    add(found, grown[k]);
    add(joint, cell * many + grown[k]);
  });
  const squares = (map) => [...map.values()].reduce((sum, c) => sum + (c / n) ** 2, 0), entropy = (map) => [...map.values()].reduce((sum, c) => sum - (c / n) * Math.log(c / n), 0);
  const ofLines = lines / n ** 2, alone = (lines / n) * Math.log(n), both = entropy(truth) + entropy(found) + alone;
  const rand = (2 * (squares(joint) + ofLines)) / (squares(truth) + squares(found) + ofLines);
  return { rand, info: both > 0 ? (2 * (both - entropy(joint) - alone)) / both : 1 };
}

/** Return the sets of true cells that are merged and that are split, and of segments that merge. */
function findFaults(segments, cells, [share, fewest]) {
  const shared = Array.from({ length: cells.count + 1 }, () => new Map()), sizes = new Int32Array(cells.count + 1), faults = { merged: new Set(), split: new Set(), merging: new Set() };
  cells.numbers.forEach((cell, k) => { sizes[cell]++; shared[cell].set(segments.numbers[k], (shared[cell].get(segments.numbers[k]) ?? 0) + 1); });
  const holders = Array.from({ length: segments.count + 1 }, () => []);
  shared.forEach((of, cell) => {
    const parts = cell ? [...of].filter(([segment, c]) => segment && c >= Math.max(share * sizes[cell], fewest)) : [];
    if (parts.length > 1) faults.split.add(cell);
    for (const [segment] of parts) holders[segment].push(cell);
  });
  holders.forEach((of, segment) => { if (of.length > 1) { faults.merging.add(segment); of.forEach((cell) => faults.merged.add(cell)); } });
  return faults;
}

function render({ model, el }) {
  const scene = model.get("_scene"), { shape, plane, grid, curve, names, colours, part, truth } = scene, set = setter(model), [rows, wide] = shape;
  const size = [rows, wide, 1], palette = scene.segments, grey = greyTable(scene), three = (x) => x.toFixed(3);
  let image = null, levels = null, cells = null, known = null, cursor = [rows >> 1, wide >> 1], from = null, former = "";
  const step = () => grid.reduce((best, t, k) => (Math.abs(t - model.get("threshold")) < Math.abs(grid[best] - model.get("threshold")) ? k : best), 0);

  /** Compute segments, scores and faults for the present threshold and brush. */
  function compute() {
    const k = step(), inside = levels.map((level) => level > k);
    for (const [d, h, value] of model.get("edits")) inside[d * wide + h] = value;
    const segments = numberSegments(inside, wide), grown = growSegments(segments.numbers, wide), faults = findFaults(segments, cells, part);
    let both = 0, either = 0;
    inside.forEach((i, n) => { both += !i && !cells.numbers[n]; either += !i + !cells.numbers[n]; });
    known = { inside, segments, grown, faults, scores: scorePartition(grown, cells.numbers), dice: either ? (2 * both) / either : 1 };
  }

  // -------------------------------------------------------------------------------------------------------- pictures
  function drawPicture() {
    if (!known) return;
    const { inside, segments, grown, faults } = known, alpha = model.get("opacity"), width = stage.clientWidth || 400, height = (width * shape[plane.y]) / shape[plane.x], scale = [width / shape[plane.x], height / shape[plane.y]];
    stage.style.aspectRatio = `${shape[plane.x]} / ${shape[plane.y]}`;
    const [context, over] = [canvas, flash].map((c) => fit(c, width, height));
    stamp(context, sliceImage(image, size, 0, plane, 0, grey), 0, 0, width, height);
    const painted = Uint8Array.from(grown, (g, n) => g && 1 + 2 * (g % palette.length) + !inside[n]); // pale where a segment grew
    const look = [0, ...palette.flatMap((colour) => [1, 0.45].map((share) => pixel(colour, Math.round(255 * alpha * share))))];
    stamp(context, sliceImage(painted, size, 0, plane, 0, look), 0, 0, width, height);
    stamp(over, sliceImage(Uint8Array.from(segments.numbers, (n) => faults.merging.has(n)), size, 0, plane, 0, [0, pixel(colours.merged, 190)]), 0, 0, width, height);
    const numbered = Uint8Array.from(cells.numbers), line = (target, set, colour, style) => drawBorders(target, borders(numbered, size, plane, 0, (a, b) => a !== b && (set.has(a) || set.has(b))), scale, colour, style);
    line(context, faults.merged, colours.merged);
    line(context, faults.split, colours.split, { style: "dashes" });
    const half = (model.get("brush") - 1) / 2, [u, v] = [shape[plane.x] - 1 - cursor[plane.x], shape[plane.y] - 1 - cursor[plane.y]];
    Object.assign(context, { strokeStyle: truth, lineWidth: 1.5 });
    context.strokeRect((u - half) * scale[0], (v - half) * scale[1], (2 * half + 1) * scale[0], (2 * half + 1) * scale[1]);
    const merged = [...faults.merged].join();
    if (merged !== former) { // flash anew, a few times; then the outlines tell
      flash.classList.remove("flashing");
      void flash.offsetWidth;
      if (merged) flash.classList.add("flashing");
    }
    former = merged;
  }
  function drawCurve() {
    const width = plot.clientWidth || 280, height = 130, left = 8, right = 8, top = 6, tall = height - 28, context = fit(curves, width, height), colour = getComputedStyle(root).color;
    const at = (k, y) => [left + (k / (grid.length - 1)) * (width - left - right), top + (1 - y) * tall];
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "top", lineWidth: 1.5 });
    for (const y of [0, 0.5, 1]) { context.globalAlpha = 0.2; context.fillRect(left, Math.round(at(0, y)[1]), width - left - right, 1); }
    context.globalAlpha = 1;
    for (const [k, align] of [[0, "left"], [25, "center"], [50, "right"]]) { context.textAlign = align; context.fillText(grid[k], at(k, 0)[0], top + tall + 5); }
    Object.keys(curve).forEach((name, n) => {
      context.setLineDash(n ? [5, 4] : []);
      context.beginPath();
      curve[name].forEach((y, k) => context.lineTo(...at(k, y)));
      context.stroke();
      context.setLineDash([]);
      const now = known.scores[name.slice(2)];
      context.beginPath();
      context.arc(...at(step(), now), 4, 0, 7);
      if (n) context.stroke(); else context.fill();
    });
    plot.setAttribute("aria-label", `Against the threshold, without the brush: ${Object.keys(curve).map((name) => `${names[name]} at most ${three(Math.max(...curve[name]))}`).join(", ")}`);
  }

  function draw() {
    if (!levels) return;
    compute();
    const { scores, dice, faults } = known, t = grid[step()];
    threshold.value = step();
    threshold.setAttribute("aria-valuetext", String(t));
    told.threshold.textContent = t.toFixed(2);
    brush.value = model.get("brush");
    told.brush.textContent = `${brush.value} pixels`;
    opacity.value = model.get("opacity");
    tool.show();
    clear.disabled = !model.get("edits").length;
    tell(readout, [["V_rand", three(scores.rand)], ["V_info", three(scores.info)], [names.dice, three(dice)], [names.merged, faults.merged.size], [names.split, faults.split.size],
      ["segments", known.segments.count], ["true cells", cells.count], ["pixels changed by the brush", model.get("edits").length]]);
    drawPicture();
    drawCurve();
    root.dataset.ready = "true";
  }

  // -------------------------------------------------------------------------------------------------------- controls
  /** Paint squares along a line from the last place to a new one. */
  function stroke(to, start = to) {
    const value = +(model.get("tool") === "open a gap"), half = (model.get("brush") - 1) / 2, edits = new Map(model.get("edits").map((e) => [e[0] * wide + e[1], e]));
    const steps = Math.max(1, ...to.map((p, axis) => Math.abs(p - start[axis])));
    for (let s = 0; s <= steps; s++) {
      const [d, h] = to.map((p, axis) => Math.round(start[axis] + ((p - start[axis]) * s) / steps));
      for (let i = Math.max(0, d - half); i <= Math.min(rows - 1, d + half); i++)
        for (let j = Math.max(0, h - half); j <= Math.min(wide - 1, h + half); j++) edits.set(i * wide + j, [i, j, value]);
    }
    cursor = to;
    set("edits", [...edits.values()]);
  }
  const canvas = make("canvas"), flash = make("canvas", { class: "flash", "aria-hidden": true });
  const stage = make("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": "segments",
    "aria-label": "Slice with coloured segments. Arrow keys move the brush, the space bar paints." }, canvas, flash);
  drag(stage, (event) => {
    const r = stage.getBoundingClientRect(), to = [0, 0];
    to[plane.x] = clamp(shape[plane.x] - 1 - Math.floor(((event.clientX - r.left) / r.width) * shape[plane.x]), 0, rows - 1);
    to[plane.y] = clamp(shape[plane.y] - 1 - Math.floor(((event.clientY - r.top) / r.height) * shape[plane.y]), 0, wide - 1);
    stroke(to, event.type === "pointermove" && from ? from : to);
    from = event.type === "pointerup" ? null : to;
  });
  stage.addEventListener("pointercancel", () => { from = null; });
  steer(stage, () => plane, shape, (axis, by) => {
    if (axis === plane.cut) return false;
    cursor = cursor.map((c, a) => (a === axis ? clamp(c + by, 0, shape[a] - 1) : c));
    drawPicture();
  });
  stage.addEventListener("keydown", (event) => {
    if (event.key !== " " || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    stroke(cursor);
  });
  const told = { threshold: make("span", { class: "number" }), brush: make("span", { class: "number" }) };
  const threshold = makeRange("Threshold", () => set("threshold", grid[threshold.value]), { max: grid.length - 1 });
  const brush = makeRange("Width of the brush", () => set("brush", +brush.value), { min: 1, max: 11, step: 2 });
  const opacity = makeOpacity(model, "Opacity of the colours"), tool = makeChoice(model, "Brush", "tool", ["close a gap", "open a gap"]);
  const clear = make("button", { type: "button", onclick: () => set("edits", []) }, "Undo the brush");
  const curves = make("canvas"), plot = make("div", { class: "plot", role: "img", "data-view": "curve" }, curves), readout = makeReadout("Scores");
  const key = ["merged", "split"].map((name) => make("li", {}, make("i", { class: "line", style: `border-top: 3px ${name === "split" ? "dashed" : "solid"} ${colours[name]}` }), `${name} cell`));
  const root = make("div", { class: "medseg-vrand", role: "group", "aria-label": `Merged and split cells of ${scene.title}` },
    make("div", { class: "both" }, stage, make("div", { class: "side" },
      make("label", {}, make("span", {}, "Threshold"), told.threshold), threshold, plot,
      make("div", { class: "toolbar" }, tool.box, make("label", {}, brush, told.brush), clear, make("label", {}, make("span", {}, "Colours"), opacity)), readout)),
    make("ul", { class: "key", "aria-label": "Outlines and lines" }, ...key, make("li", {}, "─ ● V_rand"), make("li", {}, "┄ ○ V_info; the lines are without the brush")),
    makeHelp("Drag on the picture: paint. Arrow keys on it move the brush, with Shift ten pixels, and the space bar paints. Closing paints membrane, opening paints the inside of a cell. "
      + "Scores count the segments after they have grown until lines one pixel wide are left; pale pixels were added then. A segment merges two cells if it holds a tenth of each."));
  const leave = mount(model, el, root, { threshold: draw, edits: draw, tool: draw, brush: draw, opacity: draw }, { resized: () => { drawPicture(); if (known) drawCurve(); } });
  Promise.all(model.get("_layers").map(unpack)).then(([grey8, inside, level]) => {
    [image, levels, cells] = [grey8, level, numberSegments(inside, wide)];
    draw();
  });
  return leave;
}
