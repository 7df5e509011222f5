// A picture's files: as it is on white paper, for papers; and its numbers.
byId("pictures")?.addEventListener("click", (event) => {
  const button = event.target.closest("[data-save]");
  if (!button) return;
  const figure = button.closest("figure");
  if (button.dataset.save === "csv") return save(figure.id + ".csv", "text/csv", figure.querySelector("pre").textContent);
  const bytes = Uint8Array.from(atob(figure.querySelector("img").src.split(",")[1]), (c) => c.charCodeAt(0));
  const svg = new TextDecoder().decode(bytes).replace(/<style>@media screen.*?<\/style>/, "").replace(/var\(--of-\w+, (#\w+)\)/g, "$1");
  return save(figure.id + ".svg", "image/svg+xml", svg);
});
