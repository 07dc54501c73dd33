// Gain and offset: a slice times a gain plus an offset. Python computed what each network predicts at every setting; here one is shown.

const OUTCOMES = ["found", "missed", "made up"], BINS = 80;

function render({ model, el }) {
  const scene = model.get("_scene"), { shape, aspect, plane, gains, offsets, span, names, dice, ramp, given, colours, low, high, window: [black, white] } = scene, set = setter(model);
  const size = shape, loaded = new Map(), three = (x) => x.toFixed(3), signed = (x) => `${x < 0 ? "−" : "+"} ${Math.abs(x)}`;
  const outcome = Uint32Array.from({ length: 256 }, (_, k) => (k ? pixel(colours[OUTCOMES[k - 1] ?? "found"], 170) : 0));
  let image = null, truth = null;
  const nearest = (list, x) => list.reduce((best, v, k) => (Math.abs(v - x) < Math.abs(list[best] - x) ? k : best), 0);
  const now = () => { const g = nearest(gains, model.get("gain")), o = nearest(offsets, model.get("offset")); return { g, o, at: g * offsets.length + o, gain: gains[g], offset: offsets[o] }; };
  const level = (byte) => low + (byte * (high - low)) / 255; // the intensity of a byte

  // -------------------------------------------------------------------------------------------------------- pictures
  const makeView = (name, title) => {
    const canvas = make("canvas"), stage = make("div", { class: "stage", role: "img", "data-view": name }, canvas), told = make("span", { class: "number" }), below = make("canvas");
    const plot = make("div", { class: `plot ${name === "input" ? "" : "map"}`, role: "img", "data-view": `plot ${name}` }, below), fact = make("div", { class: "given" });
    return { canvas, stage, told, below, plot, fact, box: make("figure", {}, make("figcaption", {}, make("b", {}, title), told), stage, plot, fact) };
  };
  const input = makeView("input", "input"), views = names.map((name, n) => makeView(`network ${n}`, name));
  function frame({ canvas, stage }) {
    const width = stage.clientWidth || 220, height = (width * shape[plane.y] * aspect) / shape[plane.x];
    stage.style.aspectRatio = `${shape[plane.x]} / ${shape[plane.y] * aspect}`;
    return [fit(canvas, width, height), width, height];
  }
  function axes({ plot, below }) {
    const width = plot.clientWidth || 220, context = fit(below, width, 110), colour = getComputedStyle(root).color;
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "top", textAlign: "center" });
    return [context, width];
  }
  function drawInput({ gain, offset }) {
    const [context, width, height] = frame(input), [plot, wide] = axes(input), seen = greyTable({ low: gain * low + offset, high: gain * high + offset, window: [black, white] });
    stamp(context, sliceImage(image, size, 0, plane, 0, seen), 0, 0, width, height);
    const at = (x) => clamp((x - span[0]) / (span[1] - span[0]), 0, 1) * (wide - 2) + 1, counts = (a, b) => {
      const bins = new Float32Array(BINS);
      for (const byte of image) bins[clamp(Math.floor(((a * level(byte) + b - span[0]) / (span[1] - span[0])) * BINS), 0, BINS - 1)]++;
      return bins.map(Math.sqrt); // so that a few bright pixels are seen beside many dark ones
    };
    const bars = counts(gain, offset), first = counts(1, 0), most = Math.max(...bars, ...first);
    plot.globalAlpha = 0.3;
    first.forEach((c, k) => plot.fillRect((k * wide) / BINS, 90 - (c / most) * 84, wide / BINS, (c / most) * 84));
    plot.globalAlpha = 1;
    bars.forEach((c, k) => { if (c) plot.fillRect((k * wide) / BINS, 90 - (c / most) * 84, wide / BINS - 0.6, (c / most) * 84); });
    plot.fillRect(0, 90, wide, 1);
    for (const [x, align] of [[span[0], "left"], [span[1], "right"]]) { plot.textAlign = align; plot.fillText(short(x), at(x), 94); }
  }
  async function drawNetwork(n, { at, g, o }) {
    const view = views[n], key = `${n} ${at}`;
    if (!loaded.has(key)) loaded.set(key, await unpack(model.get("_predictions")[n][at]));
    if (now().at !== at) return; // another setting by now
    const [context, width, height] = frame(view), found = loaded.get(key);
    stamp(context, sliceImage(image, size, 0, plane, 0, greyTable(scene)), 0, 0, width, height);
    stamp(context, sliceImage(truth.map((t, k) => (t ? 2 - found[k] : 3 * found[k])), size, 0, plane, 0, outcome), 0, 0, width, height);
    const [plot, wide] = axes(view), w = wide / gains.length, h = 90 / offsets.length, colour = plot.fillStyle;
    for (let i = 0; i < gains.length; i++)
      for (let j = 0; j < offsets.length; j++) {
        plot.fillStyle = ramp[Math.round(dice[n][i * offsets.length + j] * (ramp.length - 1))];
        plot.fillRect(i * w + 0.5, 90 - (j + 1) * h + 0.5, w - 1, h - 1);
      }
    for (const [strokeStyle, lineWidth] of [["#000000", 4], ["#ffffff", 2]]) {
      Object.assign(plot, { strokeStyle, lineWidth });
      plot.strokeRect(g * w + 2, 90 - (o + 1) * h + 2, w - 4, h - 4);
    }
    plot.fillStyle = colour;
    [0, (gains.length - 1) / 2, gains.length - 1].forEach((k) => { if (Number.isInteger(k)) plot.fillText(`×${short(gains[k])}`, clamp((k + 0.5) * w, 14, wide - 14), 94); });
    root.dataset.ready = "true";
  }

  function draw() {
    if (!image) return;
    const here = now();
    drawInput(here);
    [[gain, here.g, `× ${here.gain}`], [offset, here.o, signed(here.offset)]].forEach(([slider, k, text], n) => {
      slider.value = k;
      slider.setAttribute("aria-valuetext", text);
      told[n].textContent = text;
    });
    input.told.textContent = `× ${here.gain} ${signed(here.offset)}`;
    input.stage.setAttribute("aria-label", `Slice × ${here.gain} ${signed(here.offset)}, under the grey scale of the original`);
    input.plot.setAttribute("aria-label", "Histogram of the slice, pale: of the original");
    input.fact.textContent = "histogram (square roots); pale: the original";
    views.forEach((view, n) => {
      const [mean, deviation] = given[n][here.at], text = `Dice ${three(dice[n][here.at])}`;
      view.told.textContent = text;
      view.fact.textContent = `is given ${short(mean)} ± ${short(deviation)}`;
      view.stage.setAttribute("aria-label", `${names[n]}: pixels found, missed and made up, ${text}`);
      view.plot.setAttribute("aria-label", `Dice of ${names[n]} by gain and offset, ${three(Math.min(...dice[n]))} to ${three(Math.max(...dice[n]))}`);
      drawNetwork(n, here);
    });
  }

  // -------------------------------------------------------------------------------------------------------- controls
  for (const view of views)
    drag(view.plot, (event) => {
      const r = view.plot.getBoundingClientRect(), pick = (list, share) => list[clamp(Math.floor(share * list.length), 0, list.length - 1)];
      set("gain", pick(gains, (event.clientX - r.left) / r.width));
      set("offset", pick(offsets, 1 - (event.clientY - r.top) / 90));
    });
  const gain = makeRange("Gain", () => set("gain", gains[gain.value]), { max: gains.length - 1 }), offset = makeRange("Offset", () => set("offset", offsets[offset.value]), { max: offsets.length - 1 });
  const told = [make("span", { class: "number" }), make("span", { class: "number" })];
  const back = make("button", { type: "button", onclick: () => { set("gain", gains[nearest(gains, 1)]); set("offset", offsets[nearest(offsets, 0)]); } }, "As it came");
  const swatch = (name) => make("li", {}, make("i", { style: `background: ${colours[name]}` }), name);
  const root = make("div", { class: "medseg-gain", role: "group", "aria-label": `Gain and offset, ${scene.title}` },
    make("div", { class: "toolbar" }, make("label", {}, make("span", {}, "Gain"), gain, told[0]), make("label", {}, make("span", {}, "Offset"), offset, told[1]), back),
    make("div", { class: "panels", style: `--count: ${1 + names.length}` }, input.box, ...views.map((v) => v.box)),
    make("ul", { class: "key", "aria-label": "Colours" }, ...OUTCOMES.map(swatch), make("li", {}, make("i", { class: "ramp", style: `background: linear-gradient(to right, ${ramp.join()})` }), "Dice from 0 to 1, gain to the right, offset upwards")),
    makeHelp("Sliders: gain and offset. Click or drag in a map: both at once. The input is drawn under the grey scale of the original, so that you see what changes; the outermost bars of the histogram hold what lies beyond; "
      + "the predictions lie over the original. Below them stand mean ± standard deviation of the slice as the network is given it."));
  const leave = mount(model, el, root, { gain: draw, offset: draw }, { resized: draw });
  Promise.all([model.get("_image"), model.get("_truth")].map(unpack)).then((both) => { [image, truth] = both; draw(); });
  return leave;
}
