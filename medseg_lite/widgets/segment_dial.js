// Segment dial: a cube of predicted voxels, what it sees around itself, and a ball of lesion, on a slice that can be dragged over.

function render({ model, el }) {
  const scene = model.get("_scene"), { shape, start, spacing, field, centre, colours, largest, costs, shares } = scene, set = setter(model);
  const { planeNow, move, moveTo, pointAt } = navigate(model, scene), plane = planeNow(), [mm] = spacing;
  const size = shape.map((n, axis) => (axis === plane.cut ? 1 : n)), strides = [size[1] * size[2], size[2], 1];
  let volume = null;

  const inBall = (voxel) => voxel.reduce((sum, v, axis) => sum + (v - centre[axis]) ** 2, 0) <= model.get("radius") ** 2;
  /** Return how many of the predicted voxels are lesion. */
  function captured() {
    const half = (model.get("output") - 1) / 2, [x, y, z] = model.get("position");
    let count = 0;
    for (let i = -half; i <= half; i++) for (let j = -half; j <= half; j++) for (let k = -half; k <= half; k++) count += inBall([x + i, y + j, z + k]);
    return count;
  }
  const cube = (n) => `${n}³`, percent = (share) => `${(100 * share).toFixed(1)} %`;

  function draw() {
    if (!volume) return;
    const position = model.get("position"), output = model.get("output"), half = (output - 1) / 2, seen = output + field - 1, index = position[plane.cut];
    const kinds = new Uint8Array(size[0] * size[1] * size[2]); // bits: 1 ball, 2 predicted, 4 seen
    for (let a = 0; a < shape[plane.x]; a++)
      for (let b = 0; b < shape[plane.y]; b++) {
        const voxel = [0, 0, 0];
        voxel[plane.x] = a + start[plane.x];
        voxel[plane.y] = b + start[plane.y];
        voxel[plane.cut] = index;
        const away = Math.max(...voxel.map((v, axis) => Math.abs(v - position[axis])));
        kinds[a * strides[plane.x] + b * strides[plane.y]] = inBall(voxel) + 2 * (away <= half) + 4 * (away <= half + (field - 1) / 2);
      }
    const aspect = spacing[plane.y] / spacing[plane.x], width = stage.clientWidth || 400, height = (width * shape[plane.y] * aspect) / shape[plane.x];
    stage.style.aspectRatio = `${shape[plane.x]} / ${shape[plane.y] * aspect}`;
    const context = fit(canvas, width, height), scale = [width / shape[plane.x], height / shape[plane.y]];
    const fill = Uint32Array.from({ length: 256 }, (_, k) => (k & 2 ? pixel(colours[`predicted, ${k & 1 ? "lesion" : "background"}`], 160) : 0));
    stamp(context, sliceImage(volume, shape, 0, plane, index - start[plane.cut], greyTable(scene.sequences[0])), 0, 0, width, height);
    stamp(context, sliceImage(kinds, size, 0, plane, 0, fill), 0, 0, width, height);
    const line = (bit, colour) => drawBorders(context, borders(kinds, size, plane, 0, (a, b) => (a & bit) !== (b & bit)), scale, colour);
    line(1, colours.lesion);
    line(4, colours.seen);
    drawLetters(context, plane, width, height);

    const count = captured(), voxels = output ** 3, cost = costs[half], mean = shares[model.get("radius") - 1][half];
    sliders.output.value = output;
    sliders.radius.value = model.get("radius");
    sliders.output.setAttribute("aria-valuetext", `${cube(output)} predicted, segment ${cube(seen)}`);
    told.output.textContent = `${cube(output)}, S-${seen}`;
    told.radius.textContent = `${model.get("radius")} voxels, ${short(model.get("radius") * mm)} mm`;
    tell(readout, [["sees", `${cube(seen)} voxels, ${short(seen * mm)} mm a side`], ["predicts, V", `${voxels} voxels`],
      ["a voxel costs", `${short(cost / voxels / 1e6)} million multiplications, ${short((costs[0] * voxels) / cost)} times less than a patch`],
      ["lesion here", `${count} of ${voxels}, ${percent(count / voxels)}`], ["lesion, mean over all segments centred on it", percent(mean)]]);
    root.dataset.ready = "true";
  }

  const canvas = make("canvas");
  const stage = make("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": "segment",
    "aria-label": "Axial slice with the segment and the lesion. Arrow keys move the segment, Page Up and Page Down move it to another slice." }, canvas);
  drag(stage, (event) => moveTo(pointAt(stage, event)));
  steer(stage, planeNow, shape, move);
  const sliders = {}, told = {};
  const row = (key, title, options) => {
    sliders[key] = makeRange(title, () => set(key, +sliders[key].value), options);
    told[key] = make("span", { class: "number" });
    return make("label", {}, make("span", {}, title), sliders[key], told[key]);
  };
  const readout = makeReadout("The segment");
  const swatches = Object.entries(colours).map(([name, colour]) => make("li", {}, make("i", { class: name.startsWith("predicted") ? "" : "line", style: `background: ${colour}` }), name));
  const root = make("div", { class: "medseg-segment", role: "group", "aria-label": `A training segment over ${scene.title}` },
    make("div", { class: "toolbar" }, row("output", "side of the output", { min: 1, max: largest[0], step: 2 }), row("radius", "radius of the lesion", { min: 1, max: largest[1] }),
      make("button", { type: "button", onclick: () => moveTo(centre) }, "Centre on the lesion")),
    make("div", { class: "both" }, stage, readout), make("ul", { class: "key", "aria-label": "Colours" }, ...swatches),
    makeHelp("Drag, or arrow keys on the picture: move the segment, with Shift ten voxels. Page Up and Page Down, or the wheel after a click: another slice. The lesion stays where it is."));
  const leave = mount(model, el, root, { output: draw, radius: draw, position: draw }, { resized: draw });
  unpack(model.get("_volumes")[0]).then((data) => { volume = data; draw(); });
  return leave;
}
