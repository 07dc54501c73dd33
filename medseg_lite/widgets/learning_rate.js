// Learning rate: a kernel learns from a row of numbers, and the loss after each update follows the slider.

/** Return weights and loss at the start and after each of `most` updates; the browser does what Python does. */
function descend({ row, kernel, most }, rate) {
  const places = row.length - kernel.length + 1, at = (w, r) => w.reduce((sum, weight, i) => sum + weight * row[r + i], 0);
  const target = Array.from({ length: places }, (_, r) => at(kernel, r)), path = [];
  let w = kernel.map(() => 0);
  for (let n = 0; n <= most; n++) {
    const output = target.map((_, r) => at(w, r)), error = output.map((f, r) => f - target[r]);
    path.push({ w, output, loss: error.reduce((sum, e) => sum + e * e, 0) / places });
    w = w.map((weight, i) => weight - ((rate * 2) / places) * error.reduce((sum, e, r) => sum + e * row[r + i], 0));
  }
  return { target, path };
}

function render({ model, el }) {
  const scene = model.get("_scene"), { kernel, most, lowest, highest } = scene, set = setter(model), TICKS = 300;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const write = (x, digits = 3) => (Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-4) ? x.toExponential(1) : String(Number(x.toPrecision(digits)))).replaceAll("-", "−");
  const now = () => clamp(model.get("updates"), 0, most);
  let playing = null;

  function pause() {
    clearInterval(playing);
    playing = null;
    button.textContent = still ? "Ten updates" : "Play";
  }
  const go = (by) => { set("updates", clamp(now() + by, 0, most)); if (now() === most) pause(); };
  function play() {
    if (playing) return pause();
    if (now() === most) set("updates", 0);
    if (still) return go(10);
    playing = setInterval(() => go(1), 150);
    button.textContent = "Pause";
  }
  const button = make("button", { type: "button", class: "play", onclick: play }), number = make("span", { class: "number" });
  const slider = makeRange("Learning rate", () => set("rate", Number((lowest * (highest / lowest) ** (slider.value / TICKS)).toPrecision(3))), { class: "rate", max: TICKS });
  const plotted = (title, view) => {
    const canvas = make("canvas"), box = make("div", { class: "plot", role: "img", "data-view": view }, canvas), caption = make("figcaption", {}, title);
    return { canvas, box, caption, figure: make("figure", {}, caption, box) };
  };
  const left = plotted("output and target", "output"), right = plotted("loss by update, on a logarithmic scale", "loss");
  const cells = kernel.map(() => make("td")), table = make("table", {},
    make("tr", {}, make("th", { scope: "row" }, "learned kernel"), ...cells), make("tr", {}, make("th", { scope: "row" }, "hidden kernel"), ...kernel.map((w) => make("td", {}, write(w)))));
  const verdict = make("output", { class: "verdict", "aria-live": "polite" });
  const root = make("div", { class: "medseg-rate", role: "group", "aria-label": "Learning rate" },
    make("div", { class: "toolbar" }, make("label", {}, make("span", {}, "Learning rate"), slider, number), button,
      make("button", { type: "button", onclick: () => { pause(); go(1); }, "aria-label": "One update" }, "Step"),
      make("button", { type: "button", onclick: () => { pause(); set("updates", 0); } }, "Back to the start")),
    make("div", { class: "panels" }, left.figure, right.figure), table, verdict,
    makeHelp(`Slider, or its arrow keys: learning rate. P: ${still ? "ten updates" : "play or pause"}. S: one update. Left: circles are the target, the line with dots is the output.`));
  pause();

  /** Prepare the canvas of a plot: returns its context and the place of a point, x from 0 to `last` and y between `low` and `high`. */
  function axes({ canvas, box }, last, low, high) {
    const width = box.clientWidth || 300, height = box.clientHeight || 200, context = fit(canvas, width, height), colour = getComputedStyle(root).color;
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "middle", textAlign: "right" });
    const at = (x, y) => [58 + (x / last) * (width - 70), 8 + (1 - (clamp(y, low, high) - low) / (high - low)) * (height - 34)];
    const line = (y, text) => {
      context.globalAlpha = 0.2;
      context.fillRect(58, Math.round(at(0, y)[1]), width - 70, 1);
      context.globalAlpha = 1;
      context.fillText(text, 52, at(0, y)[1]);
    };
    const below = (x, text) => { Object.assign(context, { textAlign: "center" }); context.fillText(text, at(x, 0)[0], height - 10); };
    return { context, at, line, below, colour };
  }
  function trace(context, points, colour, radius) {
    Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: 1.8 });
    context.beginPath();
    for (const p of points) context.lineTo(...p);
    context.stroke();
    for (const p of radius ? points : []) { context.beginPath(); context.arc(...p, radius, 0, 7); context.fill(); }
  }

  function draw() {
    const rate = model.get("rate"), { target, path } = descend(scene, rate), { w, output, loss } = path[now()], first = path[0].loss, last = path[most].loss;
    slider.value = Math.round((Math.log(rate / lowest) / Math.log(highest / lowest)) * TICKS);
    number.textContent = write(rate);
    cells.forEach((cell, i) => { cell.textContent = write(w[i]); });
    const end = Math.max(...target.map(Math.abs)) * 1.4, one = axes(left, target.length - 1, -end, end);
    for (const y of [-end / 1.4, 0, end / 1.4]) one.line(y, write(y));
    target.forEach((t, r) => {
      Object.assign(one.context, { strokeStyle: "#d55e00", lineWidth: 2 });
      one.context.beginPath();
      one.context.arc(...one.at(r, t), 6, 0, 7);
      one.context.stroke();
    });
    trace(one.context, output.map((f, r) => one.at(r, f)), "#1c86c9", 3);
    const log = (x) => Math.log10(Math.max(x, 1e-9) / first), two = axes(right, most, -4, 4);
    for (const y of [-4, -2, 0, 2, 4]) two.line(y, write(first * 10 ** y, 2));
    for (const x of [0, most / 2, most]) two.below(x, x);
    trace(two.context, path.map((p, n) => two.at(n, log(p.loss))), "#1c86c9", 0);
    trace(two.context, [two.at(now(), log(loss))], two.colour, 4.5);
    const told = last > first ? "too large: every update overshoots, and the loss grows" : last < first / 100 ? "good: the kernel comes close to the hidden one"
      : "too small: the loss falls, but it takes more updates than these";
    const text = `After ${now()} updates the loss is ${write(loss)}; it began at ${write(first)}. Rate ${write(rate)} is ${told}.`;
    if (verdict.textContent !== text) verdict.textContent = text;
    slider.setAttribute("aria-valuetext", `${write(rate)}, ${told}`);
    left.box.setAttribute("aria-label", `Output ${output.map((f) => write(f)).join(", ")}; target ${target.map((t) => write(t)).join(", ")}`);
    right.box.setAttribute("aria-label", `Loss from ${write(first)} to ${write(last)} in ${most} updates`);
    root.dataset.ready = "true";
  }
  const press = ({ key }) => {
    if (key.toLowerCase() === "p") play();
    if (key.toLowerCase() === "s") { pause(); go(1); }
  };
  const leave = mount(model, el, root, { rate: draw, updates: draw }, { press, resized: draw });
  draw();
  return () => { clearInterval(playing); leave(); };
}
