// Training monitor: curves of the run, and one slice as the network segmented it after so many updates.

function render({ model, el }) {
  const scene = model.get("_scene"), [rows, columns] = scene.size, size = [1, rows, columns], plane = { cut: 0, x: 2, y: 1 };
  const LINES = [["#0072B2", []], ["#D55E00", [7, 4]], ["#009E73", [2, 3]], ["#CC79A7", [9, 3, 2, 3]], ["#E69F00", [4, 2]], ["#56B4E9", [12, 3]]];
  const colours = new Uint32Array(256), unpacked = new Map(); // step -> classes
  for (const [value, , colour] of scene.classes) colours[value] = pixel(colour);
  let image = null, truth = null;

  const set = setter(model), frames = []; // all pictures; one that this view has missed is a hole, and is asked for
  let asked = null;
  function collect() {
    const newest = model.get("_newest");
    if (newest.data) frames[newest.number] = newest;
    model.get("_frames").forEach((frame, n) => { frames[n] = frame; });
    if (!frames.includes(undefined) || asked === model.get("_frames")) return;
    asked = model.get("_frames"); // once; the kernel answers when it is free
    model.send("frames");
  }
  const shown = () => clamp(model.get("frame") < 0 ? frames.length - 1 : model.get("frame"), 0, Math.max(frames.length - 1, 0));
  const choose = (number) => set("frame", number >= frames.length - 1 ? -1 : number);

  // The shared functions draw volumes, whose axes run against the picture's.
  const turned = async (packed) => (await unpack(packed)).reverse();

  const loss = make("canvas"), scores = make("canvas"), picture = make("canvas");
  const plotBox = (view, canvas) => make("div", { class: "plot", "data-view": view, role: "img" }, canvas);
  const lossBox = make("figure", {}, make("figcaption", {}, "loss by update"), plotBox("loss", loss));
  const legend = make("ul", { class: "key" });
  const scoresBox = make("figure", {}, make("figcaption", {}, "validation by update"), plotBox("scores", scores), legend);
  const stage = make("div", { class: "stage", "data-view": "picture", role: "img", style: `aspect-ratio: ${columns} / ${rows * scene.aspect}` }, picture);
  const slider = makeRange("Picture", () => { pause(); choose(+slider.value); }, { min: 0 });
  const opacity = makeOpacity(model, "Opacity of the colours");

  // Playing steps through the pictures. Who asked for reduced motion steps by hand.
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = null;
  function pause() { clearInterval(playing); playing = null; showButton(); }
  function step() {
    choose((shown() + 1) % frames.length);
    if (shown() === frames.length - 1) pause();
  }
  function play() {
    if (playing || frames.length < 2) return pause();
    if (!still) playing = setInterval(step, 400);
    step();
    showButton();
  }
  const button = make("button", { type: "button", onclick: play });
  function showButton() {
    button.textContent = still ? "Next picture" : playing ? "Pause" : "Play";
    button.disabled = frames.length < 2;
  }

  const caption = make("output", { class: "caption", "aria-live": "off" });
  const classes = make("ul", { class: "key", "aria-label": "Classes" }, ...scene.classes.map(([, name, colour]) =>
    make("li", {}, make("i", { style: `background: ${colour}` }), name)), ...(scene.truth ? [make("li", {}, make("i", { class: "truth" }), "truth")] : []));
  const root = make("div", { class: "medseg-monitor", role: "group", "aria-label": `Training monitor: ${scene.title}` },
    make("div", { class: "row" }, make("div", { class: "plots" }, lossBox, scoresBox),
      make("figure", { class: "view" }, make("figcaption", {}, scene.place), stage, make("div", { class: "controls" }, slider, button, make("label", {}, "Opacity", opacity), caption), classes)),
    makeHelp(`Slider, or its arrow keys: choose a picture. P: ${still ? "next picture" : "play or pause"}. Click or drag in a curve: the picture nearest to that update. `
      + "The thin line in the curves marks the update of the picture."));

  function nice(low, high) { // three to six round numbers within a range
    const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
    const ticks = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step / 1e6; t += step) ticks.push(Number(t.toPrecision(6)));
    return ticks;
  }

  const LEFT = 40, RIGHT = 8, lastStep = () => Math.max(2, ...Object.values(model.get("_curves")).flat().map(([s]) => s)); // one axis for both plots

  function plot(canvas, curves, unit) {
    const { clientWidth: width, clientHeight: height } = canvas.parentElement, left = LEFT, bottom = 20, top = 6;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = fit(canvas, width, height), text = getComputedStyle(root).color;
    const all = Object.values(curves).flat();
    if (!all.length) return;
    const last = lastStep(), values = all.map(([, v]) => v);
    let low = Math.min(0, ...values), high = unit && Math.max(...values) <= 1 ? 1 : Math.max(...values);
    if (high <= low) high = low + 1;
    const x = (s) => left + ((s - 1) / (last - 1)) * (width - left - RIGHT), y = (v) => top + (1 - (v - low) / (high - low)) * (height - bottom - top);
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: text, strokeStyle: text, lineWidth: 1, textBaseline: "middle", textAlign: "right" });
    for (const t of nice(low, high)) {
      context.globalAlpha = 0.15;
      context.fillRect(left, Math.round(y(t)), width - left - RIGHT, 1);
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
    const frame = frames[shown()];
    if (frame) {
      Object.assign(context, { fillStyle: text });
      context.globalAlpha = 0.5;
      context.fillRect(x(frame.step), top, 1, height - bottom - top);
      context.globalAlpha = 1;
    }
  }

  function drawCurves() {
    const { loss: losses = [], ...others } = model.get("_curves"), names = Object.keys(others);
    scoresBox.hidden = !names.length;
    legend.replaceChildren(...names.map((name, n) => make("li", {}, dashes(LINES[n % LINES.length]), name.replaceAll("_", " "))));
    plot(loss, { loss: losses }, false);
    if (names.length) plot(scores, others, true);
    const now = (name, points) => (points.length ? `${name.replaceAll("_", " ")} ${short(points.at(-1)[1])} after ${points.at(-1)[0]} updates` : "no update yet");
    loss.parentElement.setAttribute("aria-label", `Curve: ${now("loss", losses)}`);
    scores.parentElement.setAttribute("aria-label", `Curves: ${names.map((name) => now(name, others[name])).join(", ")}`);
  }

  /** Return a sample of a line for the legend. */
  function dashes([colour, dash]) {
    const canvas = make("canvas", { style: "width: 30px; height: 8px" }), context = fit(canvas, 30, 8);
    Object.assign(context, { strokeStyle: colour, lineWidth: 2 });
    context.setLineDash(dash);
    context.moveTo(0, 4);
    context.lineTo(30, 4);
    context.stroke();
    return canvas;
  }

  for (const canvas of [loss, scores])
    drag(canvas.parentElement, (event) => {
      const r = canvas.parentElement.getBoundingClientRect(), wanted = 1 + ((event.clientX - r.left - LEFT) / (r.width - LEFT - RIGHT)) * (lastStep() - 1);
      const distance = (frame) => (frame ? Math.abs(frame.step - wanted) : Infinity);
      pause();
      if (frames.length) choose(frames.reduce((best, frame, n) => (distance(frame) < distance(frames[best]) ? n : best), 0));
    });

  async function drawPicture() {
    if (!image) return;
    const frame = frames[shown()];
    slider.max = Math.max(frames.length - 1, 0);
    slider.value = shown();
    slider.disabled = frames.length < 2;
    showButton();
    opacity.value = model.get("opacity");
    if (frame && !unpacked.has(frame.step)) unpacked.set(frame.step, await turned(frame.data));
    if (frame !== frames[shown()]) return; // a newer one came meanwhile
    const width = stage.clientWidth || 300, height = (width * rows * scene.aspect) / columns;
    const context = fit(picture, width, height);
    stamp(context, sliceImage(image, size, 0, plane, 0, greyTable(scene.grey)), 0, 0, width, height);
    if (frame) {
      context.globalAlpha = model.get("opacity");
      stamp(context, sliceImage(unpacked.get(frame.step), size, 0, plane, 0, colours), 0, 0, width, height);
      context.globalAlpha = 1;
    }
    if (truth) drawOutline(context, [truth, size, plane, 0], [width / columns, height / rows], scene.colour);
    caption.textContent = frames.length > 0 && !frame ? "this picture comes when the training is done" : frame ? `after ${frame.step} update${frame.step === 1 ? "" : "s"}`
      + (frame.dice === null ? "" : `: Dice of this slice ${(100 * frame.dice).toFixed(0)} %`) : "no update yet";
    stage.setAttribute("aria-label", `${scene.place}, ${caption.textContent}`);
    slider.setAttribute("aria-valuetext", caption.textContent);
    root.dataset.shown = frame ? frame.step : 0;
  }

  function draw() { drawCurves(); drawPicture(); }
  function onFrames() { collect(); draw(); }
  const press = ({ key }) => { if (key.toLowerCase() === "p") play(); };
  const leave = mount(model, el, root, { _curves: drawCurves, _frames: onFrames, _newest: onFrames, frame: draw, opacity: drawPicture }, { press, resized: draw });
  collect();
  Promise.all([turned(scene.image), scene.truth ? turned(scene.truth) : null]).then(async ([grey, label]) => {
    image = grey;
    truth = label;
    drawCurves();
    await drawPicture();
    root.dataset.ready = "true";
  });
  return () => { clearInterval(playing); leave(); };
}
