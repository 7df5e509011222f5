// Answers: two methods side by side, read when they are scrolled to. Everything is written as text, never as HTML.
let answers = { tasks: [] };

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
  const task = answers.tasks[byId("task").value];
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
  const task = answers.tasks[byId("task").value];
  fill(byId("left"), task.rows, 0);
  fill(byId("right"), task.rows, Math.min(1, task.rows.length - 1));
  draw();
}

lazily("samples", () => {
  answers = read("samples-data");
  if (!answers.tasks.length) return;
  fill(byId("task"), answers.tasks.map((t) => t.name), 0);
  byId("task").addEventListener("change", chooseTask);
  for (const id of ["left", "right", "differs"]) byId(id).addEventListener("change", draw);
  chooseTask();
});
