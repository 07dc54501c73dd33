// Interventions of the feature explorer: channels silenced or scaled, the untrained twin, and the earlier maps that feed a channel.
// Python computes predictions and paths when they are asked for; a page of its own has some of them stored.

const answered = new WeakMap(); // widget model -> {key: answer}, shared by all views of one widget

/** Build the controls and the results. `channelNow()` is the chosen channel of the first panel; `slice(context, width, height)` draws
    the input, and returns the arguments of `borders` for the truth, or null. */
function makeInterventions(model, scene, { planeNow, channelNow, slice }) {
  const { shape, spacing, predicted } = scene, set = setter(model);
  if (!answered.has(model)) answered.set(model, { ...model.get("_answers") });
  const inOrder = (a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]), two = (x) => x.toFixed(2).replace("-", "−");
  const changes = () => [...model.get("changes")].sort(inOrder);
  const factorOf = (layer, channel) => changes().find(([name, c]) => name === layer && c === channel)?.[2] ?? 1;
  const sliceKey = (list) => `${+model.get("untrained")}/${model.get("plane")}/${model.get("position")[planeNow().cut]}/${list.map((c) => c.join(":")).join(" ")}`;
  const pathKey = () => `${+model.get("untrained")}/${model.get("layer")}:${channelNow()}`;
  let busy = false; // whether Python is at work; it is asked one thing at a time, so that a drag leaves no queue

  function answer(key, question) {
    const found = answered.get(model)[key];
    if (found || busy || scene.exported) return found;
    busy = true;
    model.send(question);
  }
  function onAnswer(content, buffers) {
    busy = false;
    answered.get(model)[content.answer] = { ...content, labels: buffers[0] };
    show();
  }

  // ------------------------------------------------------------------------------------------------------- controls
  function scale(factor) {
    const layer = model.get("layer"), channel = channelNow(), others = changes().filter(([name, c]) => name !== layer || c !== channel);
    set("changes", factor === 1 ? others : [...others, [layer, channel, factor]].sort(inOrder));
  }
  const toggleSilence = () => scale(factorOf(model.get("layer"), channelNow()) === 0 ? 1 : 0);
  const reset = () => set("changes", []);
  const toggle = (key) => () => set(key, !model.get(key));
  const silence = make("button", { type: "button", onclick: toggleSilence });
  const slider = makeRange("Factor of the channel", () => scale(+slider.value), { min: 0, max: 2, step: 0.05 }), number = make("span", { class: "number" });
  const restore = make("button", { type: "button", onclick: reset }, "Reset");
  const twin = make("button", { type: "button", onclick: toggle("untrained"), title: "The same layer of the same architecture with fresh weights" }, "Untrained twin");
  const hasTwin = () => scene.twin && (!scene.exported || Object.keys(model.get("_maps")).some((key) => key.startsWith("2/")));
  const path = make("button", { type: "button", onclick: toggle("path"), title: "The earlier maps that feed this channel most: norm of the kernel times standard deviation of the map" }, "Fed by");
  const links = make("span", { class: "links" });
  const controls = make("div", { class: "toolbar intervene", role: "group", "aria-label": "Interventions" },
    make("span", { class: "together" }, silence, make("label", {}, make("span", {}, "×"), slider, number), restore), twin, make("span", { class: "together" }, path, links));

  function jump(layer, channel) {
    if (!layer) return set("sequence", scene.sequences[channel].name);
    model.set("layer", layer); // both in one message, because a layer may lack the old channel
    model.set("channel", channel);
    model.save_changes();
  }
  function showPath() {
    path.setAttribute("aria-pressed", String(model.get("path")));
    links.hidden = !model.get("path");
    if (links.hidden) return;
    const key = pathKey(), found = answer(key, { path: true });
    const shown = `${key} ${!found}`;
    if (links.dataset.shown === shown) return; // keeps the focus where it is
    links.dataset.shown = shown;
    if (!found) links.replaceChildren(scene.exported ? "needs a running kernel for this layer" : "Python computes …");
    else if (!found.from.length) links.replaceChildren("this layer is not one convolution");
    else links.replaceChildren(...found.from.map(([layer, channel, strength]) => make("button", {
      type: "button", onclick: () => jump(layer, channel), title: `strength ${short(strength)}`,
    }, layer ? `${layer}, channel ${channel}` : `input ${scene.sequences[channel].name}`)));
  }

  // -------------------------------------------------------------------------------------------------------- results
  const views = ["network as it is", "with the changes"].map((title, changed) => {
    const canvas = make("canvas"), stage = make("div", { class: "stage", role: "img", "data-view": changed ? "after" : "before" }, canvas);
    return { canvas, stage, changed, title, box: make("figure", {}, make("figcaption", {}, title), stage) };
  });
  const note = make("output", { class: "note", "aria-live": "polite", "aria-label": "What is changed" }), rows = make("tbody");
  const heads = ["class", "Dice as it is", "with the changes", "change"].map((text) => make("th", { scope: "col" }, text));
  const table = make("table", {}, make("caption", {}, "Dice in this slice"), make("thead", {}, make("tr", {}, ...heads)), rows);
  const painted = make("li", {}, make("i", { class: "painted" }), "predicted otherwise"), truth = make("li", {}, make("i", { class: "dotted" }), "truth");
  const others = predicted.filter(([k]) => !scene.classes.some(([known]) => known === k)); // the key below has those of the truth
  const key = make("ul", { class: "key", "aria-label": "Marks" }, ...others.map(([, name, colour]) =>
    make("li", {}, make("i", { style: `--class-colour: ${colour}` }), name)), painted, truth);
  const results = make("section", { class: "results", "aria-label": "Prediction with the changes" }, note,
    make("div", { class: "before-after" }, ...views.map((v) => v.box), table), key);
  const overlay = Uint32Array.from({ length: 256 }, (_, k) => (k ? pixel("#CC79A7", 190) : 0));

  async function showResults() {
    const list = changes();
    results.hidden = !list.length;
    if (results.hidden) return;
    const keys = [sliceKey([]), sliceKey(list)], before = answer(keys[0], { predict: "whole" }), after = answer(keys[1], { predict: "changes" });
    const what = list.map(([layer, channel, factor]) => `${layer}, channel ${channel} × ${short(factor)}`).join("; ");
    const why = scene.exported ? "This needs a running kernel: open the notebook. The page has each map of the exported layer silenced alone, in the exported slice." : "Python computes …";
    const text = before && after ? `${what}.` : scene.exported && !Object.keys(answered.get(model)).some((name) => name.endsWith("/"))
      ? `${what}. Silencing needs a running kernel: open the notebook.` : `${what}. ${why}`;
    if (note.textContent !== text) note.textContent = text;
    results.dataset.waiting = String(!(before && after));
    table.hidden = !before || !Object.keys(before.dice).length;
    const cell = (x) => make("td", {}, x === null || x === undefined ? "–" : two(x));
    rows.replaceChildren(...Object.entries(before?.dice ?? {}).map(([name, dice]) => {
      const now = after?.dice[name];
      return make("tr", {}, make("th", { scope: "row" }, name), cell(dice), cell(now), cell(now === undefined || now === null || dice === null ? null : now - dice));
    }));
    for (const one of [before, after]) if (one) one.data ??= await unpack(one.labels);
    if (!model.get("changes").length || sliceKey(changes()) !== keys[1]) return; // changed meanwhile
    drawResults(before, after, what);
  }

  function drawResults(before, after, what) {
    const plane = planeNow(), { x, y, cut } = plane, size = [...shape];
    size[cut] = 1;
    for (const { canvas, stage, changed, title } of views) {
      const width = stage.clientWidth || 240, height = (width * shape[y] * spacing[y]) / (shape[x] * spacing[x]), scale = [width / shape[x], height / shape[y]];
      stage.style.aspectRatio = `${width} / ${height}`;
      const context = fit(canvas, width, height), answer = changed ? after : before, truthNow = slice(context, width, height);
      truth.hidden = !truthNow;
      painted.hidden = !(before && after);
      if (changed && before && after)
        stamp(context, sliceImage(after.data.map((k, i) => +(k !== before.data[i])), size, 0, plane, 0, overlay), 0, 0, width, height);
      if (truthNow) drawBorders(context, borders(...truthNow, (a, b) => !a !== !b), scale, "#ffffff", { style: "dots", width: 1.2 });
      for (const [k, , colour] of answer ? predicted : [])
        drawBorders(context, borders(answer.data, size, plane, 0, (a, b) => (a === k) !== (b === k)), scale, colour, { width: 1.6 });
      stage.setAttribute("aria-label", `Slice with the outlines of the prediction of the ${title}${changed ? `: ${what}` : ""}`);
    }
    results.dataset.drawn = String(+(results.dataset.drawn ?? 0) + 1);
  }

  function show() {
    const channel = channelNow(), factor = factorOf(model.get("layer"), channel);
    silence.textContent = `Silence channel ${channel}`;
    silence.setAttribute("aria-pressed", String(factor === 0));
    slider.value = factor;
    slider.setAttribute("aria-valuetext", `times ${short(factor)}`);
    number.textContent = factor.toFixed(2);
    restore.disabled = !model.get("changes").length;
    twin.hidden = !hasTwin();
    twin.setAttribute("aria-pressed", String(model.get("untrained")));
    showPath();
    showResults();
  }
  const forget = () => { busy = false; answered.set(model, {}); delete links.dataset.shown; show(); };
  const keys = { x: toggleSilence, r: reset, u: () => { if (hasTwin()) toggle("untrained")(); }, p: toggle("path") };
  return { controls, results, factorOf, show, onAnswer, forget, press: (event) => keys[event.key]?.() };
}
