"use strict";
// The gallery: cards that are built when they come near, filters, sorting, the note, and fusion at another lambda.

const PANELS = ["image", "seen mask", "K-means regions", "fused groups", "true mask"];
const LOADED_AT_ONCE = 24;
const SLIDER_REST = 200;  // milliseconds

const gallery = (() => {
  const at = (id) => document.getElementById(id);
  const cards = [];  // {number, element, panels: Map(panel -> canvas) or null, view, groups}
  const waiting = new Map();  // number -> {resolve}
  let index, seen, lambda, lines, shown = [], round = 0;

  function start(found) {
    index = found;
    lambda = index.lambda;
    lines = index.views;
    seen = index.classes.map((_, label) => !index.hidden.includes(label));
    at("dataset").textContent = `of ${index.dataset}`;
    document.title = `Pseudo labels of ${index.dataset}`;
    at("about").textContent = about();
    at("fusion").hidden = !index.fusable;
    at("missing").hidden = !index.missing;
    at("missing").textContent = index.missing;
    at("slider").value = at("lambda").value = lambda;
    const near = new IntersectionObserver(cross, { rootMargin: "600px" });
    index.views.forEach((line, number) => {
      const element = document.createElement("article");
      element.tabIndex = 0;
      element.dataset.number = number;
      const title = document.createElement("h2");
      const panels = document.createElement("div");
      panels.className = "panels";
      element.append(title, panels);
      cards.push({ number, element, title, panels, canvases: null, view: null, groups: null, chosen: null });
      near.observe(element);
    });
    update();
  }

  function about() {
    const same = index.fusable - index.differing;
    const told = index.fusable
      ? ` Fused anew from the stored dense tokens, ${same.toLocaleString("en")} of ` +
        `${index.fusable.toLocaleString("en")} views give the cache's groups at its own λ.`
      : "";
    return `Cache ${index.cache}, fused at λ ${index.lambda}.${told}`;
  }

  // ---- data of views

  function load(card) {
    if (card.view) return Promise.resolve(card.view);
    if (!card.loading) {
      card.loading = new Promise((resolve, reject) => {
        const script = document.createElement("script");
        waiting.set(card.number, resolve);
        script.src = `views/${card.number}.js`;
        script.onload = () => script.remove();
        script.onerror = () => reject(new Error(`views/${card.number}.js cannot be read`));
        document.body.append(script);
      });
    }
    return card.loading;
  }

  function view(number, data) {
    cards[number].view = labels.decode(data);
    waiting.get(number)(cards[number].view);
  }

  const asCached = () => lambda === index.lambda;

  // The tokens' groups at the lambda that is shown; those of the cache where there is nothing to fuse.
  function groupsOf(card) {
    if (asCached() || !card.view.similarity) return card.view.groups;
    if (!card.groups || card.groups.lambda !== lambda) {
      card.groups = { lambda, tokens: labels.refuse(card.view, lambda) };
    }
    return card.groups.tokens;
  }

  // ---- cards

  function cross(entries) {
    for (const entry of entries) {
      const card = cards[entry.target.dataset.number];
      if (entry.isIntersecting) build(card);
      else strip(card);
    }
  }

  function build(card) {
    if (card.canvases) return;
    card.canvases = new Map();
    const picture = new Map();
    for (const panel of PANELS) {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = panel;
      const image = document.createElement("img");
      image.alt = `${panel} of ${index.views[card.number].id}`;
      image.decoding = "async";
      image.src = `views/${card.number}.jpg`;
      const frame = document.createElement("div");
      frame.className = "picture";
      frame.append(image);
      if (panel !== "image") {
        const canvas = document.createElement("canvas");
        card.canvases.set(panel, canvas);
        frame.append(canvas);
      }
      frame.dataset.panel = panel;
      figure.append(frame, caption);
      picture.set(panel, figure);
    }
    card.panels.replaceChildren(...picture.values());
    load(card).then(() => card.canvases && paint(card), (error) => (card.panels.textContent = error.message));
  }

  function strip(card) {
    if (!card.canvases || card.element.contains(document.activeElement)) return;
    card.canvases = null;
    card.panels.replaceChildren();
  }

  function labelsOf(card, panel) {
    if (panel === "true mask") return card.view.mask;
    if (panel === "seen mask") return card.view.mask.map((label) => (seen[label] ? label : IGNORE));
    return panel === "K-means regions" ? card.view.clusters : groupsOf(card);
  }

  function paint(card, only = PANELS) {
    for (const [panel, canvas] of card.canvases) {
      if (!only.includes(panel)) continue;
      const side = Math.round(canvas.clientWidth * Math.min(window.devicePixelRatio, 2)) || 256;
      if (canvas.width !== side) canvas.width = canvas.height = side;
      const mask = panel.endsWith("mask");
      const nameOf = mask ? (label) => index.classes[label] : String;
      const chosen = card.chosen && card.chosen.panel === panel ? card.chosen.label : null;
      draw.paint(canvas, labelsOf(card, panel), nameOf, chosen);
    }
  }

  function title(card) {
    const [line, cached] = [lines[card.number], index.views[card.number]];
    const changed = line.groups === cached.groups ? "" : ` (cache: ${cached.groups})`;
    const purity = line.purity === null ? "no purity" : `purity ${line.purity.toFixed(2)}`;
    const small = document.createElement("small");
    small.textContent = `view ${line.view} · ${labels.many(line.regions, "region")} · ${labels.many(line.groups, "group")}${changed} · ` +
      `coverage ${(100 * line.coverage).toFixed(0)} % · ${purity}`;
    card.title.replaceChildren(line.id, " ", small);
  }

  // ---- filter, sorting, charts

  function limits(name, scale = 1) {
    const value = (id, other) => (at(id).value === "" ? other : Number(at(id).value) / scale);
    return [value(`${name}-least`, -Infinity), value(`${name}-most`, Infinity)];
  }

  function passes(line) {
    if (!line.id.toLowerCase().includes(at("search").value.toLowerCase())) return false;
    return [["groups", 1], ["coverage", 100], ["purity", 1]].every(([name, scale]) => {
      const [least, most] = limits(name, scale);
      if (line[name] === null) return least === -Infinity && most === Infinity;
      return line[name] >= least - 1e-9 && line[name] <= most + 1e-9;
    });
  }

  function compare(a, b) {
    const key = at("sort").value;
    const [x, y] = [lines[a.number][key], lines[b.number][key]];
    const sign = at("descending").checked ? -1 : 1;
    if (key === "order" || x === y) return key === "order" ? sign * (a.number - b.number) : a.number - b.number;
    if (x === null || y === null) return x === null ? 1 : -1;  // views without a purity come last
    return sign * (key === "id" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  }

  function update() {
    note.hide();
    shown = cards.filter((card) => passes(lines[card.number])).sort(compare);
    shown.forEach(title);
    at("cards").replaceChildren(...shown.map((card) => card.element));
    at("nothing").hidden = shown.length > 0;
    count();
    drawCharts();
  }

  function count(progress = "") {
    at("count").textContent = `${shown.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} views` + progress;
  }

  function drawCharts() {
    at("charts").ariaBusy = "false";
    if (!at("summary").open) return;
    at("charts").replaceChildren(...charts.all(shown.map((card) => lines[card.number]), index, lambda));
  }

  // ---- lambda

  function setLambda(value) {
    if (!Number.isFinite(value) || value < -1 || value > 1) return;
    lambda = value;
    at("slider").value = value;
    if (Number(at("lambda").value) !== value) at("lambda").value = value;
    note.hide();
    lines = index.views.slice();
    for (const card of cards) {
      card.chosen = null;
      if (!card.canvases || !card.view) continue;
      describe(card);
      paint(card, ["fused groups"]);
      title(card);
    }
    at("charts").ariaBusy = "true";
    if (at("similarities")) at("similarities").replaceWith(charts.similarities(index, lambda));
    fuseAll(++round);
  }

  function describe(card) {
    if (asCached() || !card.view || !card.view.similarity) return;
    const found = labels.describe(groupsOf(card), card.view.truth, index.hidden);
    lines[card.number] = { ...index.views[card.number], ...found };
  }

  // The others are loaded and fused in the background, a few at a time; then filter, order and charts are of this lambda.
  async function fuseAll(mine) {
    const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
    await pause(SLIDER_REST);  // while the slider moves, cards stay where they are
    const todo = asCached() ? [] : [...new Set([...shown, ...cards])];
    for (let first = 0; first < todo.length && mine === round; first += LOADED_AT_ONCE) {
      const some = todo.slice(first, first + LOADED_AT_ONCE);
      await Promise.allSettled(some.map(load));
      await pause(0);
      if (mine !== round) return;
      some.forEach(describe);
      count(` · fusing at λ ${lambda}: ${first.toLocaleString("en")} of ${todo.length.toLocaleString("en")}`);
    }
    if (mine === round) update();
  }

  // ---- controls

  function listen() {
    const FILTERS = ["search", "sort", "descending"];
    for (const name of ["groups", "coverage", "purity"]) FILTERS.push(`${name}-least`, `${name}-most`);
    for (const id of FILTERS) at(id).addEventListener("input", update);
    at("reset").addEventListener("click", () => {
      for (const id of FILTERS) if (at(id).type === "number" || id === "search") at(id).value = "";
      update();
      at("search").focus();
    });
    at("controls").addEventListener("submit", (event) => event.preventDefault());
    at("opacity").addEventListener("input", () => {
      document.documentElement.style.setProperty("--opacity", at("opacity").value / 100);
    });
    at("slider").addEventListener("input", () => setLambda(Number(at("slider").value)));
    at("lambda").addEventListener("input", () => at("lambda").value !== "" && setLambda(Number(at("lambda").value)));
    at("as-cached").addEventListener("click", () => setLambda(index.lambda));
    at("summary").addEventListener("toggle", drawCharts);
    document.addEventListener("pointermove", note.point);
    document.addEventListener("pointerdown", note.point);
    document.addEventListener("keydown", note.key);
    document.addEventListener("scroll", note.scrolled, { passive: true });
  }

  const note = makeNote({
    at, cards, labelsOf, paint,
    classes: () => index.classes,
    words: () => index.words,
    isSeen: (label) => seen[label],
    shown: () => shown,
  });
  listen();
  // The last is for the console: the groups that a view's tokens have now, null until its data are there.
  return { start, view, groups: (number) => (cards[number].view ? [...groupsOf(cards[number])] : null) };
})();
