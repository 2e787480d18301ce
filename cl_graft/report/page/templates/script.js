"use strict";
// Tables sort by the values of their cells: a cell's data-v, or its text; what has none stays last either way.
const value = (row, i) => {
  const cell = row.cells[i];
  const told = cell.dataset.v ?? cell.textContent.trim();
  if (told === "" || told === "–") return null;
  const number = Number(told);
  return Number.isNaN(number) ? told.toLowerCase() : number;
};
const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
for (const button of document.querySelectorAll("table.sort thead th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table");
    const column = head.cellIndex;
    const first = head.classList.contains("l") || head.classList.contains("name") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === first ? other : first;
    for (const th of table.querySelectorAll("thead th")) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    for (const body of table.tBodies) {  // a part of the table each: rows stay in theirs
      const own = [...body.rows].filter((row) => !row.classList.contains("part"));
      const rows = own.map((row, k) => [value(row, column), k, row]);
      rows.sort(([a, i], [b, j]) => {
        if (a === null || b === null) return (a === null) - (b === null) || i - j;
        return sign * order(a, b) || i - j;
      });
      body.append(...rows.map(([, , row]) => row));
    }
  });
}
for (const field of document.querySelectorAll("input[data-filter]")) {
  const all = [...document.getElementById(field.dataset.filter).tBodies].flatMap((body) => [...body.rows]);
  const rows = all.filter((row) => !row.classList.contains("part"));
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
for (const chip of document.querySelectorAll(".chip[data-show]")) {
  chip.addEventListener("click", () => {
    const chips = chip.parentElement.querySelectorAll(".chip");
    const on = chip.getAttribute("aria-pressed") === "true";
    for (const other of chips) other.setAttribute("aria-pressed", "false");
    chip.setAttribute("aria-pressed", String(!on));
    for (const row of document.getElementById(chip.dataset.of).tBodies[0].rows) {
      row.hidden = !on && row.dataset.o !== chip.dataset.show;
    }
  });
}
// A shadow on each edge beyond which there is more, and the keyboard scrolls what is wider than its box.
for (const inner of document.querySelectorAll(".scroll, .pan, .bar .links")) {
  const box = document.createElement("div");
  box.className = "box";
  inner.before(box);
  box.append(inner);
  const mark = () => {
    const { scrollLeft: x, scrollTop: y, clientWidth, clientHeight, scrollWidth, scrollHeight } = inner;
    box.classList.toggle("left", x > 1);
    box.classList.toggle("right", x + clientWidth < scrollWidth - 1);
    box.classList.toggle("down", y + clientHeight < scrollHeight - 1);
    inner.toggleAttribute("tabindex", false);
    if (scrollWidth > clientWidth + 1 || scrollHeight > clientHeight + 1) inner.tabIndex = 0;
  };
  inner.addEventListener("scroll", mark, { passive: true });
  const seen = new ResizeObserver(mark);
  for (const element of [inner, inner.firstElementChild]) seen.observe(element);
}
