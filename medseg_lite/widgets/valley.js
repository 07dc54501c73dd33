// Valley: three balls in a valley of two weights. Two follow the gradient, one of them on a multiplied loss; the third makes steps of a fixed length.

/** Return the weights of each ball at the start and after each update; the browser does what Python does. */
function roll({ balls, start, most }, { rate, factor, stretch, falls }) {
  return balls.map((_, ball) => {
    const path = [start];
    for (let n = 0; n < most; n++) {
      const [x, y] = path[n], by = ball === 1 ? factor : 1, gradient = [(by * x) / stretch ** 2, by * y];
      const length = ball === 2 ? Math.hypot(...gradient) : 1, step = length ? (rate * (falls ? 1 - n / most : 1)) / length : 0;
      path.push([x - step * gradient[0], y - step * gradient[1]]);
    }
    return path;
  });
}

function render({ model, el }) {
  const scene = model.get("_scene"), { balls, colours, ends, most, edge } = scene, set = setter(model), TICKS = 200;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches, now = () => clamp(model.get("updates"), 0, most);
  const write = (x) => (x >= 1e4 || (x && x < 1e-3) ? x.toExponential(1).replace("-", "−").replace("+", "") : short(x));
  let playing = null;

  // -------------------------------------------------------------------------------------------------------- controls
  function pause() {
    clearInterval(playing);
    playing = null;
    button.textContent = still ? "Ten updates" : "Run";
  }
  const go = (by) => { set("updates", clamp(now() + by, 0, most)); if (now() === most) pause(); };
  function play() {
    if (playing) return pause();
    if (now() === most) set("updates", 0);
    if (still) return go(10);
    playing = setInterval(() => go(1), 110);
    button.textContent = "Pause";
  }
  const step = () => { pause(); go(1); };
  const button = make("button", { type: "button", class: "play", onclick: play });
  const sliders = [["rate", "Rate"], ["factor", "Factor of the second loss"], ["stretch", "Valley, longer than wide"]].map(([key, title]) => {
    const [low, high] = ends[key], byFactor = key !== "stretch"; // rate and factor move on a logarithmic scale
    const read = (k) => (byFactor ? Number((low * (high / low) ** (k / TICKS)).toPrecision(2)) : k), place = (v) => (byFactor ? Math.round((Math.log(v / low) / Math.log(high / low)) * TICKS) : v);
    const slider = makeRange(title, () => set(key, read(+slider.value)), byFactor ? { max: TICKS } : { min: low, max: high, step: 0.5 }), number = make("span", { class: "number" });
    return { key, slider, number, place, box: make("label", {}, make("span", {}, title), slider, number) };
  });
  const falls = make("input", { type: "checkbox", onchange: () => set("falls", falls.checked) });

  // -------------------------------------------------------------------------------------------------------- pictures
  const plotted = (title, view) => {
    const canvas = make("canvas"), box = make("div", { class: "plot", role: "img", "data-view": view }, canvas);
    return { canvas, box, figure: make("figure", {}, make("figcaption", {}, title), box) };
  };
  const above = plotted("two weights, and the minimum in the middle", "valley"), below = plotted("distance to the minimum by update, on a logarithmic scale", "distance");
  const rows = balls.map((name, n) => {
    const mark = make("canvas", { class: "swatch", "aria-hidden": "true" }), told = make("span", { class: "number" });
    return { mark, told, row: make("li", {}, mark, make("b", {}, name), told) };
  });
  const list = make("ul", { class: "balls", "aria-label": "Distance of each ball to the minimum" }, ...rows.map((r) => r.row));
  const verdict = make("output", { class: "verdict", "aria-live": "polite" });

  /** Draw a ball: a square, a triangle and a disc, so that they are told apart without their colours. */
  function drawBall(context, n, [x, y], size) {
    Object.assign(context, { fillStyle: colours[n], lineWidth: 1.2 });
    context.beginPath();
    if (n === 0) context.rect(x - size, y - size, 2 * size, 2 * size);
    else if (n === 1) for (const turn of [0.5, 1.167, 1.833]) context.lineTo(x + 1.4 * size * Math.cos(turn * Math.PI), y + 1.4 * size * Math.sin(turn * Math.PI));
    else context.arc(x, y, 1.15 * size, 0, 7);
    context.closePath();
    context.fill();
    context.stroke();
  }
  function trace(context, n, points) {
    Object.assign(context, { strokeStyle: colours[n], lineWidth: 1.7 });
    context.setLineDash([[], [7, 4], []][n]);
    context.beginPath();
    for (const p of points) context.lineTo(...p);
    context.stroke();
    context.setLineDash([]);
  }
  function drawValley(paths, colour) {
    const width = above.box.clientWidth || 500, height = (width * edge[1]) / edge[0], scale = width / (2 * edge[0]), stretch = model.get("stretch");
    above.box.style.height = `${height}px`;
    const context = fit(above.canvas, width, height), far = 4 * width, at = ([x, y]) => [clamp(width / 2 + x * scale, -far, far), clamp(height / 2 - y * scale, -far, far)];
    Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: 1, globalAlpha: 0.28 });
    for (let level = 0.5; level < 9; level += 0.5) {
      context.beginPath();
      context.ellipse(width / 2, height / 2, level * stretch * scale, level * scale, 0, 0, 7);
      context.stroke();
    }
    context.globalAlpha = 1;
    context.fillRect(width / 2 - 5, height / 2 - 0.5, 10, 1);
    context.fillRect(width / 2 - 0.5, height / 2 - 5, 1, 10);
    paths.forEach((path, n) => {
      const points = path.slice(0, now() + 1).map(at);
      trace(context, n, points);
      context.fillStyle = colours[n];
      for (const [x, y] of points) context.fillRect(x - 1.5, y - 1.5, 3, 3);
    });
    context.strokeStyle = colour;
    paths.forEach((path, n) => { const [x, y] = at(path[now()]); drawBall(context, n, [clamp(x, 7, width - 7), clamp(y, 7, height - 7)], 5.5); }); // a lost ball waits at the edge
  }
  function drawDistances(distances, colour) {
    const width = below.box.clientWidth || 500, height = below.box.clientHeight || 170, context = fit(below.canvas, width, height);
    const at = (n, d) => [44 + (n / most) * (width - 56), 8 + ((2 - clamp(Math.log10(Math.max(d, 1e-9)), -3, 2)) / 5) * (height - 34)];
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "middle", textAlign: "right" });
    for (const [d, text] of [[100, "100"], [10, "10"], [1, "1"], [0.1, "0.1"], [0.01, "0.01"], [0.001, "0.001"]]) {
      context.globalAlpha = 0.2;
      context.fillRect(44, Math.round(at(0, d)[1]), width - 56, 1);
      context.globalAlpha = 1;
      context.fillText(text, 39, at(0, d)[1]);
    }
    context.textAlign = "center";
    for (const n of [0, most / 2, most]) context.fillText(n, at(n, 1)[0], height - 10);
    distances.forEach((d, n) => trace(context, n, d.slice(0, now() + 1).map((value, k) => at(k, value))));
    context.strokeStyle = colour;
    distances.forEach((d, n) => drawBall(context, n, at(now(), d[now()]), 4));
  }

  function draw() {
    const state = Object.fromEntries(["rate", "factor", "stretch", "falls"].map((key) => [key, model.get(key)])), paths = roll(scene, state);
    const distances = paths.map((path) => path.map((p) => Math.hypot(...p))), colour = getComputedStyle(root).color, n = now();
    for (const { key, slider, number, place } of sliders) {
      slider.value = place(state[key]);
      number.textContent = `${key === "rate" ? "" : "× "}${write(state[key])}`;
      slider.setAttribute("aria-valuetext", number.textContent);
    }
    falls.checked = state.falls;
    drawValley(paths, colour);
    drawDistances(distances, colour);
    rows.forEach(({ mark, told }, k) => {
      const context = fit(mark, 18, 18);
      context.strokeStyle = colour;
      drawBall(context, k, [9, 9], 5);
      told.textContent = write(distances[k][n]);
    });
    const lost = [1, state.factor].flatMap((by, k) => (state.rate * by > 2 ? [balls[k]] : []));
    const text = `After ${n} of ${most} updates. ${lost.length ? `Rate × curvature is above 2 for ${lost.join(" and ")}: across the valley every step ends farther away than it began${state.falls ? ", until the rate has fallen" : ""}. ` : ""}`
      + `A step of fixed length is ${write(state.rate * (state.falls ? 1 - n / most : 1))} long now.`;
    if (verdict.textContent !== text) verdict.textContent = text;
    above.box.setAttribute("aria-label", `Valley ${short(state.stretch)} times as long as wide. ${balls.map((name, k) => `${name} at ${paths[k][n].map((w) => short(w)).join(", ")}`).join("; ")}`);
    below.box.setAttribute("aria-label", `Distances after ${n} updates: ${balls.map((name, k) => `${name} ${write(distances[k][n])}`).join(", ")}`);
    root.dataset.ready = "true";
  }

  const root = make("div", { class: "medseg-valley", role: "group", "aria-label": "A valley of two weights" },
    make("div", { class: "toolbar sliders" }, ...sliders.map((s) => s.box)),
    make("div", { class: "toolbar" }, button, make("button", { type: "button", "aria-label": "One update", onclick: step }, "Step"),
      make("button", { type: "button", onclick: () => { pause(); set("updates", 0); } }, "Reset"), make("label", {}, falls, make("span", {}, "Rate falls to zero"))),
    above.figure, list, below.figure, verdict,
    makeHelp(`Sliders, or their arrow keys: learning rate, factor, and shape of the valley. P: ${still ? "ten updates" : "run or pause"}. S: one update. The curvature is 1 across the valley. A ball that has left the picture waits at its edge.`));
  const press = ({ key }) => {
    if (key.toLowerCase() === "p") play();
    if (key.toLowerCase() === "s") step();
  };
  pause();
  const leave = mount(model, el, root, Object.fromEntries(["rate", "factor", "stretch", "falls", "updates"].map((key) => [key, draw])), { press, resized: draw });
  draw();
  return () => { clearInterval(playing); leave(); };
}
