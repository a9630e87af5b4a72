"use strict";
// The note about what is pointed at, by mouse or by keys, and which group is lit up.

// `page`: at(id), cards, labelsOf(card, panel), paint(card, panels), classes(), words(), isSeen(label), shown() cards in order.
function makeNote({ at, cards, labelsOf, paint, classes, words, isSeen, shown }) {
  // What is known of the token (x, y in [0, 1)) of a panel: [text, label to light up or null].
  function tell(card, panel, x, y) {
    const flat = labelsOf(card, panel);
    const grid = Math.sqrt(flat.length);
    const label = flat[Math.floor(y * grid) * grid + Math.floor(x * grid)];
    if (panel.endsWith("mask")) {
      if (label === IGNORE) return [panel === "seen mask" ? "not annotated" : "no class known", null];
      return [`${classes()[label]} (${isSeen(label) ? "seen" : "hidden"} class)`, label];
    }
    if (label === IGNORE) return ["not pseudo-labelled: annotated, or outside the image", null];
    return [tellLabel(card, panel, label), label];
  }

  function tellLabel(card, panel, label) {
    const kind = panel === "K-means regions" ? "region" : "group";
    return labels.tell(card.view, labelsOf(card, panel), label, kind, classes(), words()).join("\n");
  }

  function choose(card, panel, label) {
    const before = card.chosen;
    if (before ? before.panel === panel && before.label === label : label === null) return;
    card.chosen = label === null ? null : { panel, label };
    if (card.canvases) paint(card, [panel, ...(before ? [before.panel] : [])]);
  }

  let noted = null;  // the card that the note is about
  let underCanvas = null;  // puts it there again, if keys brought it: focus scrolls

  function show(card, text, x, y) {
    if (noted && noted !== card) hide();
    noted = card;
    const note = at("note");
    note.hidden = false;
    if (note.textContent !== text) note.textContent = text;
    note.style.left = `${Math.min(x + 14, window.innerWidth - note.offsetWidth - 8)}px`;
    note.style.top = `${y + 18 + note.offsetHeight > window.innerHeight ? y - 10 - note.offsetHeight : y + 18}px`;
  }

  function hide() {
    at("note").hidden = true;
    if (noted) choose(noted, noted.chosen && noted.chosen.panel, null);
    noted = underCanvas = null;
  }

  function point(event) {
    underCanvas = null;
    const frame = event.target.closest && event.target.closest(".picture");
    const card = frame && cards[frame.closest("article").dataset.number];
    if (!card || !card.view || !card.canvases) return hide();
    const box = frame.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return hide();
    const panel = frame.dataset.panel === "image" ? "fused groups" : frame.dataset.panel;
    const [text, label] = tell(card, panel, x, y);
    choose(card, panel, label);
    show(card, text, event.clientX, event.clientY);
  }

  function nextGroup(card, step) {
    if (!card.view || !card.canvases) return;
    const there = [...new Set(labelsOf(card, "fused groups"))].filter((label) => label !== IGNORE).sort((a, b) => a - b);
    if (!there.length) return;
    const now = card.chosen && card.chosen.panel === "fused groups" ? there.indexOf(card.chosen.label) : step > 0 ? -1 : 0;
    const label = there[(now + step + there.length) % there.length];
    choose(card, "fused groups", label);
    const canvas = card.canvases.get("fused groups");
    canvas.scrollIntoView({ block: "nearest", inline: "nearest" });
    const text = tellLabel(card, "fused groups", label);
    underCanvas = () => {
      const box = canvas.getBoundingClientRect();
      show(card, text, box.right, box.top);
    };
    underCanvas();
  }

  function key(event) {
    if (event.key === "Escape") return hide();
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
    const other = shown()[shown().indexOf(card) + steps[event.key]];
    if (other) other.element.focus();
  }

  const scrolled = () => (underCanvas || hide)();
  return { hide, scrolled, point, key };
}
