"use strict";
// Label maps on canvas. Colours that colour-blind people tell apart (Okabe and Ito), then hatching, borders and text.

const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
const HATCHES = ["none", "rising", "falling", "dots"];
const TEXT_HEIGHT = 0.055;  // of the canvas

const draw = {
  look(label) {
    return { colour: COLOURS[label % COLOURS.length], hatch: HATCHES[Math.floor(label / COLOURS.length) % HATCHES.length] };
  },

  // Labels (a square) over a transparent canvas; `nameOf` gives the text of a label; all but `chosen` fade.
  paint(canvas, flat, nameOf, chosen = null) {
    const context = canvas.getContext("2d");
    const grid = Math.sqrt(flat.length);
    const scale = canvas.width / grid;
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (const [label, cells] of draw.rectangles(flat, grid, scale)) {
      context.globalAlpha = chosen === null || chosen === label ? 1 : 0.25;
      if (label === IGNORE) {
        context.fillStyle = "#282828";
        context.fill(cells);
        continue;
      }
      const { colour, hatch } = draw.look(label);
      context.fillStyle = colour;
      context.fill(cells);
      if (hatch !== "none") {
        context.fillStyle = draw.pattern(context, hatch);
        context.fill(cells);
      }
    }
    context.globalAlpha = 1;
    draw.borders(context, flat, grid, scale);
    draw.texts(context, flat, grid, scale, nameOf);
  },

  // Label -> a path of its runs of cells.
  rectangles(flat, grid, scale) {
    const paths = new Map();
    for (let row = 0; row < grid; row++) {
      for (let start = 0, column = 1; column <= grid; column++) {
        const label = flat[row * grid + start];
        if (column < grid && flat[row * grid + column] === label) continue;
        if (!paths.has(label)) paths.set(label, new Path2D());
        // Whole pixels: no seams between neighbours.
        const [left, right] = [Math.round(start * scale), Math.round(column * scale)];
        const [top, bottom] = [Math.round(row * scale), Math.round((row + 1) * scale)];
        paths.get(label).rect(left, top, right - left, bottom - top);
        start = column;
      }
    }
    return paths;
  },

  pattern(context, hatch) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const brush = tile.getContext("2d");
    brush.strokeStyle = brush.fillStyle = "rgba(0, 0, 0, 0.75)";
    brush.lineWidth = 1.5;
    if (hatch === "dots") {
      brush.fillRect(2, 2, 3, 3);
    } else {
      brush.beginPath();
      for (const shift of [-8, 0, 8]) {  // the corners' halves too
        brush.moveTo(shift - 1, hatch === "rising" ? 9 : -1);
        brush.lineTo(shift + 9, hatch === "rising" ? -1 : 9);
      }
      brush.stroke();
    }
    return context.createPattern(tile, "repeat");
  },

  borders(context, flat, grid, scale) {
    const lines = new Path2D();
    for (let cell = 0; cell < flat.length; cell++) {
      const row = Math.floor(cell / grid);
      const column = cell % grid;
      const [x, y] = [Math.round((column + 1) * scale), Math.round((row + 1) * scale)];
      if (column + 1 < grid && flat[cell] !== flat[cell + 1]) {
        lines.moveTo(x, Math.round(row * scale));
        lines.lineTo(x, y);
      }
      if (row + 1 < grid && flat[cell] !== flat[cell + grid]) {
        lines.moveTo(Math.round(column * scale), y);
        lines.lineTo(x, y);
      }
    }
    for (const [style, width] of [["#000", 3], ["#fff", 1]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.stroke(lines);
    }
  },

  // In each patch of a label its text stands where it is farthest from another label, if there is room.
  texts(context, flat, grid, scale, nameOf) {
    const best = new Map();
    const patches = draw.patches(flat, grid);
    draw.depths(flat, grid).forEach((depth, cell) => {
      const patch = patches[cell];
      if (flat[cell] !== IGNORE && !(best.has(patch) && depth <= best.get(patch).depth)) best.set(patch, { depth, cell });
    });
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    const size = Math.max(11, Math.round(TEXT_HEIGHT * context.canvas.width));
    context.font = `600 ${size}px sans-serif`;
    for (const { depth, cell } of best.values()) {
      if (2 * depth * scale < 0.9 * size) continue;
      const text = nameOf(flat[cell]);
      const half = context.measureText(text).width / 2 + 3;
      const x = Math.min(Math.max((cell % grid + 0.5) * scale, half), context.canvas.width - half);
      const y = (Math.floor(cell / grid) + 0.5) * scale;
      context.lineWidth = 4;
      context.strokeStyle = "#fff";
      context.strokeText(text, x, y);
      context.fillStyle = "#000";
      context.fillText(text, x, y);
    }
  },

  // A number for each cell, the same where cells of one label touch.
  patches(flat, grid) {
    const patch = new Int32Array(flat.length).fill(-1);
    for (let first = 0; first < flat.length; first++) {
      if (patch[first] >= 0) continue;
      patch[first] = first;
      for (const reached = [first]; reached.length; ) {
        const cell = reached.pop();
        const column = cell % grid;
        const beside = [cell - grid, cell + grid, column > 0 ? cell - 1 : -1, column + 1 < grid ? cell + 1 : -1];
        for (const other of beside) {
          if (other < 0 || other >= flat.length || patch[other] >= 0 || flat[other] !== flat[cell]) continue;
          patch[other] = first;
          reached.push(other);
        }
      }
    }
    return patch;
  },

  // Steps from each cell to another label or the edge, at least 0.5.
  depths(flat, grid) {
    const depth = new Float64Array(flat.length);
    const relax = (cell, other, otherRow, otherColumn) => {
      const inside = otherRow >= 0 && otherRow < grid && otherColumn >= 0 && otherColumn < grid;
      const limit = inside && flat[other] === flat[cell] ? depth[other] + 1 : 0.5;
      depth[cell] = Math.min(depth[cell], limit);
    };
    depth.fill(Infinity);
    for (let cell = 0; cell < flat.length; cell++) {
      const [row, column] = [Math.floor(cell / grid), cell % grid];
      relax(cell, cell - grid, row - 1, column);
      relax(cell, cell - 1, row, column - 1);
    }
    for (let cell = flat.length - 1; cell >= 0; cell--) {
      const [row, column] = [Math.floor(cell / grid), cell % grid];
      relax(cell, cell + grid, row + 1, column);
      relax(cell, cell + 1, row, column + 1);
    }
    return depth;
  },
};
