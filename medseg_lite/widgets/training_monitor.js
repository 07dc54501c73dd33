// Training monitor: curves of the run, and one slice as the network segmented it after so many updates.

function render({ model, el }) {
  const scene = model.get("_scene"), [rows, columns] = scene.size, size = [1, rows, columns], plane = { cut: 0, x: 2, y: 1 };
  const LINES = [["#0072B2", []], ["#D55E00", [7, 4]], ["#009E73", [2, 3]], ["#CC79A7", [9, 3, 2, 3]], ["#E69F00", [4, 2]], ["#56B4E9", [12, 3]]];
  const colours = new Uint32Array(256), unpacked = new Map(); // step -> classes
  for (const [value, , colour] of scene.classes) colours[value] = pixel(colour);
  const truthColours = Uint32Array.from({ length: 256 }, (_, k) => (k ? pixel("#ffffff") : 0));
  let image = null, truth = null;

  const set = setter(model);
  const frames = () => model.get("_frames");
  const shown = () => (model.get("frame") < 0 ? frames().length - 1 : model.get("frame"));

  // The shared functions draw volumes, whose axes run against the picture's.
  const turned = async (packed) => (await unpack(packed)).reverse();

  const loss = make("canvas"), scores = make("canvas"), picture = make("canvas");
  const lossBox = make("figure", {}, make("figcaption", {}, "loss by update"), make("div", { class: "plot", "data-view": "loss" }, loss));
  const legend = make("ul", { class: "key" });
  const scoresBox = make("figure", {}, make("figcaption", {}, "validation by update"), make("div", { class: "plot", "data-view": "scores" }, scores), legend);
  const stage = make("div", { class: "stage", "data-view": "picture", role: "img", "aria-label": scene.place }, picture);
  const slider = makeRange("Picture", () => set("frame", +slider.value === frames().length - 1 ? -1 : +slider.value), { min: 0 });
  const opacity = makeOpacity(model, "Opacity of the colours");
  const caption = make("output", { class: "caption", "aria-live": "off" });
  const classes = make("ul", { class: "key", "aria-label": "Classes" }, ...scene.classes.map(([, name, colour]) =>
    make("li", {}, make("i", { style: `background: ${colour}` }), name)), ...(scene.truth ? [make("li", {}, make("i", { class: "line" }), "truth")] : []));
  const root = make("div", { class: "medseg-monitor", role: "group", "aria-label": `Training monitor: ${scene.title}` },
    make("div", { class: "row" }, make("div", { class: "plots" }, lossBox, scoresBox),
      make("figure", { class: "view" }, make("figcaption", {}, scene.place), stage, make("div", { class: "controls" }, slider, caption, make("label", {}, "Opacity", opacity)), classes)));

  function nice(low, high) { // three to six round numbers within a range
    const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
    const ticks = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step / 1e6; t += step) ticks.push(Number(t.toPrecision(6)));
    return ticks;
  }

  function plot(canvas, curves, unit) {
    const width = canvas.parentElement.clientWidth || 420, height = 150, left = 40, bottom = 20, top = 6;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = fit(canvas, width, height), text = getComputedStyle(root).color;
    const all = Object.values(curves).flat();
    if (!all.length) return;
    const last = Math.max(...all.map(([s]) => s), 2), values = all.map(([, v]) => v);
    let low = Math.min(0, ...values), high = unit && Math.max(...values) <= 1 ? 1 : Math.max(...values);
    if (high <= low) high = low + 1;
    const x = (s) => left + ((s - 1) / (last - 1)) * (width - left - 8), y = (v) => top + (1 - (v - low) / (high - low)) * (height - bottom - top);
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: text, strokeStyle: text, lineWidth: 1, textBaseline: "middle", textAlign: "right" });
    for (const t of nice(low, high)) {
      context.globalAlpha = 0.15;
      context.fillRect(left, Math.round(y(t)), width - left - 8, 1);
      context.globalAlpha = 1;
      context.fillText(short(t), left - 6, y(t));
    }
    Object.assign(context, { textBaseline: "alphabetic", textAlign: "center" });
    for (const t of nice(1, last).filter((n) => Number.isInteger(n))) context.fillText(t, clamp(x(t), left, width - 14), height - 5);
    Object.values(curves).forEach((points, n) => {
      const [colour, dash] = LINES[n % LINES.length];
      Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: 1.8 });
      context.setLineDash(dash);
      context.beginPath();
      points.forEach(([s, v], i) => (i ? context.lineTo(x(s), y(v)) : context.moveTo(x(s), y(v))));
      context.stroke();
      context.setLineDash([]);
      if (points.length <= 25) for (const [s, v] of points) { context.beginPath(); context.arc(x(s), y(v), 2.5, 0, 7); context.fill(); }
    });
    const frame = frames()[shown()];
    if (frame) {
      Object.assign(context, { fillStyle: text });
      context.globalAlpha = 0.5;
      context.fillRect(x(frame.step), top, 1, height - bottom - top);
      context.globalAlpha = 1;
    }
  }

  function drawCurves() {
    const { loss: losses = [], ...others } = model.get("_curves"), names = Object.keys(others);
    plot(loss, { loss: losses }, false);
    scoresBox.hidden = !names.length;
    if (names.length) plot(scores, others, true);
    legend.replaceChildren(...names.map((name, n) => make("li", {}, make("i", { style: `background: ${LINES[n % LINES.length][0]}` }), name.replaceAll("_", " "))));
  }

  async function drawPicture() {
    if (!image) return;
    const frame = frames()[shown()];
    slider.max = Math.max(frames().length - 1, 0);
    slider.value = shown();
    slider.disabled = frames().length < 2;
    opacity.value = model.get("opacity");
    if (frame && !unpacked.has(frame.step)) unpacked.set(frame.step, await turned(frame.data));
    if (frame !== frames()[shown()]) return; // a newer one came meanwhile
    const width = stage.clientWidth || 300, height = (width * rows * scene.aspect) / columns;
    stage.style.aspectRatio = `${columns} / ${rows * scene.aspect}`;
    const context = fit(picture, width, height);
    stamp(context, sliceImage(image, size, 0, plane, 0, greyTable(scene.grey)), 0, 0, width, height);
    if (frame) {
      context.globalAlpha = model.get("opacity");
      stamp(context, sliceImage(unpacked.get(frame.step), size, 0, plane, 0, colours), 0, 0, width, height);
      context.globalAlpha = 1;
    }
    if (truth) stamp(context, outlineImage(truth, size, plane, 0, truthColours), 0, 0, width, height);
    caption.textContent = frame ? `after ${frame.step} update${frame.step === 1 ? "" : "s"}`
      + (frame.dice === null ? "" : `: Dice of this slice ${(100 * frame.dice).toFixed(0)} %`) : "no update yet";
    root.dataset.shown = frame ? frame.step : 0;
  }

  function draw() { drawCurves(); drawPicture(); }
  const leave = mount(model, el, root, { _curves: drawCurves, _frames: draw, frame: draw, opacity: drawPicture }, { resized: draw });
  Promise.all([turned(scene.image), scene.truth ? turned(scene.truth) : null]).then(async ([grey, label]) => {
    image = grey;
    truth = label?.map((k) => (k ? 1 : 0));
    drawCurves();
    await drawPicture();
    root.dataset.ready = "true";
  });
  return leave;
}
