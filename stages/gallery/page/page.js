"use strict";
// The gallery: cards that are built when they come near, filters, sorting, the note, and fusion at another lambda.

const PANELS = ["image", "seen mask", "K-means regions", "fused groups", "true mask"];
const NAMES_SHOWN = 3;
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
    at("fusion").hidden = !index.withTokens;
    if (index.withTokens < lines.length) {
      at("without-tokens").hidden = false;
      at("without-tokens").textContent = `${lines.length - index.withTokens} views have no dense tokens in the cache: ` +
        "for the λ slider and class names, precompute with --set storage.dense_tokens=float16.";
    }
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
    const same = index.withTokens - index.differing;
    const told = index.withTokens
      ? ` Fused anew from the stored dense tokens, ${same.toLocaleString("en")} of ` +
        `${index.withTokens.toLocaleString("en")} views give the cache's groups at its own λ.`
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

  const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  function title(card) {
    const [line, cached] = [lines[card.number], index.views[card.number]];
    const changed = line.groups === cached.groups ? "" : ` (cache: ${cached.groups})`;
    const purity = line.purity === null ? "no purity" : `purity ${line.purity.toFixed(2)}`;
    const small = document.createElement("small");
    small.textContent = `view ${line.view} · ${many(line.regions, "region")} · ${many(line.groups, "group")}${changed} · ` +
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
    hideNote();
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
    hideNote();
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

  // ---- the note

  // What is known of the token (x, y in [0, 1)) of a panel: [text, label to light up or null].
  function tell(card, panel, x, y) {
    const flat = labelsOf(card, panel);
    const grid = Math.sqrt(flat.length);
    const label = flat[Math.floor(y * grid) * grid + Math.floor(x * grid)];
    if (panel.endsWith("mask")) {
      if (label === IGNORE) return [panel === "seen mask" ? "not annotated" : "no class known", null];
      return [`${index.classes[label]} (${seen[label] ? "seen" : "hidden"} class)`, label];
    }
    if (label === IGNORE) return ["annotated: takes no part in pseudo labels", null];
    return [tellLabel(card, panel, label), label];
  }

  function tellLabel(card, panel, label) {
    const flat = labelsOf(card, panel);
    const tokens = [...flat.keys()].filter((token) => flat[token] === label);
    const share = ((100 * tokens.length) / flat.length).toFixed(0);
    const kind = panel === "K-means regions" ? "region" : "group";
    const parts = [`${kind} ${label}: ${many(tokens.length, "token")}, ${share} % of the view`];
    if (card.view.similarity) {
      const members = [...new Set(tokens.map((token) => card.view.regions.indexOf(card.view.clusters[token])))];
      const found = [...labels.likeness(card.view, members)].map((cosine, name) => [cosine, index.classes[name]]);
      found.sort((a, b) => b[0] - a[0]);
      const names = found.slice(0, NAMES_SHOWN).map(([cosine, name]) => `${name} ${cosine.toFixed(2)}`);
      parts.push(`this ${kind} looks like: ${names.join(", ")}`);
    }
    const table = new Map();
    for (const token of tokens) {
      const label = card.view.truth[token];
      if (label !== IGNORE) table.set(label, (table.get(label) || 0) + 1);
    }
    if (table.size) {
      const [commonest, most] = labels.commonest(table);
      const known = [...table.values()].reduce((a, b) => a + b);
      parts.push(`in truth: ${index.classes[commonest]} ${((100 * most) / known).toFixed(0)} %`);
    }
    return parts.join("\n");
  }

  function choose(card, panel, label) {
    const before = card.chosen;
    if (before ? before.panel === panel && before.label === label : label === null) return;
    card.chosen = label === null ? null : { panel, label };
    if (card.canvases) paint(card, [panel, ...(before ? [before.panel] : [])]);
  }

  let noted = null;  // the card that the note is about
  let underCanvas = null;  // puts it there again, if keys brought it: focus scrolls

  function showNote(card, text, x, y) {
    if (noted && noted !== card) hideNote();
    noted = card;
    const note = at("note");
    note.hidden = false;
    if (note.textContent !== text) note.textContent = text;
    note.style.left = `${Math.min(x + 14, window.innerWidth - note.offsetWidth - 8)}px`;
    note.style.top = `${y + 18 + note.offsetHeight > window.innerHeight ? y - 10 - note.offsetHeight : y + 18}px`;
  }

  function hideNote() {
    at("note").hidden = true;
    if (noted) choose(noted, noted.chosen && noted.chosen.panel, null);
    noted = underCanvas = null;
  }

  function point(event) {
    underCanvas = null;
    const frame = event.target.closest && event.target.closest(".picture");
    const card = frame && cards[frame.closest("article").dataset.number];
    if (!card || !card.view || !card.canvases) return hideNote();
    const box = frame.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return hideNote();
    const panel = frame.dataset.panel === "image" ? "fused groups" : frame.dataset.panel;
    const [text, label] = tell(card, panel, x, y);
    choose(card, panel, label);
    showNote(card, text, event.clientX, event.clientY);
  }

  function nextGroup(card, step) {
    if (!card.view || !card.canvases) return;
    const there = [...new Set(groupsOf(card))].filter((label) => label !== IGNORE).sort((a, b) => a - b);
    if (!there.length) return;
    const now = card.chosen && card.chosen.panel === "fused groups" ? there.indexOf(card.chosen.label) : step > 0 ? -1 : 0;
    const label = there[(now + step + there.length) % there.length];
    choose(card, "fused groups", label);
    const canvas = card.canvases.get("fused groups");
    canvas.scrollIntoView({ block: "nearest", inline: "nearest" });
    const text = tellLabel(card, "fused groups", label);
    underCanvas = () => {
      const box = canvas.getBoundingClientRect();
      showNote(card, text, box.left, box.bottom - 18);
    };
    underCanvas();
  }

  function key(event) {
    if (event.key === "Escape") return hideNote();
    const typing = event.target.closest("input, select, button, summary");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      return at("search").focus();
    }
    if (typing || event.altKey || event.ctrlKey || event.metaKey) return;
    const card = event.target.closest("article") && cards[event.target.closest("article").dataset.number];
    const steps = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -1, ArrowRight: 1 };
    if (!card || !(event.key in steps)) return;
    event.preventDefault();
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") return nextGroup(card, steps[event.key]);
    const other = shown[shown.indexOf(card) + steps[event.key]];
    if (other) other.element.focus();
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
    document.addEventListener("pointermove", point);
    document.addEventListener("pointerdown", point);
    document.addEventListener("keydown", key);
    document.addEventListener("scroll", () => (underCanvas || hideNote)(), { passive: true });
  }

  listen();
  // The last is for the console: the groups that a view's tokens have now, null until its data are there.
  return { start, view, groups: (number) => (cards[number].view ? [...groupsOf(cards[number])] : null) };
})();
