// Tables: sorted by a click on a head, filtered by words and numbers; every row has an address.
const textOf = (cell) => cell.dataset.t ?? cell.textContent;

// A click sorts, numbers first; entries without a number go last either way.
function sortable(table) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column];
      return { row, number: cell.dataset.v === undefined ? null : Number(cell.dataset.v), text: textOf(cell) };
    });
    const order = new Intl.Collator(undefined, { numeric: true });
    keyed.sort((a, b) => {
      if ((a.number === null) !== (b.number === null)) return a.number === null ? 1 : -1;
      const way = a.number === null ? order.compare(a.text, b.text) : a.number - b.number;
      return down ? -way : way;
    });
    table.tBodies[0].append(...keyed.map((one) => one.row));
  }));
}

// What a row must be to stay: every word in it, none of the -words, and column<number as it says.
function tests(table, asked) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells].map((head) => head.dataset.name.toLowerCase());
  return asked.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const [, name, sign, bound] = /^(.+?)(<=|>=|<|>)(-?[\d.]+)$/.exec(word) ?? [];
    const column = name === undefined ? -1 : heads.findIndex((head) => head.startsWith(name));
    if (column > 0) {
      const holds = { "<": (x, y) => x < y, ">": (x, y) => x > y, "<=": (x, y) => x <= y, ">=": (x, y) => x >= y }[sign];
      return (row) => row.cells[column].dataset.v !== undefined && holds(Number(row.cells[column].dataset.v), Number(bound));
    }
    if (word.length > 1 && word[0] === "-") return (row) => !said(row).includes(word.slice(1));
    return (row) => said(row).includes(word);
  });
}
const said = (row) => [...row.cells].map(textOf).join(" ").toLowerCase();

function filter(grid) {
  const table = grid.querySelector("table"), rows = [...table.tBodies[0].rows];
  const kept = tests(table, grid.querySelector("input").value);
  for (const row of rows) row.hidden = !kept.every((holds) => holds(row));
  const count = rows.filter((row) => !row.hidden).length;
  grid.querySelector(".count").textContent = kept.length ? count + " of " + rows.length + " rows" : "";
}

// The row of the page's address is shown, whatever the filter says.
function follow() {
  const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!row?.matches("tbody tr")) return;
  if (row.hidden) {
    row.closest(".grid").querySelector("input").value = "";
    filter(row.closest(".grid"));
  }
  row.scrollIntoView({ block: "center", behavior: "instant" });
}

for (const grid of document.querySelectorAll(".grid")) {
  sortable(grid.querySelector("table"));
  grid.querySelector("input").addEventListener("input", () => filter(grid));
}
addEventListener("hashchange", follow);
follow();
