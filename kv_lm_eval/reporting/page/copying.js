// The rows that are shown, in their order, as LaTeX, Markdown or CSV: what the report's files of tables hold.
function shownRows(grid) {
  const table = grid.querySelector("table");
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const over = table.tHead.querySelector(".groups");
  return {
    name: grid.dataset.name,
    title: grid.dataset.title,
    legend: grid.querySelector(".legend:not(.note)")?.textContent ?? "",
    notes: [...grid.querySelectorAll(".note")].map((note) => note.textContent),
    groups: over ? [...over.cells].map((cell) => [cell.textContent, cell.colSpan]) : [],
    heads: heads.map((head) => ({ name: head.dataset.name, unit: head.dataset.unit, errors: "errors" in head.dataset })),
    rows: [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) =>
      [...row.cells].map((cell) => ({ text: textOf(cell), number: cell.dataset.v, error: cell.dataset.e ?? "" }))),
  };
}
const fullHead = (head) => (head.unit ? head.name + " (" + head.unit + ")" : head.name);

const forms = {
  csv(table) {
    const field = (text) => (/[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);
    const line = (texts, errors) => texts.flatMap((text, i) => (table.heads[i].errors ? [text, errors[i]] : [text])).map(field).join(",") + "\n";
    const heads = table.heads.map(fullHead);
    return line(heads, heads.map((head) => head + " stderr")) +
      table.rows.map((row) => line(row.map((cell) => cell.number ?? cell.text), row.map((cell) => cell.error))).join("");
  },
  markdown(table) {
    const long = (text) => [...text].length;
    const tidy = (text) => text.split(/\s+/).filter(Boolean).join(" ").replaceAll("|", "\\|");
    const lines = [table.heads.map(fullHead), ...table.rows.map((row) => row.map((cell) => cell.text))].map((texts) => texts.map(tidy));
    const widths = table.heads.map((_, i) => Math.max(...lines.map((texts) => long(texts[i]))));
    const line = (texts) => "| " + texts.map((text, i) => {
      const room = " ".repeat(widths[i] - long(text));
      return i ? room + text : text + room;
    }).join(" | ") + " |";
    const rule = "|" + widths.map((width, i) => (i ? "-".repeat(width + 1) + ":" : "-".repeat(width + 2))).join("|") + "|";
    const below = [table.legend, ...table.notes].filter(Boolean).map((text) => "\n" + text);
    return ["### " + table.title, "", line(lines[0]), rule, ...lines.slice(1).map(line), ...below].join("\n") + "\n";
  },
  latex(table) {
    const signs = read("latex-data");
    const tex = (text) => [...text].map((sign) => signs[sign] ?? sign).join("");
    const line = (texts) => texts.map(tex).join(" & ") + " \\\\";
    const groups = [];
    if (table.groups.length) {
      const rules = [];
      let column = 1;
      for (const [title, count] of table.groups) {
        if (title) rules.push("\\cmidrule(lr){" + column + "-" + (column + count - 1) + "}");
        column += count;
      }
      groups.push(table.groups.map(([title, count]) => "\\multicolumn{" + count + "}{c}{" + tex(title) + "}").join(" & ") + " \\\\", rules.join(" "));
    }
    return [
      "\\begin{table}[t]", "\\centering", "\\caption{" + tex(table.title) + ". " + tex(table.legend) + "}", "\\label{tab:" + table.name + "}",
      "\\begin{tabular}{l" + "r".repeat(table.heads.length - 1) + "}", "\\toprule", ...groups,
      line(table.heads.map((head) => head.name)), line(table.heads.map((head) => head.unit)), "\\midrule",
      ...table.rows.map((row) => line(row.map((cell) => cell.text))),
      "\\bottomrule", "\\end{tabular}", "\\end{table}",
    ].join("\n") + "\n";
  },
};

for (const button of document.querySelectorAll("[data-as]")) {
  button.addEventListener("click", async () => {
    const table = shownRows(button.closest(".grid"));
    await copy(forms[button.dataset.as](table));
    button.closest(".tools").querySelector(".said").textContent = table.rows.length + (table.rows.length === 1 ? " row" : " rows") + " copied as " + button.textContent;
  });
}

// Commands: one row's, or all.
byId("runs")?.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const found = button.dataset.copy === "all" ? [...byId("runs").querySelectorAll("pre")] : [button.parentElement.nextElementSibling];
  await copy([...new Set(found.map((pre) => pre.textContent))].join("\n") + "\n");
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
});
