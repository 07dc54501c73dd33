// Training scrubber: the same slice as several networks segmented it, after the number of updates that a slider sets.

function render({ model, el }) {
  const scene = model.get("_scene"), { steps, names, classes, dice } = scene, [rows, columns] = scene.size, size = [1, rows, columns], set = setter(model);
  const plane = { cut: 0, x: 2, y: 1 }, pixels = rows * columns, last = steps.length - 1, still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const image = bytes(scene.image).slice().reverse(), grey = greyTable({ low: 0, high: 255, window: [0, 255] }); // slices run against the picture
  const colours = new Uint32Array(256), percent = (score) => (score === null ? "–" : `${Math.round(100 * score)} %`);
  for (const [k, , colour] of classes) colours[k] = pixel(colour);
  let labels = null, playing = null; // labels: truth, then all frames of each network
  const now = () => clamp(model.get("frame"), 0, last), updates = (n) => `${steps[n]} update${steps[n] === 1 ? "" : "s"}`;
  const go = (frame) => { if (frame !== now()) set("frame", clamp(frame, 0, last)); };

  // Playing steps through the stored updates, and begins again after the last. Who asked for reduced motion steps by hand.
  function pause() {
    clearInterval(playing);
    playing = null;
    button.textContent = still ? "Next" : "Play";
  }
  function play() {
    if (playing) return pause();
    go(now() === last ? 0 : now() + 1);
    if (still) return;
    playing = setInterval(() => { go(now() + 1); if (now() === last) pause(); }, 500);
    button.textContent = "Pause";
  }
  const button = make("button", { type: "button", onclick: play }), number = make("output", { class: "number", "aria-live": "off" });
  const slider = makeRange("Updates", () => { pause(); go(+slider.value); }, { max: last });
  const opacity = makeOpacity(model, "Opacity of the colours");

  const views = ["truth", ...names].map((name, n) => {
    const canvas = make("canvas"), stage = make("div", { class: "stage", role: "img", "data-view": `picture${n}`, style: `aspect-ratio: ${columns} / ${rows}` }, canvas);
    const scores = n ? classes.map(([, title, colour]) => ({ title, text: make("span"), bar: make("i", { style: `background: ${colour}` }) })) : [];
    if (n) drag(stage, (event) => { // across a picture: from the first to the last update
      const box = stage.getBoundingClientRect();
      pause();
      go(Math.round(clamp((event.clientX - box.left) / box.width, 0, 1) * last));
    });
    const list = n ? make("ul", { class: "scores", "aria-label": `Dice of ${name}` }, ...scores.map(({ title, text, bar }) => make("li", {}, make("span", {}, title), text, bar)))
      : make("ul", { class: "key", "aria-label": "Classes" }, ...classes.map(([, title, colour]) => make("li", {}, make("i", { style: `background: ${colour}` }), title)));
    return { name, n, canvas, stage, scores, figure: make("figure", {}, make("figcaption", {}, name), stage, list) };
  });

  function drawView({ name, n, canvas, stage, scores }, frame) {
    const width = stage.clientWidth || 140, height = (width * rows) / columns, context = fit(canvas, width, height);
    const start = labels.length - pixels * (n ? 2 + (n - 1) * steps.length + frame : 1); // reversed, too
    stamp(context, sliceImage(image, size, 0, plane, 0, grey), 0, 0, width, height);
    context.globalAlpha = model.get("opacity");
    stamp(context, sliceImage(labels, size, start, plane, 0, colours), 0, 0, width, height);
    context.globalAlpha = 1;
    scores.forEach(({ text, bar }, k) => {
      text.textContent = percent(dice[n - 1][frame][k]);
      bar.style.width = `${100 * dice[n - 1][frame][k]}%`;
    });
    stage.setAttribute("aria-label", n ? `${name} after ${updates(frame)}: Dice ${scores.map(({ title, text }) => `${title} ${text.textContent}`).join(", ")}` : "the truth");
  }

  function draw() {
    if (!labels) return;
    slider.value = now();
    opacity.value = model.get("opacity");
    number.textContent = `after ${updates(now())}`;
    slider.setAttribute("aria-valuetext", number.textContent);
    for (const view of views) drawView(view, now());
    root.dataset.shown = steps[now()];
  }

  const root = make("div", { class: "medseg-scrubber", role: "group", "aria-label": "Training, update by update" },
    make("div", { class: "toolbar" }, button, slider, number, make("label", {}, make("span", {}, "Opacity"), opacity)), make("div", { class: "panels" }, ...views.map((v) => v.figure)),
    makeHelp(`Slider, or its arrow keys, or drag across a picture: number of updates. P: ${still ? "next" : "play or pause"}. Below each picture is the Dice of this slice, by class.`));
  const leave = mount(model, el, root, { frame: draw, opacity: draw }, { press: ({ key }) => { if (key.toLowerCase() === "p") play(); }, resized: draw });
  pause();
  unpack(model.get("_labels")).then((data) => {
    labels = data.reverse();
    draw();
    root.dataset.ready = "true";
  });
  return () => { clearInterval(playing); leave(); };
}
