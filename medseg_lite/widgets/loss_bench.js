// Loss bench: sliders for what is predicted inside and outside of two objects, four losses of it, and their push on each class.

/** Return a loss's part for each class, and the push on the true class's logit of one voxel and of all; `p[c][k]`: probability of class k where class c is true. */
function assess({ classes, weights }, counts, p, loss) {
  const each = (f) => classes.map((_, k) => f(k)), sum = (f) => classes.reduce((s, _, k) => s + f(k), 0);
  const one = each((k) => (loss[0] === "w" ? weights[k] : 1)), all = sum((k) => counts[k] * one[k]), slope = each(() => each(() => 0));
  const parts = each((k) => {
    const both = counts[k] * p[k][k];
    if (loss === "Jaccard distance") { // 1 - both / union
      const union = sum((c) => counts[c] * p[c][k] ** 2) + counts[k] - both;
      each((c) => { slope[c][k] = (both * (2 * p[c][k] - (c === k)) - (c === k) * union) / union ** 2; });
      return 1 - both / union;
    }
    if (loss === "Dice loss") { // mean over the objects, with 1 in numerator and denominator
      const sizes = sum((c) => counts[c] * p[c][k]) + counts[k] + 1, share = (2 * both + 1) / sizes;
      if (k) each((c) => { slope[c][k] = (share - 2 * (c === k)) / sizes / (classes.length - 1); });
      return k ? -share / (classes.length - 1) : 0;
    }
    slope[k][k] = -one[k] / all / p[k][k];
    return (-counts[k] * one[k] * Math.log(p[k][k])) / all;
  });
  // Through the softmax: the gradient of a logit is p times (slope - mean slope). An absent class has no voxel that is pushed.
  const push = each((c) => (counts[c] ? p[c][c] * (sum((k) => p[c][k] * slope[c][k]) - slope[c][c]) : 0));
  return { loss: sum((k) => parts[k]), parts, push, total: each((c) => counts[c] * push[c]) };
}

function render({ model, el }) {
  const scene = model.get("_scene"), { classes, losses, batches, colours, images, counts, side, ends } = scene, set = setter(model);
  const plane = { cut: 0, x: 2, y: 1 }, size = [1, side, side], turned = (packed) => bytes(packed).slice().reverse(); // slices run against the picture
  const [whole, empty] = images[batches[2]].map(turned), greys = scene.grey.map(turned), grey = greyTable({ low: 0, high: 255, window: [0, 255] });
  const write = (x) => x.toFixed(Math.abs(x) < 0.1 ? 4 : 3).replace("-", "−"), thousandths = (x) => short(1000 * x), percent = (x) => `${100 * x < 2 ? (100 * x).toFixed(1) : Math.round(100 * x)} %`;

  const sliders = [["large", "sure of the large one, inside it"], ["tiny", "sure of the tiny one, inside it"], ["alarm", "false alarm outside"]].map(([key, title]) => {
    const slider = makeRange(title, () => set(key, +slider.value), { min: ends[0], max: ends[1], step: 0.01 }), number = make("span", { class: "number" });
    return { key, slider, number, box: make("label", {}, make("span", {}, title), slider, number) };
  });
  const choices = [makeChoice(model, "Loss", "loss", losses), makeChoice(model, "of", "batch", batches, "Batch")];
  const preset = (text, large, tiny, alarm) => make("button", { type: "button", onclick: () => Object.entries({ large, tiny, alarm }).forEach((pair) => set(...pair)) }, text);
  const views = ["the image", "the empty image"].map((name, n) => {
    const canvas = make("canvas"), stage = make("div", { class: "stage", role: "img", "data-view": `image${n}` }, canvas);
    return { name, n, canvas, stage, figure: make("figure", {}, make("figcaption", {}, name), stage) };
  });
  const cell = () => { // a number above its arrow
    const text = make("span"), arrow = make("i", { class: "arrow" });
    return { text, arrow, box: make("td", {}, text, arrow) };
  };
  const rows = classes.map((name, k) => {
    const [part, one, all] = [make("td"), cell(), cell()], count = make("small");
    return { part, one, all, count, row: make("tr", {}, make("th", { scope: "row" }, make("i", { class: "swatch", style: `background: ${colours[k]}` }), name, count), part, one.box, all.box) };
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["class", "part of loss", "push on one (10⁻³)", "push on all (10⁻³)"].map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map((r) => r.row)));
  const value = make("output", { class: "value", "aria-live": "polite", "aria-label": "Loss" });

  function drawView({ n, canvas, stage, figure }, p) {
    figure.hidden = model.get("batch") === batches[1 - n];
    if (figure.hidden) return;
    const width = stage.clientWidth || 220, context = fit(canvas, width, width), truth = n ? empty : whole;
    stamp(context, sliceImage(greys[n], size, 0, plane, 0, grey), 0, 0, width, width);
    const kinds = truth.map((k, i) => k || 3 + ((i + Math.floor(i / side)) % 2)), alarm = 1 - p[0][0]; // the colours of both objects alternate outside
    const fill = [0, [1, p[1][1]], [2, p[2][2]], [1, alarm], [2, alarm]].map((look) => look && pixel(colours[look[0]], Math.round(255 * look[1])));
    stamp(context, sliceImage(kinds, size, 0, plane, 0, fill), 0, 0, width, width);
    drawOutline(context, [truth, size, plane, 0], [width / side, width / side], "#FFFFFF", "line");
    stage.setAttribute("aria-label", `Prediction in ${views[n].name}: false alarms ${percent(p[0][1] + p[0][2])}${n ? "" : `, large ${percent(p[1][1])}, tiny ${percent(p[2][2])}`}`);
  }

  function draw() {
    const [large, tiny, alarm] = sliders.map(({ key }) => model.get(key)), loss = model.get("loss"), batch = model.get("batch"), n = counts[batch];
    const p = [[1 - alarm, alarm / 2, alarm / 2], [1 - large, large, 0], [1 - tiny, 0, tiny]], found = assess(scene, n, p, loss);
    for (const { key, slider, number } of sliders) {
      slider.value = model.get(key);
      number.textContent = percent(model.get(key));
      slider.setAttribute("aria-valuetext", number.textContent);
    }
    for (const choice of choices) choice.show();
    const sum = found.total.reduce((a, b) => a + b), longest = { push: Math.max(...found.push), total: Math.max(...found.total) };
    rows.forEach(({ part, one, all, count, row }, k) => {
      row.className = n[k] ? "" : "absent";
      count.textContent = n[k] ? `${n[k]} voxels` : "absent";
      part.textContent = loss === "Dice loss" && !k ? "–" : write(found.parts[k]);
      one.text.textContent = n[k] ? thousandths(found.push[k]) : "–";
      all.text.textContent = n[k] ? `${thousandths(found.total[k])}, ${percent(found.total[k] / sum)}` : "–";
      for (const [{ arrow }, name] of [[one, "push"], [all, "total"]]) arrow.style.cssText = `width: ${(100 * found[name][k]) / longest[name]}%; color: ${colours[k]}`;
    });
    const tail = n[2] ? ` The tiny class, ${percent(n[2] / (n[0] + n[1] + n[2]))} of the voxels, gets ${percent(found.total[2] / sum)} of the push.`
      : loss === "Jaccard distance" ? " The two absent classes cost 1 each, whatever is predicted." : "";
    const text = `${loss} of ${batch}: ${write(found.loss)}.${tail}`;
    if (value.textContent !== text) value.textContent = text;
    for (const view of views) drawView(view, p);
    root.dataset.ready = "true";
  }

  const root = make("div", { class: "medseg-bench", role: "group", "aria-label": "Loss bench" },
    make("div", { class: "toolbar" }, ...choices.map((c) => c.box), preset("All background", ...[0, 0, 0].map(() => ends[0])), preset("Unsure", 0.5, 0.5, 0.5), preset("All found", ends[1], ends[1], ends[0])),
    make("div", { class: "toolbar sliders" }, ...sliders.map((s) => s.box)), value,
    make("div", { class: "both" }, make("div", { class: "panels" }, ...views.map((v) => v.figure)), table),
    makeHelp("Sliders, or their arrow keys: what the network says. The white line is the truth; the stronger a colour, the more probable its class is said to be; outside, half of the false alarm goes to each object. An arrow is the push towards the right answer; the longest one in each column fills it."));
  const leave = mount(model, el, root, Object.fromEntries(["loss", "batch", ...sliders.map((s) => s.key)].map((name) => [name, draw])), { resized: draw });
  draw();
  return leave;
}
