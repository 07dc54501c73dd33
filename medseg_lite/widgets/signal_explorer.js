// Signal explorer: three curves over the layers of an untrained network. Every setting was computed in Python; here one is chosen and drawn.

const ROOM = { left: 44, right: 10, top: 8, bottom: 34, height: 230 }; // around the curves, in pixels
const KEYS = ["start", "slope", "depth", "normalise"], NAMES = { signal: "signal", gradient: "gradient", update: "first update" };
const power = (log) => (10 ** log).toExponential(1).replace("e+0", "").replace("-", "−");

function render({ model, el }) {
  const { options, states, ends, panels, negligible } = model.get("_scene"), set = setter(model);
  let shown = null, former = null; // curves of the present setting, and of the one before

  /** Return the logarithms by layer of the present setting: signal, gradient, kernel_gradient, update. */
  function curvesNow() {
    const state = states[KEYS.map((key) => options[key].indexOf(model.get(key))).join("|")];
    return { ...state, update: state.update[options.epsilon.indexOf(model.get("epsilon"))] };
  }

  // ------------------------------------------------------------------------------------------------------ controls
  const write = { start: String, slope: String, depth: String, normalise: (on) => (on ? "batch normalisation" : "none"), epsilon: (e) => e.toExponential(0) };
  function choice(title, key) {
    const select = make("select", { "aria-label": title, onchange: () => set(key, options[key][select.selectedIndex]) }, ...options[key].map((v) => make("option", {}, write[key](v))));
    return { key, select, box: make("label", {}, make("span", {}, title), select) };
  }
  const choices = [choice("Start", "start"), choice("Slope", "slope"), choice("Layers", "depth"), choice("Normalisation", "normalise")];
  const epsilon = makeRange("Epsilon", () => set("epsilon", options.epsilon[options.epsilon.length - 1 - epsilon.value]), { max: options.epsilon.length - 1 });
  const layer = makeRange("Layer", () => set("layer", +layer.value), { min: 1 });
  const told = [make("span", { class: "number" }), make("span", { class: "number" })], readout = makeReadout("Numbers of the layer");

  // -------------------------------------------------------------------------------------------------------- curves
  const plots = Object.keys(panels).map((name) => {
    const canvas = make("canvas"), box = make("div", { class: "plot", role: "img", "data-view": name }, canvas);
    drag(box, (event) => {
      const r = box.getBoundingClientRect(), share = (event.clientX - r.left - ROOM.left) / (r.width - ROOM.left - ROOM.right);
      set("layer", clamp(Math.round(share * (model.get("depth") - 1)) + 1, 1, model.get("depth")));
    });
    return { name, canvas, box, figure: make("figure", {}, make("figcaption", {}, NAMES[name]), box) };
  });

  function drawPlot({ name, canvas, box }) {
    const width = box.clientWidth || 280, { left, right, top, bottom, height } = ROOM, [low, high] = ends[name], depth = shown.signal.length;
    const context = fit(canvas, width, height), colour = getComputedStyle(root).color, across = width - left - right, tall = height - top - bottom;
    const x = (k, count) => left + (k / (count - 1)) * across, y = (log) => top + ((high - clamp(log, low, high)) / (high - low)) * tall;
    Object.assign(context, { font: "11px system-ui, sans-serif", fillStyle: colour, strokeStyle: colour, textBaseline: "middle", textAlign: "right" });
    const every = Math.ceil((high - low) / 6);
    for (let log = high; log >= low; log -= every) {
      context.globalAlpha = 0.2;
      context.fillRect(left, Math.round(y(log)), across, 1);
      context.globalAlpha = 1;
      context.fillText(log ? `1e${log}`.replace("-", "−") : "1", left - 6, y(log));
    }
    Object.assign(context, { textAlign: "center", textBaseline: "top" });
    for (let k = 0; k < depth; k += depth > 8 ? 2 : 1) context.fillText(k + 1, x(k, depth), top + tall + 4);
    context.fillText("layer", left + across / 2, top + tall + 18);
    const line = (logs, alpha, lineWidth, dash, dots) => {
      Object.assign(context, { globalAlpha: alpha, lineWidth });
      context.setLineDash(dash);
      context.beginPath();
      logs.forEach((log, k) => context.lineTo(x(k, logs.length), y(log)));
      context.stroke();
      context.setLineDash([]);
      if (dots) logs.forEach((log, k) => { context.beginPath(); context.arc(x(k, logs.length), y(log), k + 1 === model.get("layer") ? 6 : 3, 0, 7); context.fill(); });
    };
    if (name === "update") line([negligible, negligible], 0.8, 1, [2, 4]);
    panels[name].forEach((curve, n) => {
      if (former && String(former[curve]) !== String(shown[curve])) line(former[curve], 0.35, 1, n ? [6, 4] : [], false);
      line(shown[curve], 1, 2, n ? [6, 4] : [], true);
    });
    context.globalAlpha = 1;
    box.setAttribute("aria-label", `${NAMES[name]}: ${panels[name].map((c) => `${c.replace("_", " ")} ${power(shown[c][0])} in layer 1, ${power(shown[c][depth - 1])} in layer ${depth}`).join("; ")}`);
  }

  function draw() {
    const k = model.get("layer") - 1;
    for (const { key, select } of choices) select.selectedIndex = options[key].indexOf(model.get(key));
    epsilon.value = options.epsilon.length - 1 - options.epsilon.indexOf(model.get("epsilon"));
    told[0].textContent = write.epsilon(model.get("epsilon"));
    epsilon.setAttribute("aria-valuetext", told[0].textContent);
    layer.max = model.get("depth");
    layer.value = k + 1;
    told[1].textContent = `${k + 1} / ${layer.max}`;
    tell(readout, [["signal", power(shown.signal[k])], ["gradient", power(shown.gradient[k])], ["gradient of the kernel", power(shown.kernel_gradient[k])],
      ["first update", power(shown.update[k])], ["of what it would be without epsilon", `${(100 * 10 ** (shown.update[k] - negligible)).toPrecision(2)} %`]]);
    plots.forEach(drawPlot);
    root.dataset.ready = "true";
  }
  function turn() { // to another setting
    if (model.get("layer") > model.get("depth")) set("layer", model.get("depth"));
    former = shown;
    shown = curvesNow();
    draw();
  }

  const root = make("div", { class: "medseg-signal", role: "group", "aria-label": "Signal, gradient and first update" },
    make("div", { class: "toolbar" }, ...choices.map((c) => c.box), make("label", {}, make("span", {}, "Epsilon"), epsilon, told[0]), make("label", {}, make("span", {}, "Layer"), layer, told[1])),
    make("div", { class: "panels" }, ...plots.map((p) => p.figure)), readout,
    make("ul", { class: "key", "aria-label": "Lines" }, make("li", {}, "Root mean squares"),
      ...[["2px dashed", "gradient of the kernel"], ["2px dotted", "update without epsilon"], ["1px solid", "the setting before"]].map(([line, text]) => make("li", {}, make("i", { style: `border-top: ${line}` }), text))),
    makeHelp("Tab goes from control to control, the arrow keys change one. Click or drag in a curve: layer. Epsilon is the constant inside RMSProp's root; it gets smaller to the left."));
  shown = curvesNow();
  const leave = mount(model, el, root, { ...Object.fromEntries([...KEYS, "epsilon"].map((name) => [name, turn])), layer: draw }, { resized: draw });
  draw();
  return leave;
}
