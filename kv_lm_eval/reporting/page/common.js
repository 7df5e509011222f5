// What the scripts of a page share.
const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);
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

// Does something once a section is near the window, or goes to paper.
function lazily(id, what) {
  const section = byId(id);
  if (!section) return;
  const watch = new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) once(); }, { rootMargin: "800px" });
  const once = () => {
    watch.disconnect();
    removeEventListener("beforeprint", once);
    what();
  };
  watch.observe(section);
  addEventListener("beforeprint", once);
}

// Text to the clipboard; where that is not allowed, by way of a field that is chosen and copied.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea", "", text);
    document.body.append(field);
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

// A file of one's own.
function save(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
