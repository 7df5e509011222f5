// One sample token by token: colour is KL to the full cache, on a logarithmic scale from 0.001 to 1 nat.
let views = [];
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
  const task = views[byId("view-task").value];
  const view = task.views[byId("view-row").value];
  const hide = () => { byId("view-tip").hidden = true; };
  hide();
  byId("view-text").replaceChildren(...view.tokens.map((token) => {
    const node = make("span", token.top_base.length && token.top.length && token.top_base[0][0] !== token.top[0][0] ? "other" : "", token.text);
    const s = strength(token.kl);
    if (s > 0) node.style.backgroundColor = "rgba(228, 87, 46, calc(var(--strong) * " + (0.1 + 0.9 * s).toFixed(3) + "))";
    node.tabIndex = 0;
    for (const event of ["mouseenter", "focus"]) node.addEventListener(event, () => tip(token, node));
    for (const event of ["mouseleave", "blur"]) node.addEventListener(event, hide);
    return node;
  }));
  const kl = view.tokens.map((t) => t.kl).filter((x) => x !== null);
  const mean = kl.length ? kl.reduce((a, b) => a + b, 0) / kl.length : null;
  byId("view-said").textContent = "document " + task.document + ", tokens " + view.start + " to " + (view.start + view.tokens.length - 1) + ", mean KL " + number(mean) + "; underlined: another likeliest token" + (task.left_out ? "; " + task.left_out + " methods more have no room here" : "");
}

function chooseView() {
  const task = views[byId("view-task").value];
  const kl = (view) => view.tokens.reduce((a, t) => a + (t.kl === null ? 1e9 : t.kl), 0);
  const far = task.views.reduce((best, view, i) => (kl(view) > kl(task.views[best]) ? i : best), 0);
  fill(byId("view-row"), task.rows, far);
  drawView();
}

lazily("tokens", () => {
  views = read("views-data");
  fill(byId("view-task"), views.map((t) => t.name), 0);
  byId("view-task").addEventListener("change", chooseView);
  byId("view-row").addEventListener("change", drawView);
  chooseView();
});
