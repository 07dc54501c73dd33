// Several segmentations against the truth, drawn here from the labels. The bars below each picture count its wrong voxels by slice.

function render({ model, el }) {
  const scene = model.get("_scene");
  const { start, shape, spacing, sequences, regions, outcomes } = scene;
  const names = Object.keys(outcomes), { strides, planeNow, moveTo, move, pointAt, at } = navigate(model, scene);
  const [FOUND, MISSED, MADE_UP] = [1, 2, 3];
  const colours = new Uint32Array(256);
  names.forEach((name, i) => { colours[i + 1] = pixel(outcomes[name]); });
  const volumes = [], labels = []; // labels[0] is the truth

  const views = scene.predictions.map((name, number) => {
    const picture = make("canvas"), bars = make("canvas"), score = make("span", { class: "number" });
    const stage = make("div", {
      class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": `picture${number}`,
      "aria-label": `${name}. Arrow keys move the crosshair, Page Up and Page Down change the slice.`,
    }, picture);
    const strip = make("div", {
      class: "bars", tabindex: 0, role: "slider", "data-view": `bars${number}`, title: "Wrong voxels in each slice; click to go there",
      "aria-label": `Wrong voxels of ${name}, by slice`,
    }, bars);
    const worst = make("button", { type: "button", "aria-label": `worst slice of ${name}`, onclick: () => goToWorst(views[number]) }, "worst slice");
    const box = make("figure", {}, make("figcaption", {}, make("b", {}, name), score), stage, make("div", { class: "below" }, strip, worst));
    drag(stage, (event) => moveTo(pointAt(stage, event)));
    steer(stage, planeNow, shape, move);
    const jump = (event) => {
      const r = strip.getBoundingClientRect(), { cut } = planeNow(), next = [...model.get("position")];
      next[cut] = start[cut] + Math.floor(((event.clientX - r.left) / r.width) * shape[cut]);
      moveTo(next);
    };
    drag(strip, jump);
    strip.addEventListener("keydown", (event) => {
      const { cut } = planeNow(), by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -shape[cut], End: shape[cut] }[event.key];
      if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      move(cut, by);
    });
    return { name, number, picture, bars, score, stage, strip, box, outcome: null, wrong: null };
  });

  function goToWorst(view) {
    const wrong = view.wrong.missed.map((n, i) => n + view.wrong.madeUp[i]), next = [...model.get("position")], { cut } = planeNow();
    next[cut] = start[cut] + wrong.indexOf(Math.max(...wrong));
    moveTo(next);
  }

  /** Find what became of every voxel, and count the wrong ones in every slice. */
  function judge() {
    if (!labels.length) return;
    const inRegion = new Uint8Array(256), { cut } = planeNow();
    for (const k of regions[model.get("region")]) inRegion[k] = 1;
    for (const view of views) {
      const truth = labels[0], prediction = labels[view.number + 1], out = view.outcome ?? new Uint8Array(truth.length);
      const counts = [0, 0, 0, 0], missed = new Array(shape[cut]).fill(0), madeUp = new Array(shape[cut]).fill(0);
      for (let i = 0; i < truth.length; i++) {
        const t = inRegion[truth[i]], p = inRegion[prediction[i]], k = t ? (p ? FOUND : MISSED) : p ? MADE_UP : 0;
        out[i] = k;
        if (!k) continue;
        counts[k]++;
        if (k !== FOUND) (k === MISSED ? missed : madeUp)[Math.floor(i / strides[cut]) % shape[cut]]++;
      }
      Object.assign(view, { outcome: out, wrong: { missed, madeUp }, counts });
      const [, found, lost, extra] = counts, all = 2 * found + lost + extra;
      view.score.textContent = `Dice ${all ? ((200 * found) / all).toFixed(1) : "100.0"} %`;
    }
    draw();
  }

  function draw() {
    if (!labels.length) return;
    const plane = planeNow(), { x, y, cut } = plane, position = model.get("position"), here = position[cut] - start[cut];
    const grey = greyTable(sequences.find((s) => s.name === model.get("sequence")));
    const input = sliceImage(volumes[sequences.findIndex((s) => s.name === model.get("sequence"))], shape, 0, plane, here, grey);
    const aspect = spacing[y] / spacing[x], most = Math.max(1, ...views.map((v) => Math.max(...v.wrong.missed.map((n, i) => n + v.wrong.madeUp[i]))));
    for (const view of views) {
      const width = view.stage.clientWidth || 300, height = (width * shape[y] * aspect) / shape[x];
      view.stage.style.aspectRatio = `${shape[x]} / ${shape[y] * aspect}`;
      const context = fit(view.picture, width, height);
      stamp(context, input, 0, 0, width, height);
      context.globalAlpha = model.get("opacity");
      stamp(context, sliceImage(view.outcome, shape, 0, plane, here, colours), 0, 0, width, height);
      context.globalAlpha = 1;
      drawCrosshair(context, plane, position, scene, width, height, "rgb(255 255 255 / 45%)");
      drawLetters(context, plane, width, height);
      const wide = view.strip.clientWidth || width, tall = 44, strip = fit(view.bars, wide, tall), w = wide / shape[cut];
      strip.fillStyle = getComputedStyle(view.strip).color;
      strip.globalAlpha = 0.15;
      strip.fillRect(here * w, 0, Math.max(w, 2), tall);
      strip.globalAlpha = 1;
      for (let i = 0; i < shape[cut]; i++) {
        const missed = (view.wrong.missed[i] / most) * tall, extra = (view.wrong.madeUp[i] / most) * tall;
        strip.fillStyle = outcomes[names[1]];
        strip.fillRect(i * w, tall - missed, Math.max(w - 0.5, 0.5), missed);
        strip.fillStyle = outcomes[names[2]];
        strip.fillRect(i * w, tall - missed - extra, Math.max(w - 0.5, 0.5), extra);
      }
      strip.fillStyle = getComputedStyle(view.strip).color;
      strip.font = "10px system-ui, sans-serif";
      strip.textBaseline = "top";
      strip.fillText(`${most} voxels`, 0, 0);
      strip.globalAlpha = 0.5;
      strip.fillRect(0, tall - 1, wide, 1);
      const said = `slice ${position[cut]}: ${view.wrong.missed[here]} missed, ${view.wrong.madeUp[here]} made up`;
      for (const [key, value] of Object.entries({ min: start[cut], max: start[cut] + shape[cut] - 1, now: position[cut], text: said }))
        view.strip.setAttribute(`aria-value${key}`, value);
    }
    for (const one of [...choices, slice]) one.show();
    opacity.value = model.get("opacity");
    const facts = [["voxel", position.join(", ")], ...views.map((v) => [v.name, ["right, outside", ...names][v.outcome[at(position)]]])];
    const sums = views.map((v) => [`${v.name}, this slice`, `${v.wrong.missed[here]} missed, ${v.wrong.madeUp[here]} made up`]);
    tell(readout, [...facts, ...sums]);
  }

  const choices = [makeChoice(model, "Region", "region", Object.keys(regions)), makeChoice(model, "Plane", "plane", scene.planes.map((p) => p.name.toLowerCase())),
    makeChoice(model, "Input", "sequence", sequences.map((s) => s.name))];
  const slice = makeSlice(model, scene, { planeNow, move }), opacity = makeOpacity(model, "Opacity of the colours"), readout = makeReadout("At the crosshair");
  const key = make("ul", { class: "key", "aria-label": "Colours" }, ...names.map((name) => make("li", {}, make("i", { style: `--class-colour: ${outcomes[name]}` }),
    `${name} (${{ found: "true positive", missed: "false negative", "made up": "false positive" }[name]})`)));
  const help = makeHelp("Picture: click or drag for the crosshair; click, then wheel, or Page Up and Page Down for the slice; arrow keys for the crosshair, with "
    + "Shift ten voxels. Bars: click, drag or arrow keys for the slice; they count its wrong voxels, and the number is the height of the highest bar.");
  const root = make("div", { class: "medseg-compare", role: "group", "aria-label": `Segmentations of ${scene.title}` },
    make("div", { class: "toolbar" }, ...choices.map((c) => c.box), slice.box, make("label", {}, make("span", {}, "Opacity"), opacity)),
    make("div", { class: "panels", style: `--count: ${views.length}` }, ...views.map((v) => v.box)), readout, key, help);
  const leave = mount(model, el, root, { region: judge, plane: judge, position: draw, sequence: draw, opacity: draw }, { resized: draw });
  Promise.all([Promise.all(model.get("_volumes").map(unpack)), Promise.all(model.get("_labels").map(unpack))]).then(([images, maps]) => {
    volumes.push(...images);
    labels.push(...maps);
    judge();
    root.dataset.ready = "true";
  });
  return leave;
}
