"use strict";
// Tables: a click on a head sorts by it, numbers first; entries without a number go last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.v;
      const order = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (column > 0 && (x === "" || y === "")) return (x === "") - (y === "");
        const way = column > 0 ? Number(x) - Number(y) : a.cells[0].textContent.localeCompare(b.cells[0].textContent, undefined, { numeric: true });
        return down ? -way : way;
      });
      body.append(...order);
    });
  });
}

// Samples: two methods side by side. Everything is written as text, never as HTML.
const data = JSON.parse(document.getElementById("samples-data").textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name, i) => {
    const option = make("option", "", name);
    option.value = i;
    option.selected = i === chosen;
    return option;
  }));
}

const shown = (score) => (score === null ? "no score" : String(Math.round(score * 1e4) / 1e4));

function side(label, answer, better) {
  const box = make("div");
  const head = make("div");
  head.append(make("span", "", label + ": "), make("span", "score " + better, answer ? shown(answer[1]) : "not asked"));
  box.append(head, make("pre", "text", answer ? answer[0] || answer[2] : ""));
  if (answer && answer[0] && answer[2]) box.append(make("pre", "text detail", answer[2]));
  return box;
}

function draw() {
  const task = data.tasks[byId("task").value];
  const left = byId("left").value, right = byId("right").value;
  const only = byId("differs").checked;
  const list = byId("sample-list");
  let differing = 0;
  const nodes = [];
  for (const doc of task.docs) {
    const a = doc.answers[left], b = doc.answers[right];
    const differs = !a || !b || a[0] !== b[0] || a[1] !== b[1];
    differing += differs;
    if (only && !differs) continue;
    let ways = ["", ""];
    if (a && b && a[1] !== null && b[1] !== null && a[1] !== b[1] && task.better !== null) {
      ways = (a[1] > b[1]) === task.better ? ["up", "down"] : ["down", "up"];
    }
    const node = make("details", "sample");
    const head = make("summary");
    const score = (answer, way) => make("span", "score " + way, answer ? shown(answer[1]) : "–");
    head.append(make("span", "", "document " + doc.id), make("span", "where", doc.where), score(a, ways[0]), make("span", "soft", "vs"), score(b, ways[1]));
    node.append(head);
    node.addEventListener("toggle", () => {
      if (!node.open || node.children.length > 1) return;
      const inside = make("div", "inside");
      inside.append(make("p", "soft", "Prompt" + (doc.cut ? ", its last " + doc.prompt.length + " of " + doc.chars + " characters" : "")), make("pre", "text", doc.prompt));
      inside.append(make("p", "soft", "Expected"), make("pre", "text", doc.target));
      const sides = make("div", "sides");
      sides.append(side(task.rows[left], a, ways[0]), side(task.rows[right], b, ways[1]));
      inside.append(sides);
      node.append(inside);
    });
    nodes.push(node);
  }
  list.replaceChildren(...nodes);
  byId("count").textContent = differing + " of the " + task.docs.length + " documents shown differ" + (task.left_out ? "; " + task.left_out + " more are left out of this page" : "");
}

function chooseTask() {
  const task = data.tasks[byId("task").value];
  fill(byId("left"), task.rows, 0);
  fill(byId("right"), task.rows, Math.min(1, task.rows.length - 1));
  draw();
}

if (data.tasks.length) {
  fill(byId("task"), data.tasks.map((t) => t.name), 0);
  byId("task").addEventListener("change", chooseTask);
  for (const id of ["left", "right", "differs"]) byId(id).addEventListener("change", draw);
  chooseTask();
}

// One sample token by token: colour is KL to the full cache, on a logarithmic scale from 0.001 to 1 nat.
const strength = (kl) => (kl === null ? 1 : Math.max(0, Math.min(1, (Math.log10(Math.max(kl, 1e-9)) + 3) / 3)));
const number = (x) => (x === null ? "∞" : x >= 1e-4 || x === 0 ? String(Number(x.toPrecision(3))) : x.toExponential(0));
const visible = (text) => (text === "" ? "(nothing)" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "␣"));

function tip(token, node) {
  const tops = token.top_base, mine = token.top;
  const box = byId("view-tip");
  box.replaceChildren(make("div", "", visible(token.text) + ": KL " + number(token.kl) + " nats, probability " + number(token.p_base) + " under the full cache, " + number(token.p) + " here"));
  const table = make("table");
  const head = make("tr");
  for (const name of ["full cache", "", "method", ""]) head.append(make("th", "", name));
  table.append(head);
  for (let i = 0; i < Math.max(tops.length, mine.length); i++) {
    const row = make("tr");
    for (const side of [tops, mine]) {
      const [word, p] = side[i] || ["", null];
      row.append(make("td", "", side[i] ? visible(word) : ""), make("td", "", p === null ? "" : number(p)));
    }
    table.append(row);
  }
  box.append(table);
  box.hidden = false;
  const at = node.getClientRects()[0], size = box.getBoundingClientRect();
  const below = at.bottom + size.height + 12 < innerHeight;
  box.style.left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8)) + scrollX + "px";
  box.style.top = (below ? at.bottom + 6 : at.top - size.height - 6) + scrollY + "px";
}

function drawView() {
  const task = data.views[byId("view-task").value];
  const view = task.views[byId("view-row").value];
  const hide = () => { byId("view-tip").hidden = true; };
  hide();
  byId("view-text").replaceChildren(...view.tokens.map((token) => {
    const node = make("span", token.top_base.length && token.top.length && token.top_base[0][0] !== token.top[0][0] ? "other" : "", token.text);
    const s = strength(token.kl);
    if (s > 0) node.style.backgroundColor = "color-mix(in srgb, #e4572e " + Math.round(8 + 72 * s) + "%, transparent)";
    node.tabIndex = 0;
    for (const event of ["mouseenter", "focus"]) node.addEventListener(event, () => tip(token, node));
    for (const event of ["mouseleave", "blur"]) node.addEventListener(event, hide);
    return node;
  }));
  const kl = view.tokens.map((t) => t.kl).filter((x) => x !== null);
  const mean = kl.length ? kl.reduce((a, b) => a + b, 0) / kl.length : null;
  byId("view-said").textContent = "document " + task.document + ", tokens " + view.start + " to " + (view.start + view.tokens.length - 1) + ", mean KL " + number(mean) + "; underlined: another likeliest token";
}

function chooseView() {
  const task = data.views[byId("view-task").value];
  const kl = (view) => view.tokens.reduce((a, t) => a + (t.kl === null ? 1e9 : t.kl), 0);
  const far = task.views.reduce((best, view, i) => (kl(view) > kl(task.views[best]) ? i : best), 0);
  fill(byId("view-row"), task.rows, far);
  drawView();
}

if (data.views.length) {
  fill(byId("view-task"), data.views.map((t) => t.name), 0);
  byId("view-task").addEventListener("change", chooseView);
  byId("view-row").addEventListener("change", drawView);
  chooseView();
}
