// Feature explorer: a strip of layers, the channels of one as a grid, one channel over the input. Python sends a layer once, when it
// is first looked at. Slices, sorting and colours are drawn here. Both axes of each picture run against the array's.

const tidy = (x, range) => (Math.abs(x) < range / 1000 ? "0" : short(x)); // no 1.13e-5 at the end of a colour bar
const received = new WeakMap(); // widget model -> {key: {about, data}}, shared by all views of one widget

function render({ model, el }) {
  const scene = model.get("_scene"); // never changes
  const { start, shape, spacing, sequences, classes, panels } = scene;
  const { planeNow, within, moveTo, move, pointAt, at } = navigate(model, scene), set = setter(model);
  const palettes = Object.fromEntries(Object.entries(scene.palettes).map(([name, colours]) => [name, Uint32Array.from(colours, (c) => pixel(c))]));
  const volumes = [];
  let label = null, mask = null;
  /** Take the layers that came with the widget's state, unless they are of an older network. */
  const takeMaps = () => {
    const fresh = Object.entries(model.get("_maps")).filter(([, { about }]) => about.version === model.get("_version"));
    received.set(model, { ...received.get(model), ...Object.fromEntries(fresh) });
  };
  takeMaps();

  // --------------------------------------------------------------------------------------------------------- input
  const sequenceNow = () => sequences.findIndex((s) => s.name === model.get("sequence"));

  // -------------------------------------------------------------------------------------------------------- panels
  const views = panels.map((panel, number) => {
    const layerKey = number ? "compare_layer" : "layer", channelKey = number ? "compare_channel" : "channel";
    const buttons = new Map();
    const groups = []; // pairs of a name and its buttons, in the order in which the layers are computed
    for (const layer of panel.layers) {
      const dot = layer.name.lastIndexOf("."), group = dot > 0 ? layer.name.slice(0, dot) : "";
      const side = layer.side ? `sees ${[...new Set(layer.side)].join("×")}` : "sees ?";
      const scaleText = layer.stride && layer.stride.some((s) => s !== 1) ? ` ÷${short(Math.max(...layer.stride))}` : "";
      const button = make("button", {
        type: "button", title: `${layer.name}: ${layer.kind}, ${layer.parameters.toLocaleString("en")} parameters`,
        onclick: () => set(layerKey, layer.name),
      }, make("b", {}, dot > 0 ? layer.name.slice(dot + 1) : layer.name), make("span", {}, `${layer.channels} maps${scaleText}`), make("span", {}, side));
      buttons.set(layer.name, button);
      if (groups.at(-1)?.[0] !== group) groups.push([group, []]);
      groups.at(-1)[1].push(button);
    }
    const strip = make("div", { class: "strip", role: "group", "aria-label": `Layers of ${panel.title}` },
      ...groups.map(([name, list]) => make("div", { class: "pathway" }, ...(name ? [make("em", {}, `${name}.`)] : []), ...list)));

    const facts = make("p", { class: "facts" });
    const picture = make("canvas"), grid = make("canvas"), histogram = make("canvas");
    const stage = make("div", {
      class: "stage", tabindex: 0, role: "application", "aria-roledescription": "slice picture", "data-view": `picture${number}`,
      "aria-label": "The channel over the input. Arrow keys move the crosshair, Page Up and Page Down change the slice.",
    }, picture);
    const tiles = make("div", {
      class: "tiles", tabindex: 0, role: "application", "aria-roledescription": "channel grid", "data-view": `grid${number}`,
      "aria-label": "The layer's channels. Arrow keys choose one.",
    }, grid);
    const bar = make("canvas"), low = make("span"), high = make("span");
    const counts = make("p", { class: "counts" });
    const root = make("section", { class: "panel", "data-panel": number },
      strip, facts,
      make("div", { class: "body" },
        make("div", { class: "left" }, stage, make("div", { class: "legend" }, low, bar, high), histogram, counts),
        make("div", { class: "right" }, tiles)));
    const view = {
      number, layerKey, channelKey, buttons, facts, picture, grid, histogram, stage, tiles, bar, low, high, counts, root, panel,
      about: null, data: null, tables: null, order: [], layout: null, wanted: "",
    };

    // ------------------------------------------------------------------------------------------ pointer and keys
    const tileAt = (event) => {
      const r = tiles.getBoundingClientRect(), { columns, wide, high: tall, gap } = view.layout ?? {};
      if (!columns) return null;
      const x = event.clientX - r.left, y = event.clientY - r.top + tiles.scrollTop;
      const column = Math.floor(x / (wide + gap)), line = Math.floor(y / (tall + gap + LABEL)), place = line * columns + column;
      if (column >= columns || place >= view.order.length) return null;
      const plane = planeNow(), u = (x - column * (wide + gap)) / wide, v = (y - line * (tall + gap + LABEL) - LABEL) / tall;
      const next = [...model.get("position")], { offset, stride, shape: size } = view.about;
      if (u < 0 || u >= 1 || v < 0 || v >= 1) return { channel: view.order[place], position: null };
      for (const [axis, part] of [[plane.x, u], [plane.y, v]])
        next[axis] = Math.round(offset[axis] + stride[axis] * (size[axis + 1] * (1 - part) - 0.5));
      return { channel: view.order[place], position: within(next) };
    };
    drag(stage, (event) => moveTo(pointAt(stage, event)));
    stage.addEventListener("pointermove", (event) => say(view, pointAt(stage, event), channelNow(view)));
    tiles.addEventListener("click", (event) => { const hit = tileAt(event); if (hit) set(channelKey, hit.channel); });
    tiles.addEventListener("pointermove", (event) => { const hit = tileAt(event); if (hit) say(view, hit.position ?? model.get("position"), hit.channel); });
    for (const box of [stage, tiles]) box.addEventListener("pointerleave", () => say(view));
    steer(stage, planeNow, shape, move);
    tiles.addEventListener("keydown", (event) => {
      const columns = view.layout?.columns ?? 1;
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      const end = { Home: 0, End: view.order.length - 1 }[event.key];
      if (by === undefined && end === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const next = view.order[end ?? view.order.indexOf(channelNow(view)) + by];
      if (next !== undefined) set(channelKey, next);
    });
    return view;
  });

  // ------------------------------------------------------------------------------------------------- a layer's maps
  const twinIn = (view) => !view.number && model.get("untrained"); // the untrained twin stands in the place of the first network
  const keyOf = (view) => `${twinIn(view) ? 2 : view.number}/${model.get(view.layerKey)}`;

  async function load(view) {
    const key = keyOf(view), store = received.get(model);
    for (const [name, button] of view.buttons) button.setAttribute("aria-pressed", String(name === model.get(view.layerKey)));
    if (!store[key]) {
      view.root.dataset.waiting = "true";
      view.facts.textContent = scene.exported ? "This layer is not part of this page." : `${model.get(view.layerKey)}: computing …`;
      if (view.wanted !== key) { view.wanted = key; model.send({ want: key }); }
      return;
    }
    view.wanted = "";
    const { about, data } = store[key], unpacked = await unpack(data);
    if (key !== keyOf(view)) return; // switched again meanwhile
    Object.assign(view, { about, data: unpacked });
    delete view.root.dataset.waiting;
    const layer = view.panel.layers.find((l) => l.name === model.get(view.layerKey));
    const size = about.shape.slice(1).join("×"), parts = about.every.reduce((a, b) => a * b), thin = parts > 1 ? `, one voxel of ${parts} kept` : "";
    view.facts.replaceChildren(make("b", {}, layer.name), twinIn(view) ? " of the untrained twin," : "", ` ${layer.kind}: ${about.shape[0]} maps of ${size} voxels${thin} · `
      + `${layer.parameters.toLocaleString("en")} parameters · ${layer.side ? `receptive field ${layer.side.join("×")}` : "receptive field not known"}`);
    view.root.dataset.layer = layer.name;
    onColours(view);
  }

  /** The chosen channel. Another layer can have fewer; then the last one counts until Python has chosen anew. */
  const channelNow = (view) => clamp(model.get(view.channelKey), 0, view.about ? view.about.shape[0] - 1 : 0);

  const signed = (view) => ({ signed: true, sequential: false })[model.get("colours")] ?? view.about.signed;

  function span(view, channel) { // values at both ends of the colours
    const { bottom, top, p1, p99 } = view.about;
    let [a, b] = [bottom[channel], top[channel]];
    if (model.get("scale") === "layer") [a, b] = [Math.min(...bottom), Math.max(...top)];
    if (model.get("scale") === "p1-p99") [a, b] = [p1[channel], p99[channel]];
    if (signed(view)) { const limit = Math.max(Math.abs(a), Math.abs(b)); [a, b] = [-limit, limit]; }
    return a < b ? [a, b] : [a, a + 1];
  }

  function onColours(view) { // stored byte -> pixel, for every channel
    if (!view.about) return;
    const { low, step, shape: [channels] } = view.about, palette = palettes[signed(view) ? "signed" : "sequential"];
    view.tables = Array.from({ length: channels }, (_, c) => {
      const [a, b] = span(view, c), table = new Uint32Array(256);
      for (let q = 0; q < 256; q++) table[q] = palette[Math.round(clamp(((low[c] + step[c] * q - a) * 255) / (b - a), 0, 255))];
      return table;
    });
    onSort(view);
  }

  function metric(view, c) { // what the channels are sorted by
    const { about } = view, sort = model.get("sort");
    if (sort === "activity") return about.activity[c];
    if (sort === "selectivity") return about.selectivity[model.get("class_name")]?.[c];
    if (sort === "correlation") return about.correlation[model.get("map_name")]?.[c];
  }

  function onSort(view) {
    if (!view.about) return;
    const order = view.about.low.map((_, c) => c);
    if (metric(view, 0) !== undefined) order.sort((a, b) => Math.abs(metric(view, b)) - Math.abs(metric(view, a)) || a - b);
    view.order = order;
    draw(view);
    reveal(view);
  }

  function reveal(view) { // scroll the channels until the chosen one is in sight
    if (!view.layout) return;
    const { columns, high, gap } = view.layout, place = view.order.indexOf(channelNow(view));
    const top = Math.floor(place / columns) * (high + gap + LABEL), bottom = top + high + gap + LABEL;
    view.tiles.scrollTop = clamp(view.tiles.scrollTop, bottom - view.tiles.clientHeight, top);
  }

  // ------------------------------------------------------------------------------------------------------- drawing
  const LABEL = 14; // pixels above each tile

  /** Where the map's slice lies on the picture, in input voxels from its left or upper edge. */
  function place(view, axis) {
    const { offset, stride, shape: size } = view.about, far = offset[axis] + stride[axis] * (size[axis + 1] - 0.5);
    return [shape[axis] - (far - start[axis] + 0.5), size[axis + 1] * stride[axis]];
  }
  const indexAt = (view, axis, p) =>
    clamp(Math.floor((p - view.about.offset[axis]) / view.about.stride[axis] + 0.5), 0, view.about.shape[axis + 1] - 1);
  const voxels = (view) => view.about.shape[1] * view.about.shape[2] * view.about.shape[3];

  /** Return a function that draws the present slice of a channel of the maps, without what lies outside the mask if so chosen. */
  function slicer(view, plane, position) {
    const { shape: [, ...size], offset, stride } = view.about, index = indexAt(view, plane.cut, position[plane.cut]), hidden = [];
    if (mask && model.get("brain_only")) {
      const spot = [...position];
      for (let v = 0, i = 0; v < size[plane.y]; v++)
        for (let u = 0; u < size[plane.x]; u++, i++) {
          spot[plane.x] = Math.floor(offset[plane.x] + stride[plane.x] * (size[plane.x] - 1 - u) + 0.5);
          spot[plane.y] = Math.floor(offset[plane.y] + stride[plane.y] * (size[plane.y] - 1 - v) + 0.5);
          if (!mask[at(within(spot))]) hidden.push(4 * i + 3);
        }
    }
    return (channel) => {
      const image = sliceImage(view.data, size, channel * voxels(view), plane, index, view.tables[channel]);
      for (const alpha of hidden) image.data[alpha] = 0;
      return image;
    };
  }

  function drawPicture(view) {
    const plane = planeNow(), position = model.get("position"), { x, y, cut } = plane;
    const width = view.stage.clientWidth || 340, scale = width / shape[x], aspect = spacing[y] / spacing[x];
    const height = width * (shape[y] / shape[x]) * aspect, tall = height / shape[y];
    view.stage.style.aspectRatio = `${shape[x]} / ${shape[y] * aspect}`;
    const context = fit(view.picture, width, height), here = position[cut] - start[cut];
    stamp(context, sliceImage(volumes[sequenceNow()], shape, 0, plane, here, greyTable(sequences[sequenceNow()])), 0, 0, width, height);
    const channel = channelNow(view), { field, offset, stride } = view.about;
    const [left, wide] = place(view, x), [top, high] = place(view, y);
    context.globalAlpha = model.get("opacity");
    stamp(context, slicer(view, plane, position)(channel), left * scale, top * tall, wide * scale, high * tall);
    context.globalAlpha = 1;
    if (label && model.get("truth"))
      for (const [value, , colour] of classes) drawBorders(context, borders(label, shape, plane, here, (a, b) => (a === value) !== (b === value)), [scale, tall], colour);
    drawCrosshair(context, plane, position, scene, width, height, "rgb(255 255 255 / 60%)");
    if (field) {
      const box = [x, y].map((axis) => {
        const middle = offset[axis] + stride[axis] * indexAt(view, axis, position[axis]);
        return [shape[axis] - (middle + field[1][axis] - start[axis] + 1), field[1][axis] - field[0][axis] + 1];
      });
      const rectangle = [box[0][0] * scale, box[1][0] * tall, box[0][1] * scale, box[1][1] * tall];
      for (const [colour, line] of [["#fff", 4], ["#009E73", 2]]) {
        Object.assign(context, { strokeStyle: colour, lineWidth: line });
        context.strokeRect(...rectangle);
      }
      view.stage.dataset.field = rectangle.map((v) => v.toFixed(1)).join(" ");
    }
    drawLetters(context, plane, width, height);
  }

  function drawGrid(view) {
    const plane = planeNow(), { x, y } = plane, { shape: [channels, ...size], stride, offset, dead } = view.about;
    const room = (view.tiles.clientWidth || 480) - 2, gap = 4;
    const wanted = channels <= 6 ? 150 : channels <= 30 ? 96 : channels <= 80 ? 78 : 64;
    const columns = clamp(Math.round(room / wanted), 1, channels), wide = Math.floor((room - gap * (columns - 1)) / columns);
    const width = Math.min(wide, 220), high = Math.round((width * size[y] * stride[y] * spacing[y]) / (size[x] * stride[x] * spacing[x]));
    view.layout = { columns, wide: width, high, gap };
    const lines = Math.ceil(channels / columns), total = lines * (high + gap + LABEL);
    view.grid.style.width = `${room}px`;
    view.grid.style.height = `${total}px`;
    const context = fit(view.grid, room, total), position = model.get("position"), tile = slicer(view, plane, position);
    const text = getComputedStyle(view.tiles).color, chosen = channelNow(view);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const part = (axis) => 1 - (position[axis] - offset[axis] + stride[axis] / 2) / (stride[axis] * size[axis]);
    view.order.forEach((c, i) => {
      const left = (i % columns) * (width + gap), top = Math.floor(i / columns) * (high + gap + LABEL) + LABEL;
      const factor = view.number ? 1 : tools.factorOf(model.get(view.layerKey), c);
      context.globalAlpha = factor ? 1 : 0.25;
      stamp(context, tile(c), left, top, width, high);
      context.globalAlpha = 1;
      context.fillStyle = "rgb(160 160 160 / 75%)";
      const [u, v] = [part(x), part(y)];
      if (u > 0 && u < 1) context.fillRect(left + u * width - 0.5, top, 1, high);
      if (v > 0 && v < 1) context.fillRect(left, top + v * high - 0.5, width, 1);
      context.fillStyle = text;
      context.textAlign = "left";
      context.fillText(`${c}${dead[c] ? " dead" : ""}${factor === 1 ? "" : ` ×${short(factor)}`}`, left + 1, top - 7);
      const value = metric(view, c);
      context.textAlign = "right";
      if (value !== undefined && width > 55) context.fillText(value.toFixed(2).replace("-", "−"), left + width - 1, top - 7);
      if (c === chosen) {
        Object.assign(context, { strokeStyle: "#000", lineWidth: 4.5 });
        context.strokeRect(left + 1.5, top + 1.5, width - 3, high - 3);
        Object.assign(context, { strokeStyle: "#E69F00", lineWidth: 3 });
        context.strokeRect(left + 1.5, top + 1.5, width - 3, high - 3);
      }
    });
  }

  function drawNumbers(view) { // histogram, colour bar, counts
    const channel = channelNow(view), { about } = view, [a, b] = span(view, channel);
    const width = view.stage.clientWidth || 340, height = 62, context = fit(view.histogram, width, height);
    view.histogram.style.width = `${width}px`;
    view.histogram.style.height = `${height}px`;
    const bins = about.histogram[channel], most = Math.log1p(Math.max(...bins)), table = view.tables[channel], edge = getComputedStyle(view.tiles).color;
    const base = height - 14, w = width / 64;
    bins.forEach((count, bin) => {
      const tall = (base * Math.log1p(count)) / most, colour = table[4 * bin + 2];
      context.fillStyle = `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;
      context.fillRect(bin * w, base - tall, w, tall);
    });
    context.globalAlpha = 0.4;
    context.fillStyle = edge;
    context.fillRect(0, base, width, 1);
    context.globalAlpha = 1;
    const first = about.low[channel], last = first + 255 * about.step[channel], zero = -first / (last - first);
    context.font = "11px system-ui, sans-serif";
    for (const [text, at, align] of [[tidy(first, last - first), 0, "left"], [tidy(last, last - first), width, "right"]]) {
      context.textAlign = align;
      context.fillText(text, at, height - 2);
    }
    context.textAlign = "center";
    if (zero > 0.12 && zero < 0.88) { context.fillRect(zero * width, 0, 1, base + 3); context.fillText("0", zero * width, height - 2); }
    const bar = fit(view.bar, 120, 10), palette = palettes[signed(view) ? "signed" : "sequential"];
    for (let i = 0; i < 120; i++) {
      const colour = palette[Math.round((i * 255) / 119)];
      bar.fillStyle = `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;
      bar.fillRect(i, 0, 1, 10);
    }
    view.low.textContent = tidy(a, b - a);
    view.high.textContent = tidy(b, b - a);
    const deadCount = about.dead.filter(Boolean).length;
    view.counts.textContent = `Channel ${channel}: mean ${short(about.mean[channel])}, ${(100 * about.inactive[channel]).toFixed(0)} % of voxels at or below 0 (logarithmic histogram${scene.masked ? ", inside the mask" : ""}). `
      + `${deadCount} of ${about.shape[0]} channels dead.`;
  }

  function draw(view) {
    if (!view.data || !volumes.length) return;
    drawPicture(view);
    drawGrid(view);
    drawNumbers(view);
    showControls();
    say(view);
    root.dataset.drawn = String(+(root.dataset.drawn ?? 0) + 1);
  }

  function onPosition() {
    for (const view of views) if (view.data) { drawPicture(view); drawGrid(view); say(view); }
    showControls();
  }

  function valueOf(view, position, channel) {
    const { shape: [, D, H, W], low, step } = view.about, [d, h, w] = position.map((p, axis) => indexAt(view, axis, p));
    return low[channel] + step[channel] * view.data[((channel * D + d) * H + h) * W + w];
  }

  /** The read-out: at the crosshair, or under the pointer. */
  function say(view, position = model.get("position"), channel = channelNow(view)) {
    if (!view.data || !volumes.length) return;
    const { name, low, high } = sequences[sequenceNow()];
    const facts = [["voxel", position.join(", ")], [name, short(low + (volumes[sequenceNow()][at(position)] * (high - low)) / 255)]];
    if (label) facts.push(["truth", classes.find(([k]) => k === label[at(position)])?.[1] ?? "background"]);
    const shown = view === undefined ? views : [view, ...views.filter((other) => other !== view && other.data)];
    for (const one of shown.sort((a, b) => a.number - b.number)) {
      const c = one === view ? channel : channelNow(one);
      facts.push([`${model.get(one.layerKey)}, channel ${c}`, short(valueOf(one, position, c))]);
    }
    tell(readout, facts);
  }

  // ------------------------------------------------------------------------------------------------------ controls
  const slice = makeSlice(model, scene, { planeNow, move }), opacity = makeOpacity(model, "Opacity of the map over the input");
  const truth = make("input", { type: "checkbox", onchange: () => set("truth", truth.checked) });
  const brainOnly = make("input", { type: "checkbox", onchange: () => set("brain_only", brainOnly.checked) });
  const plane = makeChoice(model, "Plane", "plane", scene.planes.map((p) => p.name.toLowerCase()));
  const sequence = makeChoice(model, "Input", "sequence", sequences.map((s) => s.name));
  const sort = makeChoice(model, "Sort by", "sort", ["index", "activity", ...(classes.length ? ["selectivity"] : []), ...(scene.maps.length ? ["correlation"] : [])]);
  const byClass = makeChoice(model, "", "class_name", classes.map(([, name]) => name), "Class of the selectivity");
  const byMap = makeChoice(model, "", "map_name", scene.maps, "Map of the correlation");
  const scale = makeChoice(model, "Scale", "scale", ["channel", "layer", "p1-p99"]);
  const colours = makeChoice(model, "Colours", "colours", ["auto", "sequential", "signed"]);
  const choices = [plane, sequence, sort, byClass, byMap, scale, colours];
  const save = make("button", { type: "button", title: "Save what is shown as a PNG file", onclick: () => exportPng() }, "PNG");
  const readout = makeReadout("Values");
  const tools = makeInterventions(model, scene, { planeNow, channelNow: () => channelNow(views[0]), slice: (context, width, height) => {
    const plane = planeNow(), here = model.get("position")[plane.cut] - start[plane.cut], now = sequenceNow();
    if (volumes.length) stamp(context, sliceImage(volumes[now], shape, 0, plane, here, greyTable(sequences[now])), 0, 0, width, height);
    return label && model.get("truth") ? [label, shape, plane, here] : null;
  } });
  views[0].facts.after(tools.controls);
  const key = make("ul", { class: "key", "aria-label": "Outlines" }, ...classes.map(([, name, colour]) =>
    make("li", {}, make("i", { style: `--class-colour: ${colour}` }), name)), make("li", {}, make("i", { style: "--class-colour: #009E73" }), "receptive field at the crosshair"));
  const help = makeHelp("Picture: click or drag for the crosshair; click, then wheel, or Page Up and Page Down for the slice; arrow keys (with Shift ten voxels). Channels: click, or arrow keys. "
    + "Anywhere: [ and ] previous and next layer, S sorting, C scale, T outlines, B brain only, 1 to 9 input sequence. Interventions: X silences the channel or gives it back, "
    + "R takes all changes back, U shows the untrained twin, P the maps that feed the channel.");
  const root = make("div", { class: `medseg-features panels${panels.length}`, role: "group", "aria-label": `Feature explorer: ${scene.title}` },
    make("div", { class: "toolbar" }, plane.box, slice.box, sequence.box, make("label", {}, make("span", {}, "Map opacity"), opacity),
      ...(classes.length ? [make("label", {}, truth, "outlines")] : []), ...(scene.masked ? [make("label", {}, brainOnly, "brain only")] : []), make("span", { class: "together" }, sort.box, byClass.box, byMap.box), scale.box, colours.box, save),
    make("div", { class: "panels" }, ...views.map((view) => view.root)), tools.results, readout, key, help);

  const cycle = (one) => { const options = [...one.select.options].map((o) => o.value); set(one.key, options[(options.indexOf(model.get(one.key)) + 1) % options.length]); };
  const press = (event) => {
    if (event.target.tagName === "SELECT") return;
    const view = views[+(event.target.closest?.(".panel")?.dataset.panel ?? 0)];
    if (sequences[event.key - 1]) set("sequence", sequences[event.key - 1].name);
    if (event.key === "s") cycle(sort);
    if (event.key === "c") cycle(scale);
    tools.press(event);
    if (event.key === "b" && scene.masked) set("brain_only", !model.get("brain_only"));
    if (event.key === "t" && classes.length) set("truth", !model.get("truth"));
    if (event.key === "[" || event.key === "]") {
      const names = view.panel.layers.map((l) => l.name), next = names[names.indexOf(model.get(view.layerKey)) + (event.key === "]" ? 1 : -1)];
      if (next) set(view.layerKey, next);
    }
  };

  function showControls() {
    for (const one of [...choices, slice]) one.show();
    byClass.box.hidden = model.get("sort") !== "selectivity";
    byMap.box.hidden = model.get("sort") !== "correlation";
    opacity.value = model.get("opacity");
    truth.checked = model.get("truth");
    brainOnly.checked = model.get("brain_only");
    tools.show();
  }

  function exportPng() {
    const view = views[0], parts = views.flatMap((v) => [v.picture, v.grid]), ratio = window.devicePixelRatio || 1, pad = 12 * ratio;
    const sheet = make("canvas", { width: parts.reduce((sum, c) => sum + c.width + pad, pad), height: Math.max(...parts.map((c) => c.height)) + 40 * ratio });
    const context = sheet.getContext("2d");
    context.fillStyle = getComputedStyle(document.body).backgroundColor === "rgba(0, 0, 0, 0)" ? "#fff" : getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.fillStyle = getComputedStyle(view.tiles).color;
    context.font = `${14 * ratio}px system-ui, sans-serif`;
    let left = pad;
    for (const v of views) {
      context.fillText(`${scene.title}: ${model.get(v.layerKey)}, channel ${model.get(v.channelKey)}`, left, 20 * ratio);
      for (const canvas of [v.picture, v.grid]) { context.drawImage(canvas, left, 30 * ratio); left += canvas.width + pad; }
    }
    sheet.toBlob((blob) => {
      const url = URL.createObjectURL(blob), name = views.map((v) => `${model.get(v.layerKey)}-${model.get(v.channelKey)}`).join("-");
      make("a", { href: url, download: `${name}.png` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    });
  }

  // ------------------------------------------------------------------------------------------- from state to view
  const all = (act) => () => { showControls(); views.forEach(act); };
  const onChannel = (view) => { draw(view); reveal(view); };
  const onMaps = () => { takeMaps(); views.forEach(load); };
  const onVersion = () => { received.set(model, {}); tools.forget(); takeMaps(); for (const view of views) { view.wanted = ""; load(view); } };
  const onMessage = (about, buffers) => {
    if (about.answer) return tools.onAnswer(about, buffers);
    if (!about.key || about.version !== model.get("_version")) return;
    received.get(model)[about.key] = { about, data: buffers[0] };
    for (const view of views) if (keyOf(view) === about.key) load(view);
  };
  const listeners = {
    position: onPosition, plane: all(draw), sequence: all(draw), opacity: all(draw), truth: all(draw), brain_only: all(draw), channel: () => onChannel(views[0]), layer: () => load(views[0]),
    changes: () => draw(views[0]), untrained: () => load(views[0]), path: showControls,
    sort: all(onSort), class_name: all(onSort), map_name: all(onSort), scale: all(onColours), colours: all(onColours), _version: onVersion, _maps: onMaps, "msg:custom": onMessage,
    ...(views[1] ? { compare_channel: () => onChannel(views[1]), compare_layer: () => load(views[1]) } : {}),
  };
  showControls();
  const leave = mount(model, el, root, listeners, { press, resized: () => views.forEach(draw) });
  Promise.all([...model.get("_volumes").map(unpack), ...["_label", "_mask"].map((key) => (model.get(key) ? unpack(model.get(key)) : null))]).then(async (unpacked) => {
    mask = unpacked.pop();
    label = unpacked.pop();
    volumes.push(...unpacked);
    await Promise.all(views.map(load));
    root.dataset.ready = "true";
  });
  return leave;
}
