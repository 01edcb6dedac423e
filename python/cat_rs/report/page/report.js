"use strict";

// Sort a table by the column whose heading was pressed; what has no value stays last in both directions.
function sort(table, heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  const column = Number(heading.dataset.column);
  const numeric = heading.dataset.kind === "number";
  const keyed = [...table.tBodies[0].rows].map((row) => {
    const text = row.cells[column].dataset.value;
    return { row, key: numeric ? Number(text) : text, empty: text === "" };
  });
  keyed.sort((left, right) => {
    if (left.empty || right.empty) return left.empty - right.empty;
    const order = numeric ? left.key - right.key : left.key.localeCompare(right.key, undefined, { numeric: true });
    return ascending ? order : -order;
  });
  for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  table.tBodies[0].append(...keyed.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.querySelectorAll("th[aria-sort]")) {
    heading.querySelector("button").addEventListener("click", () => sort(table, heading));
  }
}

// Long lists begin folded; without this script they are shown whole.
for (const list of document.querySelectorAll(".folding")) {
  if (Number(list.dataset.fold) === 0) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "unfold";
  const fold = (folded) => {
    list.classList.toggle("folded", folded);
    button.textContent = folded ? `Show ${list.dataset.noun}` : "Show fewer";
    button.setAttribute("aria-expanded", String(!folded));
  };
  button.addEventListener("click", () => fold(!list.classList.contains("folded")));
  fold(true);
  list.append(button);
}
