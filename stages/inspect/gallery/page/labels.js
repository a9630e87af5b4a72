"use strict";
// Labels of one view: decoding, mask fusion (the port of pipeline/pseudo_labels/fusion.py), and what follows from it.

const IGNORE = 255;
const NAMES_SHOWN = 3;

const labels = {
  bytes(text) {
    const letters = atob(text);
    const found = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) found[i] = letters.charCodeAt(i);
    return found;
  },

  // By turns a label and how often it comes: a square of labels.
  runs(text) {
    const pairs = labels.bytes(text);
    let total = 0;
    for (let i = 1; i < pairs.length; i += 2) total += pairs[i];
    const flat = new Uint8Array(total);
    for (let i = 0, start = 0; i < pairs.length; start += pairs[i + 1], i += 2) {
      flat.fill(pairs[i], start, start + pairs[i + 1]);
    }
    return flat;
  },

  // A view's data as written by stages/inspect/gallery/write.py; `regions` are the K-means labels that occur, ascending.
  decode(data) {
    const view = {};
    for (const name of ["mask", "truth", "clusters", "groups"]) view[name] = labels.runs(data[name]);
    view.regions = [...new Set(view.clusters)].filter((label) => label !== IGNORE).sort((a, b) => a - b);
    view.seeds = data.seeds;
    if (data.similarities === undefined) return view;
    const k = view.regions.length;
    const above = new Float64Array(labels.bytes(data.similarities).buffer);
    view.similarity = new Float64Array(k * k).fill(1);
    for (let row = 0, next = 0; row < k; row++) {
      for (let column = row + 1; column < k; column++, next++) {
        view.similarity[row * k + column] = view.similarity[column * k + row] = above[next];
      }
    }
    view.lengths = new Float64Array(labels.bytes(data.lengths).buffer);
    view.text = new Int16Array(labels.bytes(data.text).buffer);
    return view;
  },

  // The group of each of k regions, numbered by their first region. `similarity` (k * k) is symmetric.
  fuse(similarity, k, threshold) {
    const owner = Array.from({ length: k }, (_, region) => region);
    const free = new Array(k).fill(true);
    for (;;) {
      let best = -Infinity;
      let picked = -1;
      for (let row = 0; row < k; row++) {
        for (let column = row + 1; free[row] && column < k; column++) {
          // Only what is larger wins: ties go to the smallest index.
          if (free[column] && similarity[row * k + column] > best) {
            best = similarity[row * k + column];
            picked = row;
          }
        }
      }
      if (!(best > threshold)) break;
      for (let region = 0; region < k; region++) {
        if (region === picked || (free[region] && similarity[picked * k + region] > threshold)) {
          owner[region] = picked;
          free[region] = false;
        }
      }
    }
    const numbers = new Map();
    return owner.map((first) => {
      if (!numbers.has(first)) numbers.set(first, numbers.size);
      return numbers.get(first);
    });
  },

  // The tokens' groups at another lambda.
  refuse(view, threshold) {
    const group = labels.fuse(view.similarity, view.regions.length, threshold);
    const ofLabel = new Uint8Array(256).fill(IGNORE);
    view.regions.forEach((label, region) => (ofLabel[label] = group[region]));
    return view.clusters.map((label) => ofLabel[label]);
  },

  // Sizes, purity (null: no token counts) and hidden classes found, as stages/inspect/regions.py and write.py have them.
  describe(groups, truth, hidden) {
    const sizes = new Map();
    const tables = new Map();
    groups.forEach((group, token) => {
      if (group === IGNORE) return;
      sizes.set(group, (sizes.get(group) || 0) + 1);
      if (truth[token] === IGNORE) return;
      if (!tables.has(group)) tables.set(group, new Map());
      const table = tables.get(group);
      table.set(truth[token], (table.get(truth[token]) || 0) + 1);
    });
    let counted = 0;
    let right = 0;
    const tokens = new Map();
    const found = new Map();
    for (const table of tables.values()) {
      const [commonest, most] = labels.commonest(table);
      for (const [label, count] of table) {
        counted += count;
        tokens.set(label, (tokens.get(label) || 0) + count);
      }
      right += most;
      found.set(commonest, (found.get(commonest) || 0) + most);
    }
    return {
      groups: sizes.size,
      sizes: [...sizes.entries()].sort((a, b) => a[0] - b[0]).map((entry) => entry[1]),
      purity: counted ? right / counted : null,
      hidden: hidden.filter((label) => tokens.has(label))
        .map((label) => [label, tokens.get(label), found.get(label) || 0]),
    };
  },

  // [key, count] of the largest count; of equal ones the smallest key.
  commonest(table) {
    return [...table.entries()].reduce((a, b) => (b[1] > a[1] || (b[1] === a[1] && b[0] < a[0]) ? b : a));
  },

  // Cosines of one group's mean token with every class: the mean of regions weighs each by the length of its sum.
  likeness(view, members) {
    const k = view.regions.length;
    const classes = k ? view.text.length / k : 0;
    const sums = new Float64Array(classes);
    let square = 0;
    for (const a of members) {
      for (const b of members) square += view.lengths[a] * view.lengths[b] * view.similarity[a * k + b];
      for (let label = 0; label < classes; label++) {
        sums[label] += (view.lengths[a] * view.text[a * classes + label]) / 32767;
      }
    }
    return sums.map((sum) => (square > 0 ? sum / Math.sqrt(square) : 0));
  },

  many(count, noun) {
    return `${count} ${noun}${count === 1 ? "" : "s"}`;
  },

  // Lines about one label of `flat`, which is a region or a group (`kind`). `words`: of each text feature.
  tell(view, flat, label, kind, classes, words) {
    const tokens = [...flat.keys()].filter((token) => flat[token] === label);
    const share = ((100 * tokens.length) / flat.length).toFixed(0);
    const lines = [`${kind} ${label}: ${labels.many(tokens.length, "token")}, ${share} % of the view`];
    const window = kind === "region" ? labels.seedOf(view, label) : null;
    if (window) lines.push(`seeded by a window of ${window} × ${window} tokens`);
    if (view.similarity) {
      const members = [...new Set(tokens.map((token) => view.regions.indexOf(view.clusters[token])))];
      const found = [...labels.likeness(view, members)].map((cosine, name) => [cosine, words[name]]);
      const names = found.sort((a, b) => b[0] - a[0]).slice(0, NAMES_SHOWN);
      lines.push(`this ${kind} looks like: ${names.map(([cosine, name]) => `${name} ${cosine.toFixed(2)}`).join(", ")}`);
    }
    const table = new Map();
    for (const token of tokens) {
      const truth = view.truth[token];
      if (truth !== IGNORE) table.set(truth, (table.get(truth) || 0) + 1);
    }
    if (table.size) {
      const [commonest, most] = labels.commonest(table);
      const known = [...table.values()].reduce((a, b) => a + b);
      lines.push(`in truth: ${classes[commonest]} ${((100 * most) / known).toFixed(0)} %`);
    }
    return lines;
  },

  // The side of the window that gave a region's seed; null where regions have none. Seeds come window by window.
  seedOf(view, label) {
    let end = 0;
    for (const [window, seeds] of view.seeds) {
      end += seeds;
      if (label < end) return window;
    }
    return null;
  },
};
