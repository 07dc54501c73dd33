// Block switchboard: the residual blocks of an FC-ResNet along its U. Python computed the prediction without each block and after each one.

const OUTCOMES = ["found", "missed", "made up"];

function render({ model, el }) {
  const scene = model.get("_scene"), { blocks, plain, alone, after, rows, shape, aspect, plane, colours } = scene, set = setter(model), count = blocks.length;
  const kernel = model.get("_kernel"), three = (x) => x.toFixed(3), size = [shape[0], shape[1], 1], grey = greyTable(scene), unpacked = new Map();
  const number = (name) => blocks.indexOf(name) + 1, same = (a, b) => a.length === b.length && a.every((x, n) => x === b[n]);
  let image = null, truth = null;

  /** Return the prediction with the blocks that are off now: its place among the pictures, or its bytes, and the Dice score. */
  function now() {
    const off = model.get("off"), kept = count - off.length;
    if (same(off, blocks.slice(kept))) return { picture: count + kept, dice: after[kept], kept };
    if (off.length === 1) return { picture: number(off[0]) - 1, dice: alone[number(off[0]) - 1] };
    const answer = model.get("_answer");
    return same(off, answer.off ?? []) ? answer : null;
  }
  async function load(picture) {
    if (!unpacked.has(picture)) unpacked.set(picture, await unpack(typeof picture === "number" ? model.get("_pictures")[picture] : picture));
    return unpacked.get(picture);
  }

  // -------------------------------------------------------------------------------------------------------- pictures
  const views = ["outcomes", "probability"].map((name) => {
    const canvas = make("canvas"), stage = make("div", { class: "stage", role: "img", "data-view": name }, canvas);
    return { canvas, stage, box: make("figure", {}, make("figcaption", {}, name === "outcomes" ? "prediction" : name), stage) };
  });
  const outcome = Uint32Array.from({ length: 256 }, (_, k) => (k ? pixel(colours[OUTCOMES[k - 1] ?? "found"], 170) : 0));
  const orange = Uint32Array.from({ length: 256 }, (_, byte) => pixel(`#${[1, 3, 5].map((k) => Math.round((parseInt(colours.probability.slice(k, k + 2), 16) * (byte >> 1)) / 127).toString(16).padStart(2, "0")).join("")}`));
  async function drawPictures() {
    const found = now(), data = found && (await load(found.picture));
    if (!image || (found && found.picture !== now()?.picture)) return; // another state by now
    const width = views[0].stage.clientWidth || 300, height = (width * shape[plane.y] * aspect) / shape[plane.x];
    panels.classList.toggle("waiting", !found);
    for (const { stage } of views) stage.style.aspectRatio = `${shape[plane.x]} / ${shape[plane.y] * aspect}`;
    const [left, right] = views.map(({ canvas }) => fit(canvas, width, height));
    stamp(left, sliceImage(image, size, 0, plane, 0, grey), 0, 0, width, height);
    if (data) {
      stamp(left, sliceImage(truth.map((t, n) => (t ? 2 - (data[n] & 1) : 3 * (data[n] & 1))), size, 0, plane, 0, outcome), 0, 0, width, height);
      stamp(right, sliceImage(data, size, 0, plane, 0, orange), 0, 0, width, height);
    }
    const text = found ? `Dice ${three(found.dice)}` : "not computed";
    views[0].stage.setAttribute("aria-label", `Slice with pixels that are found, missed and made up, ${text}`);
    views[1].stage.setAttribute("aria-label", `Probability of the class, ${text}`);
    root.dataset.ready = "true";
  }
  function drawCurve() {
    const width = plot.clientWidth || 400, height = 120, left = 46, right = 14, top = 6, tall = height - 26, context = fit(curve, width, height), colour = getComputedStyle(root).color, found = now();
    const low = Math.floor(10 * Math.min(...after)) / 10, high = Math.ceil(10 * Math.max(...after, ...alone)) / 10; // dots below stand at the lower edge
    const at = (n, y) => [left + (n / count) * (width - left - right), top + ((high - Math.max(y, low)) / (high - low || 1)) * tall];
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "middle", textAlign: "right", lineWidth: 2 });
    for (const y of [low, (low + high) / 2, high]) {
      context.globalAlpha = 0.2;
      context.fillRect(left, Math.round(at(0, y)[1]), width - left - right, 1);
      context.globalAlpha = 1;
      context.fillText(short(y), left - 8, at(0, y)[1]);
    }
    Object.assign(context, { textAlign: "center", textBaseline: "top" });
    for (let n = 0; n <= count; n += 10) context.fillText(n, at(n, 0)[0], top + tall + 5);
    context.beginPath();
    after.forEach((y, n) => context.lineTo(...at(n, y)));
    context.stroke();
    alone.forEach((y, n) => {
      const [u, v] = at(n + 1, y);
      if (y >= low) return context.fillRect(u - 1.5, v - 1.5, 3, 3);
      context.beginPath();
      for (const [du, dv] of [[-4, -7], [4, -7], [0, 0]]) context.lineTo(u + du, v + dv);
      context.fill();
    });
    if (found?.kept === undefined) return;
    context.beginPath();
    context.arc(...at(found.kept, found.dice), 5, 0, 7);
    context.fill();
  }

  // -------------------------------------------------------------------------------------------------------- controls
  const buttons = blocks.map((name, n) => {
    const cost = alone.length ? after[count] - alone[n] : 0, title = `Block ${n + 1}, ${name}; shortcut ${plain[n] ? "is the identity" : "changes size or number of maps"}; Dice ${three(alone[n])} without it alone`;
    const bar = make("i", { style: `width: ${100 * clamp(cost / Math.max(0.1, after[count]), 0, 1)}%` });
    return make("button", { type: "button", class: `block${plain[n] ? "" : " changes"}`, title, "aria-label": title, tabindex: n ? -1 : 0, onclick: () => toggle(name) }, String(n + 1), bar);
  });
  function toggle(name) {
    const off = new Set(one.checked ? model.get("off").filter((other) => other === name) : model.get("off"));
    if (!off.delete(name)) off.add(name);
    set("off", blocks.filter((b) => off.has(b)));
  }
  function press(event) { // arrow keys go from switch to switch; Tab leaves them
    const here = buttons.indexOf(event.target), step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -count, End: count }[event.key];
    if (here < 0 || !step) return;
    event.preventDefault();
    const next = buttons[clamp(here + step, 0, count - 1)];
    for (const button of buttons) button.tabIndex = button === next ? 0 : -1;
    next.focus();
  }
  const stage = (k) => make("div", {}, ...rows[k][1].map((name) => buttons[number(name) - 1])), deep = (rows.length - 1) / 2;
  const u = make("div", { class: "u", role: "group", "aria-label": "Switches of the residual blocks" },
    make("div", { class: "row" }, make("div", {}, "image → stem"), make("span", { class: "skip" }, "1"), make("div", {}, "last layers → output")),
    ...Array.from({ length: deep }, (_, k) => make("div", { class: "row" }, stage(k), make("span", { class: "skip" }, `1/${2 ** (k + 1)}`), stage(rows.length - 1 - k))),
    make("div", { class: "row across" }, stage(deep)));
  const scrub = makeRange("Read the head after block", () => set("off", blocks.slice(+scrub.value)), { class: "wide", max: count });
  const one = make("input", { type: "checkbox" }), told = make("span", { class: "number" }), readout = makeReadout("Dice"), note = make("output", { class: "note", "aria-live": "polite", "aria-label": "What is shown" });
  one.checked = !kernel;
  const curve = make("canvas"), plot = make("div", { class: "plot", role: "img", "data-view": "curve",
    "aria-label": `Dice after each block, from ${three(after[0])} without any to ${three(after[count])}; without one block alone it is ${three(Math.min(...alone))} at least` }, curve);

  function draw() {
    const off = model.get("off"), found = now();
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(!off.includes(blocks[n]))));
    if (found?.kept !== undefined) scrub.value = found.kept;
    told.textContent = found?.kept === undefined ? "–" : `${found.kept} of ${count}`;
    scrub.setAttribute("aria-valuetext", found?.kept === undefined ? "other blocks are off" : `${found.kept} of ${count}, Dice ${three(found.dice)}`);
    const what = !off.length ? "All blocks are on." : off.length === 1 ? `Block ${number(off[0])} is off, ${off[0]}; its shortcut ${plain[number(off[0]) - 1] ? "is the identity" : "changes size or number of maps"}.`
      : found?.kept !== undefined ? `Read after block ${found.kept}: the ${off.length} later ones are off.` : `Blocks ${off.map(number).join(", ")} are off.`;
    const text = found ? what : `${what} ${kernel ? "Python computes …" : "This combination needs Python: open the notebook. A page has each block alone, and every place of the slider."}`;
    if (note.textContent !== text) note.textContent = text;
    tell(readout, [["Dice", found ? three(found.dice) : "–"], ["whole network", three(after[count])], ["blocks on", `${count - off.length} of ${count}`]]);
    drawPictures();
    drawCurve();
  }
  const panels = make("div", { class: "panels" }, ...views.map((v) => v.box));
  const swatch = (name) => make("li", {}, make("i", { style: `background: ${colours[name]}` }), name);
  const root = make("div", { class: "medseg-blocks", role: "group", "aria-label": `Residual blocks, ${scene.title}` },
    u, make("div", { class: "toolbar" }, make("button", { type: "button", onclick: () => set("off", []) }, "All on"), make("label", {}, one, "One block at a time")),
    note, readout, panels,
    make("div", { class: "below" }, make("label", { class: "scrub" }, make("span", {}, "Read the head after block"), told), scrub, plot),
    make("ul", { class: "key", "aria-label": "Outlines and marks" }, ...OUTCOMES.map(swatch), make("li", {}, make("i", { class: "cost" }), "Dice lost without the block"),
      make("li", {}, "□ identity shortcut, ○ another"), make("li", {}, "line: Dice after each block; dots: without one block alone, ▾ below the scale")),
    makeHelp("Click a number: its block is off or on. Arrow keys go from block to block, the space bar switches. A block that is off hands on its input through its shortcut. "
      + "The slider switches off all blocks after one: what stands there already is read by the last layers."));
  const leave = mount(model, el, root, { off: draw, _answer: draw }, { press, resized: draw });
  Promise.all([model.get("_image"), model.get("_truth")].map(unpack)).then((both) => { [image, truth] = both; draw(); });
  return leave;
}
