// You are the network: a voxel is labelled from its near view, then again with the wide one; then the truth is shown.

function render({ model, el }) {
  const { truth, answers, names, side, factor, plane, colours } = model.get("_scene"), set = setter(model), count = truth.length;
  const grey = greyTable({ low: 0, high: 255, window: [0, 255] }), size = [side, side, 1];
  const step = () => { // what is asked now: "near", "wide", or nothing, because the voxel is answered
    const done = model.get("wide").length > model.get("asked");
    return done ? "shown" : model.get("near").length > model.get("asked") ? "wide" : "near";
  };

  const answer = (lesion) => { if (step() !== "shown") set(step(), [...model.get(step()), lesion]); };
  function goOn() {
    if (step() !== "shown") return;
    if (model.get("asked") < count - 1) return set("asked", model.get("asked") + 1);
    for (const [name, value] of [["near", []], ["wide", []], ["asked", 0]]) set(name, value);
  }

  // -------------------------------------------------------------------------------------------------------- pictures
  const makeView = (name, title, label) => {
    const canvas = make("canvas"), stage = make("div", { class: "stage", role: "img", "data-view": name, "aria-label": label }, canvas);
    return { canvas, stage, box: make("figure", {}, make("figcaption", {}, make("b", {}, title)), stage) };
  };
  const near = makeView("near", `${side}² voxels around it`, `The voxel, framed, and the ${side} by ${side} voxels around it in its slice`);
  const wide = makeView("wide", "every third voxel, three times as wide", "The same voxel in a view three times as wide, of every third voxel; the near view is framed");

  function drawView({ canvas, stage }, kind, framed) {
    const data = model.get("_views")[model.get("asked")].map(bytes), width = stage.clientWidth || 240, cell = width / side;
    const context = fit(canvas, width, width);
    stamp(context, sliceImage(data[kind], size, 0, plane, 0, grey), 0, 0, width, width);
    if (step() === "shown") drawBorders(context, borders(data[kind + 2], size, plane, 0, (a, b) => a !== b), [cell, cell], colours.truth);
    Object.assign(context, { strokeStyle: "#F0E442", lineWidth: 2 });
    const box = framed * cell;
    context.strokeRect((width - box) / 2, (width - box) / 2, box, box);
  }

  function draw() {
    const now = step(), asked = model.get("asked"), given = { near: model.get("near"), wide: model.get("wide") };
    wide.box.hidden = now === "near";
    drawView(near, 0, 1);
    if (now !== "near") drawView(wide, 1, side / factor);
    const right = (kind, n) => given[kind][n] === truth[n], last = asked === count - 1;
    const said = { near: `Voxel ${asked + 1} of ${count}. Is the framed voxel lesion?`, wide: "Now with the wide view. Lesion or not?" };
    said.shown = `It is ${answers[+truth[asked]]} (${names[asked]}). Without the wide view you were ${right("near", asked) ? "right" : "wrong"}, with it ${right("wide", asked) ? "right" : "wrong"}.`;
    if (question.textContent !== said[now]) question.textContent = said[now];
    for (const button of choices) button.hidden = now === "shown";
    next.hidden = now !== "shown";
    next.textContent = last ? "Start again" : "Next voxel";
    for (const [kind, row] of Object.entries(rows)) {
      const done = given.wide.length, good = given[kind].slice(0, done).filter((_, n) => right(kind, n)).length; // no verdict before both answers
      row.replaceChildren(make("th", { scope: "row" }, kind === "near" ? "without" : "with"), ...truth.map((_, n) => make("td", {}, n < done ? (right(kind, n) ? "✓" : "✗") : "·")), make("td", { class: "sum" }, `${good} of ${done}`));
    }
    root.dataset.step = now;
  }

  // -------------------------------------------------------------------------------------------------------- controls
  const question = make("output", { class: "question", "aria-live": "polite", "aria-label": "Question" });
  const choices = [1, 0].map((k) => make("button", { type: "button", onclick: () => act(() => answer(k === 1)) }, k ? "Lesion" : "Not a lesion"));
  const next = make("button", { type: "button", onclick: () => act(goOn) });
  const rows = { near: make("tr"), wide: make("tr") };
  const head = make("tr", {}, make("td"), ...truth.map((_, n) => make("th", { scope: "col" }, String(n + 1))), make("th", { scope: "col" }, "right"));
  const scores = make("table", { "aria-label": "Your answers without and with the wide view" }, make("tbody", {}, head, rows.near, rows.wide));

  /** Do something, and keep the focus on a button that is still there. */
  function act(what) {
    const inside = root.contains(document.activeElement);
    what();
    if (inside) (next.hidden ? choices[0] : next).focus();
  }
  const root = make("div", { class: "medseg-network", role: "group", "aria-label": "You are the network", tabindex: -1 },
    question, make("div", { class: "buttons" }, ...choices, next), make("div", { class: "panels" }, near.box, wide.box), scores,
    makeHelp("Keys: L says lesion, N says not a lesion, Enter goes on. Half of the voxels are lesion; the others are as bright. The yellow frame is the voxel, and in the wide view the field of the near one."));
  const press = (event) => {
    const key = event.key.toLowerCase();
    if (key === "l" || key === "n") act(() => answer(key === "l"));
  };
  const leave = mount(model, el, root, { asked: draw, near: draw, wide: draw }, { press, resized: draw });
  draw();
  root.dataset.ready = "true";
  return leave;
}
