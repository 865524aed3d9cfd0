// What the browser tests ask of ComfyUI's page, through its own API. Loaded before the page's own scripts.
window.rewindTest = {
  shown: null,

  clear() {
    app.graph.clear();
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
  },

  nodes(graph = app.graph) {
    return graph._nodes.flatMap((node) => [this.describe(node), ...(node.subgraph ? this.nodes(node.subgraph) : [])]);
  },

  describe(node) {
    const info = node.constructor.nodeData;
    return {
      id: String(node.id),
      type: node.type,
      title: node.title,
      left: node.pos[0],
      known: !node.has_errors && (Boolean(node.subgraph) || node.type in LiteGraph.registered_node_types),
      output: Boolean(info?.output_node),
      pictures: (node.imgs ?? []).filter((image) => image.complete && image.naturalWidth > 0).length,
      files: (node.imgs ?? []).map((image) => image.src).filter((file) => file.startsWith("http")),
      video: this.videos(node).some((video) => video.videoWidth > 0),
      words: (node.widgets ?? []).map((widget) => widget.value).filter((value) => typeof value === "string"),
    };
  },

  videos(node) {
    const elements = (node.widgets ?? []).map((widget) => widget.element).filter(Boolean);
    return elements.flatMap((e) => (e.tagName === "VIDEO" ? [e] : [...e.querySelectorAll("video")]));
  },

  // Whether an output node has something to show: pictures, a film, or words that were not there before the run.
  hasResult(id) {
    const node = this.describe(app.graph.getNodeById(id));
    return node.pictures > 0 || node.video || node.words.some((words) => !this.shown.words.includes(words));
  },

  set(type, name, value) {
    const nodes = app.graph._nodes.filter((node) => node.type === type);
    for (const node of nodes) node.widgets.find((widget) => widget.name === name).value = value;
  },

  // A node with its title and the badge above it: left, top, width, height on the canvas.
  box(node) {
    const above = LiteGraph.NODE_TITLE_HEIGHT + 24;
    return [node.pos[0], node.pos[1] - above, node.size[0], node.size[1] + above];
  },

  // Where the nodes of the open graph lie on the page: type, left, top, right, bottom.
  boxes() {
    const { scale, offset } = app.canvas.ds;
    return app.graph._nodes.map((node) => {
      const [left, top, width, height] = this.box(node);
      const corners = [left + offset[0], top + offset[1], left + width + offset[0], top + height + offset[1]];
      return [node.type, ...corners.map((length) => Math.round(length * scale))];
    });
  },

  unframe() {
    document.getElementById("rewind-frame")?.remove();
  },

  // For a picture: everything of the page hidden but the graph, films at their first frame; the size of
  // the whole graph, and where it begins beside its note.
  frame(scale, margin) {
    this.unframe();
    const style = document.createElement("style");
    style.id = "rewind-frame";
    style.textContent =
      "body > :not(#vue-app):not(script) { display: none !important }" +
      "#vue-app * { visibility: hidden !important }" +
      "#vue-app #graph-canvas, #vue-app .dom-widget, #vue-app .dom-widget * { visibility: visible !important }";
    document.head.append(style);
    const nodes = app.graph._nodes;
    const boxes = nodes.map((node) => this.box(node));
    for (const group of app.graph._groups ?? []) boxes.push([...group.pos, ...group.size]);
    for (const video of nodes.flatMap((node) => this.videos(node))) {
      video.removeAttribute("controls");
      video.pause();
      video.currentTime = 0;
    }
    app.canvas.deselectAll();
    const left = Math.min(...boxes.map(([x]) => x));
    const top = Math.min(...boxes.map(([, y]) => y));
    const right = Math.max(...boxes.map(([x, , w]) => x + w));
    const bottom = Math.max(...boxes.map(([, y, , h]) => y + h));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [margin / scale - left, margin / scale - top];
    app.canvas.setDirty(true, true);
    const notes = nodes.map((n) => n.type === "MarkdownNote");
    const first = Math.min(...boxes.filter((_, i) => !notes[i]).map(([x]) => x));
    const size = [right - left, bottom - top].map((length) => Math.ceil(length * scale + 2 * margin));
    return [...size, Math.floor((first - left) * scale)];
  },

  // Rectangles with their titles; a pixel of rounding is no overlap.
  overlaps() {
    const bar = LiteGraph.NODE_TITLE_HEIGHT;
    const boxes = app.graph._nodes.map((n) => ({ name: n.title, x: n.pos[0], y: n.pos[1] - bar, w: n.size[0], h: n.size[1] + bar }));
    const over = (a, b) => a.x + a.w > b.x + 1 && b.x + b.w > a.x + 1 && a.y + a.h > b.y + 1 && b.y + b.h > a.y + 1;
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => over(a, b)).map((b) => [a.name, b.name]));
  },

  // What nodes say below their widgets and do not show whole, but for the empty edge; only of nodes in sight.
  cutTexts() {
    const widgets = app.graph._nodes.flatMap((node) => node.widgets ?? []);
    const texts = widgets.filter((widget) => widget.name === "$$node-text-preview").map((widget) => widget.value);
    const shown = [...document.querySelectorAll(".dom-widget > div")].filter((e) => texts.includes(e.innerText.trim()));
    return shown.filter((e) => e.scrollHeight > e.clientHeight + 12).map((e) => e.innerText.trim());
  },

  // The places of a node's sockets and widgets on the page.
  places(id) {
    const node = app.graph.getNodeById(id);
    const { scale, offset } = app.canvas.ds;
    const place = (x, y) => [(x + offset[0]) * scale, (y + offset[1]) * scale];
    const places = { inputs: {}, outputs: {}, title: place(node.pos[0] + 60, node.pos[1] - 12) };
    node.inputs.forEach((input, i) => {
      if (!input.widget) places.inputs[input.name] = place(...node.getConnectionPos(true, i));
    });
    (node.widgets ?? []).forEach((widget) => {
      places.inputs[widget.name] = place(node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 8);
    });
    node.outputs.forEach((_, i) => (places.outputs[i] = place(...node.getConnectionPos(false, i))));
    return places;
  },

  put(type, pos) {
    const node = LiteGraph.createNode(type);
    node.pos = pos;
    app.graph.add(node);
    return String(node.id);
  },

  // Whether no node has changed its size for half a second: those that show a file grow when it has been loaded.
  settled() {
    const sizes = JSON.stringify(app.graph._nodes.map((node) => [...node.size]));
    if (sizes !== this.sizes) [this.sizes, this.since] = [sizes, performance.now()];
    return performance.now() - this.since > 500;
  },

  // Whether the page has drawn the node: it can be clicked, and the places of its widgets are known, from then on.
  drawn(id) {
    const node = app.graph.getNodeById(id);
    return app.canvas.visible_nodes.includes(node) && (node.widgets ?? []).every((widget) => widget.last_y > 0);
  },

  // The words of every dialog that is open.
  dialogs() {
    const open = [...document.querySelectorAll("[role=dialog], dialog[open]")].filter((dialog) => dialog.checkVisibility());
    return open.map((dialog) => dialog.innerText);
  },

  plain(words) {
    return words.replace(/\s+/g, " ").trim();
  },

  tooltip() {
    return this.plain(document.querySelector(".node-tooltip")?.innerText ?? "");
  },

  results() {
    const rows = [...document.querySelectorAll("[role=option]")].filter((row) => row.innerText.trim());
    return rows.map((row) => row.innerText.split("\n")[0].replace(/\u00a0/g, " ").trim());
  },

  help() {
    const panel = document.querySelector(".node-help-content");
    const all = (what) => [...(panel?.querySelectorAll(what) ?? [])];
    return {
      headings: all("h1, h2, h3").map((heading) => heading.innerText.trim()),
      cells: all("td, th, li, p").map((cell) => cell.innerText.trim()),
      pictures: all("img").map((image) => ({ file: image.src, loaded: image.complete && image.naturalWidth > 0, done: image.complete })),
    };
  },

  thumbnail(card) {
    const image = document.querySelector(`[data-testid="${card}"] img`);
    return image?.complete && image.naturalWidth > 0 ? image : null;
  },

  thumbnailPixels(card) {
    const image = this.thumbnail(card);
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
  },

  transfer([name, content, type]) {
    const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type }));
    return transfer;
  },

  // Looks at the page again and again during a run: the progress bars and the preview pictures on the nodes, by type.
  watch() {
    const words = this.nodes().flatMap((node) => node.words);
    const shown = (this.shown = { progress: {}, previews: {}, words });
    const keep = (where, key, value) => {
      where[key] ??= [];
      if (!where[key].includes(value)) where[key].push(value);
    };
    clearInterval(this.timer);
    this.timer = setInterval(() => {
      for (const node of app.graph._nodes) {
        if (node.progress > 0 && node.progress < 1) keep(shown.progress, node.type, node.progress);
        for (const image of node.imgs ?? []) {
          if (image.src.startsWith("blob:") && image.naturalWidth > 0) keep(shown.previews, node.type, image.src);
        }
      }
    }, 50);
  },
};

// The page dims itself while it loads. PrimeVue's BlockUI loses a mask that still fades when the next one comes: the old
// one's animationend takes the new one away, and the old one lies over every button from then on. A mask that still
// fades after two seconds is such a one.
setInterval(() => {
  for (const mask of document.querySelectorAll(".p-blockui-mask.p-overlay-mask-leave")) {
    if (mask.rewindSeen) mask.remove();
    mask.rewindSeen = true;
  }
}, 2000);
