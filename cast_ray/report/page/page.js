(() => {
  "use strict";
  const form = document.querySelector("form.filter"), rows = form.querySelector("#rows"), images = form.querySelector("#images");
  const filtered = [...document.querySelectorAll("[data-row]")], names = new Set(filtered.map((e) => e.dataset.row).filter(Boolean));
  const remember = (key, value) => { try { sessionStorage.setItem(location.pathname + key, value); } catch (error) { /* not kept */ } };
  const recall = (key) => { try { return sessionStorage.getItem(location.pathname + key) || ""; } catch (error) { return ""; } };
  const apply = () => {
    const part = rows.value.trim().toLowerCase(), kind = images ? images.value : "";
    for (const element of filtered) {
      const row = element.dataset.row;
      element.hidden = (row && part && !row.toLowerCase().includes(part)) || (kind && element.dataset.kind && element.dataset.kind !== kind);
    }
    const count = [...names].filter((name) => name.toLowerCase().includes(part)).length;
    form.querySelector("#shown").value = part ? `${count} of ${names.size} rows` : "";
    remember("rows", rows.value);
    if (images) remember("images", images.value);
  };
  rows.value = recall("rows");
  if (images) { images.value = recall("images"); images.addEventListener("change", apply); }
  rows.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
  const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const x = parseFloat(a), y = parseFloat(b);
    return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b) : x - y;
  };
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    if (body.rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const isText = !head.classList.contains("number");
        const order = (a, b) => isText ? valueOf(a, column).localeCompare(valueOf(b, column), undefined, { numeric: true }) : compare(valueOf(a, column), valueOf(b, column));
        body.append(...[...body.rows].sort((a, b) => descending ? order(b, a) : order(a, b)));
      });
    });
  }
})();
