"use strict";
// Bar charts in SVG.

const charts = {
  element(name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  },

  // Upright bars of `counts`; `ticks`: [place, text under it]; `names`: of all bars, which show when pointed at, with the
  // count in `unit`; `mark`: [place, text] of a line.
  bars(title, counts, ticks, { names = [], unit = "", mark = null } = {}) {
    const [width, height, left, top, bottom] = [320, 150, 8, 22, 20];
    const most = Math.max(...counts, 1);
    const step = (width - 2 * left) / Math.max(counts.length, 1);
    const tall = height - top - bottom;
    const svg = charts.element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    counts.forEach((count, place) => {
      const high = (tall * count) / most;
      const bar = charts.element("rect", {
        x: left + place * step, y: top + tall - high, width: Math.max(step - 1, 0.5), height: high, class: "bar",
      });
      bar.append(charts.element("title", {}, `${names[place]}: ${count.toLocaleString("en")} ${unit}`));
      svg.append(bar);
    });
    svg.append(charts.element("line", { x1: left, x2: width - left, y1: top + tall, y2: top + tall, class: "axis" }));
    for (const [place, text] of ticks) {
      svg.append(charts.element("text", { x: left + (place + 0.5) * step, y: height - 6, class: "tick" }, text));
    }
    if (mark !== null) {
      const x = left + mark[0] * step;
      svg.append(charts.element("line", { x1: x, x2: x, y1: top - 8, y2: top + tall, class: "mark" }));
      const end = x > width / 2;
      const place = { x: end ? x - 4 : x + 4, y: top, class: "mark-text", "text-anchor": end ? "end" : "start" };
      svg.append(charts.element("text", place, mark[1]));
    }
    return charts.figure(title, svg);
  },

  // Lines of a name, a bar of a share from 0 to 1, and a text.
  shares(title, lines) {
    const table = document.createElement("div");
    table.className = "shares";
    for (const [name, share, text] of lines) {
      const bar = document.createElement("meter");
      bar.value = share;
      const cells = [name, text].map((part) => Object.assign(document.createElement("span"), { textContent: part }));
      bar.setAttribute("aria-label", `${name}: ${text}`);
      table.append(cells[0], bar, cells[1]);
    }
    if (!lines.length) table.textContent = "none among the pseudo-labelled tokens";
    return charts.figure(title, table);
  },

  figure(title, content) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    figure.append(caption, content);
    return figure;
  },

  // Bars of how often each number comes, in bins of equal width if they are many.
  numbers(title, values, unit) {
    const bin = Math.ceil((values.reduce((a, b) => Math.max(a, b), 0) + 1) / 30);
    const counts = [];
    for (const value of values) charts.add(counts, Math.floor(value / bin));
    const names = counts.map((_, place) => (bin > 1 ? `${place * bin} to ${place * bin + bin - 1}` : `${place}`));
    const every = Math.ceil(counts.length / 10);
    const ticks = counts.map((_, place) => [place, `${place * bin}`]).filter(([place]) => place % every === 0);
    return charts.bars(title, counts, ticks, { names, unit });
  },

  // The same by doubling: 1, 2 to 3, 4 to 7, ...
  doublings(title, values, unit) {
    const counts = [];
    for (const value of values) charts.add(counts, Math.floor(Math.log2(value)));
    const names = counts.map((_, place) => (place ? `${2 ** place} to ${2 ** (place + 1) - 1}` : "1"));
    return charts.bars(title, counts, counts.map((_, place) => [place, `${2 ** place}`]), { names, unit });
  },

  add(counts, place) {
    while (counts.length <= place) counts.push(0);
    counts[place]++;
  },

  similarities(index, lambda) {
    const bins = index.similarities.length;
    const found = index.similarities.findIndex((count) => count > 0);
    const first = found < 0 ? bins / 2 : Math.min(found, bins / 2);  // none is found where no view has two regions
    const place = (value) => ((value + 1) / 2) * bins - first;
    const ticks = [-1, -0.5, 0, 0.5, 1].map((value) => [place(value) - 0.5, `${value}`]).filter((tick) => tick[0] > -1);
    const made = charts.bars("similarity of two regions of a view (all views)", index.similarities.slice(first), ticks, {
      names: index.similarities.map((_, bin) => ((2 * (bin + 0.5)) / bins - 1).toFixed(2)).slice(first),
      unit: "pairs",
      mark: [place(lambda), `λ ${lambda}`],
    });
    made.id = "similarities";
    return made;
  },

  // The four charts of the views' lines (as in the index, at the lambda that is shown).
  all(lines, index, lambda) {
    const hidden = new Map(index.hidden.map((label) => [label, [0, 0]]));
    for (const line of lines) {
      for (const [label, tokens, found] of line.hidden) {
        hidden.get(label)[0] += tokens;
        hidden.get(label)[1] += found;
      }
    }
    const shares = [...hidden].filter((entry) => entry[1][0] > 0)
      .map(([label, [tokens, found]]) => [index.classes[label], found / tokens, tokens])
      .sort((a, b) => b[1] - a[1])
      .map(([name, share, tokens]) => [name, share, `${(100 * share).toFixed(0)} % of ${tokens.toLocaleString("en")}`]);
    const found = [
      charts.numbers("groups in a view", lines.map((line) => line.groups), "views"),
      charts.doublings("size of a group, in tokens", lines.flatMap((line) => line.sizes), "groups"),
    ];
    if (index.fusable) found.push(charts.similarities(index, lambda));
    found.push(charts.shares("hidden classes: tokens in groups that are mostly theirs", shares));
    return found;
  },
};
