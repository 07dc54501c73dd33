// Slice viewer: three planes of one volume with overlays, drawn on canvases. The volume comes once; every step is drawn here,
// and the kernel is only told about it. Both axes of each picture run against the array's, so pixel u shows index n - 1 - u.

function render({ model, el }) {
  const scene = model.get("_scene"); // shape, spacing, planes, channels; never changes
  const { shape, spacing, channels } = scene;
  const { moveTo, move, pointAt, at } = navigate(model, scene), set = setter(model);
  const volumes = []; // unpacked channels, by number
  let grey = null; // stored value -> pixel
  let volume = null;
  let layers = []; // visible or not: {name, style, colour, data, colours: Uint32Array(256), names}

  const channelNumber = () => channels.findIndex((c) => c.name === model.get("channel"));
  const windowNow = () => model.get("windows")[model.get("channel")];
  const setWindow = (low, high) => {
    const { low: least, high: most } = channels[channelNumber()], step = (most - least) / 255;
    low = clamp(low, least, most - step);
    set("windows", { ...model.get("windows"), [model.get("channel")]: [low, clamp(high, low + step, most)] });
  };
  const toggle = (name) => {
    const shown = model.get("visible");
    set("visible", layers.map((l) => l.name).filter((n) => shown.includes(n) !== (n === name)));
  };

  // ------------------------------------------------------------------------------------------------------- planes
  const millimetres = scene.planes.map(({ x, y }) => [shape[x] * spacing[x], shape[y] * spacing[y]]);
  const scale = Math.min(860 / millimetres.reduce((sum, [w]) => sum + w, 0), 380 / Math.max(...millimetres.map(([, h]) => h)));

  const views = scene.planes.map((plane, number) => {
    const { name, cut, x, y, edges } = plane, width = shape[x], height = shape[y];
    const canvas = make("canvas", { width, height }), lines = make("canvas", { class: "lines" }); // voxels, and outlines as sharp as the screen
    const [across, down] = [make("i", { class: "across" }), make("i", { class: "down" })];
    const letters = [...edges].map((letter, i) => make("b", { class: ["left", "right", "top", "bottom"][i] }, letter));
    const stage = make("div", {
      class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-plane": name.toLowerCase(),
      "aria-label": `${name} slice. Arrow keys move the crosshair, Page Up and Page Down change the slice.`,
    }, canvas, lines, across, down, ...letters);
    const slide = () => move(cut, +slider.value - model.get("position")[cut]);
    const slider = makeRange(`${name} slice`, slide, { min: 0, max: shape[cut] - 1, disabled: shape[cut] === 1 });
    const count = make("span", { class: "number" });
    const [wide, high] = millimetres[number];
    const box = make("figure", { style: `flex: ${wide} 1 ${0.68 * wide * scale}px; max-width: ${wide * scale}px` },
      make("figcaption", {}, make("span", {}, name), slider, count), stage);
    stage.style.aspectRatio = `${wide} / ${high}`;
    // Few voxels stay visible as squares; many are smoothed, because uneven squares look like structure.
    canvas.classList.toggle("squares", (wide * scale) / width >= 3);

    let grip = null; // where a right-button drag began, and the window then
    drag(stage, (event) => moveTo(pointAt(stage, event, plane)), (event) => {
      if (event.type === "pointerdown") grip = [event.clientX, event.clientY, ...windowNow()];
      const [x0, y0, low, high] = grip, perPixel = (channels[channelNumber()].high - channels[channelNumber()].low) / 300;
      const level = (low + high) / 2 + (event.clientY - y0) * perPixel;
      const half = Math.max((high - low) / 2 + (event.clientX - x0) * perPixel / 2, perPixel / 2);
      setWindow(level - half, level + half);
    });
    steer(stage, () => plane, shape, move);
    return { ...plane, width, height, stage, lines, box, slider, count, across, down, context: canvas.getContext("2d"), drawn: -1 };
  });

  // ------------------------------------------------------------------------------------------------------ drawing
  function draw(view, position) {
    const { context, width, height, cut } = view, opacity = model.get("opacity"), visible = model.get("visible");
    context.putImageData(sliceImage(volume, shape, 0, view, position[cut], grey), 0, 0);
    const wide = view.stage.clientWidth, high = view.stage.clientHeight, sharp = fit(view.lines, wide, high);
    for (const { name, style, colour, data, colours } of layers) {
      if (!visible.includes(name)) continue;
      if (style in DASHES) {
        sharp.globalAlpha = Math.min(1, opacity * 2); // thin lines look fainter than areas
        drawOutline(sharp, [data, shape, view, position[cut]], [wide / width, high / height], colour, style);
        continue;
      }
      context.globalAlpha = opacity;
      stamp(context, sliceImage(data, shape, 0, view, position[cut], colours), 0, 0, width, height);
    }
    context.globalAlpha = 1;
    view.drawn = position[cut];
  }

  function place() { // only planes whose slice changed are drawn again
    if (!volume) return;
    const position = model.get("position");
    for (const view of views) {
      if (view.drawn !== position[view.cut]) draw(view, position);
      view.down.style.left = `${((view.width - position[view.x] - 0.5) / view.width) * 100}%`;
      view.across.style.top = `${((view.height - position[view.y] - 0.5) / view.height) * 100}%`;
      view.slider.value = position[view.cut];
      view.count.textContent = `${position[view.cut]} / ${shape[view.cut] - 1}`;
    }
    const { low, high, name } = channels[channelNumber()];
    const facts = [["voxel", position.join(", ")], [name, short(low + (volume[at(position)] * (high - low)) / 255)]];
    for (const { name, style, data, names } of layers) {
      const value = data[at(position)];
      facts.push([name, style === "probability" ? (value / 255).toFixed(2) : `${value} ${names[value] ?? ""}`]);
    }
    tell(readout, facts);
  }

  function redraw() {
    if (!volume) return;
    for (const view of views) view.drawn = -1;
    place();
  }

  // ----------------------------------------------------------------------------------------------------- controls
  const group = `channel-${Math.random().toString(36).slice(2)}`; // radio buttons of two viewers must not share a name
  const radios = channels.map(({ name }, number) => make("input", {
    type: "radio", name: group, value: number, onchange: () => set("channel", name),
  }));
  const sequence = make("fieldset", { class: "sequence" }, make("legend", {}, "Sequence"),
    ...channels.map(({ name }, number) => make("label", {}, radios[number], make("span", {}, name))));

  const low = makeRange("Window: intensity shown as black", () => setWindow(Math.min(+low.value, windowNow()[1]), windowNow()[1]), { step: "any" });
  const high = makeRange("Window: intensity shown as white", () => setWindow(windowNow()[0], Math.max(+high.value, windowNow()[0])), { step: "any" });
  const limits = make("span", { class: "number" });
  const reset = make("button", { type: "button", title: "Back to the window it opened with", onclick: () => setWindow(...channels[channelNumber()].window) }, "Reset");
  const windowing = make("fieldset", {}, make("legend", {}, "Window"), make("label", {}, "black", low), make("label", {}, "white", high), limits, reset);

  const boxes = make("span", { class: "boxes" });
  const opacity = makeOpacity(model, "Opacity of the overlays");
  const overlays = make("fieldset", {}, make("legend", {}, "Overlays"), boxes, make("label", { class: "opacity" }, "Opacity", opacity));
  const legend = make("ul", { class: "key", "aria-label": "Classes" });
  const readout = makeReadout("At the crosshair");
  const help = makeHelp("Click or drag: crosshair. Click, then wheel; Page Up and Page Down: slice. Right-drag: window (across: width, up and down: level). "
    + "Arrow keys: crosshair, with Shift ten voxels. 1 to 9: sequence. O: overlays on or off.");

  const root = make("div", { class: "medseg-slices", role: "group", "aria-label": `Slice viewer: ${scene.title}` },
    make("div", { class: "toolbar" }, ...(channels.length > 1 ? [sequence] : []), windowing, overlays),
    make("div", { class: "planes" }, ...views.map((view) => view.box)), readout, legend, help);
  const press = ({ key }) => {
    if (channels[key - 1]) set("channel", channels[key - 1].name);
    if (key.toLowerCase() === "o") set("visible", model.get("visible").length ? [] : layers.map((l) => l.name));
  };

  function showControls() {
    const number = channelNumber(), [black, white] = windowNow(), visible = model.get("visible");
    radios.forEach((radio, i) => { radio.checked = i === number; });
    for (const slider of [low, high]) { slider.min = channels[number].low; slider.max = channels[number].high; }
    low.value = black;
    high.value = white;
    limits.textContent = `${short(black)} to ${short(white)}`;
    opacity.value = model.get("opacity");
    boxes.querySelectorAll("input").forEach((box) => { box.checked = visible.includes(box.value); });
  }

  /** Return the icon of an overlay: the colours of its classes side by side, or its line. */
  function swatch({ style, colour, classes }) {
    const share = 100 / classes.length, parts = classes.map(([, , c], i) => `${c} ${i * share}% ${(i + 1) * share}%`);
    const look = style === "area" ? `background: linear-gradient(to right, ${parts.length ? parts : "transparent 0 0"})` : `--class-colour: ${colour}`;
    return make("i", { class: `swatch ${style}`, style: look });
  }

  function showLayers() {
    boxes.replaceChildren(...layers.map((layer) => make("label", {},
      make("input", { type: "checkbox", value: layer.name, onchange: () => toggle(layer.name) }), swatch(layer), layer.name)));
    overlays.hidden = layers.length === 0;
  }

  function showKey() { // of what is visible; an outline's colour stands beside its name above
    const entries = new Map();
    for (const layer of layers) {
      if (!model.get("visible").includes(layer.name) || layer.style in DASHES) continue;
      for (const entry of layer.classes) entries.set(`${entry[1]} ${entry[0]}`, [entry[1], { ...layer, classes: [entry] }]);
    }
    legend.replaceChildren(...[...entries.values()].map(([name, layer]) => make("li", {}, swatch(layer), name)));
    legend.hidden = entries.size === 0;
  }

  // -------------------------------------------------------------------------------------------- from state to view
  async function onChannel() {
    const number = channelNumber();
    volumes[number] ??= unpack(model.get("_volumes")[number]);
    const unpacked = await volumes[number];
    if (number !== channelNumber()) return; // switched again meanwhile
    volume = unpacked;
    onWindow();
  }

  function onWindow() {
    grey = greyTable({ ...channels[channelNumber()], window: windowNow() });
    showControls();
    redraw();
  }

  async function onLayers() {
    const given = model.get("_layers");
    const next = await Promise.all(given.map(async ({ data, classes, ...layer }) => {
      const colours = new Uint32Array(256), names = { 0: "background" };
      for (const [value, name, colour] of classes) { colours[value] = pixel(colour, 255); names[value] = name; }
      if (layer.style === "probability") for (let p = 0; p < 256; p++) colours[p] = pixel(classes[0][2], p);
      return { ...layer, classes, data: await unpack(data), colours, names };
    }));
    if (given !== model.get("_layers")) return;
    layers = next;
    showLayers();
    onView();
  }

  function onView() {
    showControls();
    showKey();
    redraw();
  }

  const listeners = { position: place, channel: onChannel, windows: onWindow, opacity: onView, visible: onView, _layers: onLayers };
  const leave = mount(model, el, root, listeners, { press, resized: redraw });
  Promise.all([onChannel(), onLayers()]).then(() => { root.dataset.ready = "true"; });
  return leave;
}
