// The table of all cases, made from #rows a page at a time, and what a dot of a chart tells.
(() => {
  "use strict";
  const { compare, turn, words, dots } = window.pageTools;
  const data = JSON.parse(document.getElementById("rows").textContent);
  const get = id => document.getElementById(id);
  const table = get("cases"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const number = x => x === null ? NaN : x === "inf" ? Infinity : x === "-inf" ? -Infinity : x;
  const numbers = data.numbers.map(column => column.map(number));
  const total = data.case.length, all = [...Array(total).keys()];

  const written = (x, { digits, signed }) => {
    if (Number.isNaN(x)) return "–";
    if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
    const text = Math.abs(x).toFixed(digits), sign = Number(text) === 0 ? "" : x < 0 ? "−" : signed ? "+" : "";
    return sign + text;
  };
  const make = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const rowOf = n => {
    const row = make("tr"), head = make("th"), link = data.links[data.case[n]];
    head.scope = "row";
    const place = link ? head.appendChild(make("a", undefined, "name")) : head;
    if (link) place.href = "#" + link;
    place.append(make("bdi", data.cases[data.case[n]], link ? undefined : "name"));
    const [name, colour, mark] = data.labels[data.label[n]], tag = make("span", undefined, "tag");
    const swatch = make("span", mark, "swatch" + (mark ? " marked" : "") + (colour.toLowerCase() === "#0072b2" ? " light" : ""));
    swatch.style.background = colour;
    swatch.setAttribute("aria-hidden", "true");
    tag.append(swatch, make("bdi", name));
    const [status, said] = data.statuses[data.status[n]], state = make("td", undefined, "status");
    state.append(status === "ok" ? said : make("span", said, status === "both_empty" ? "pill" : "pill bad"));
    const label = make("td");
    label.append(tag);
    row.append(head, label, state, ...numbers.map((column, c) => make("td", written(column[n], data.columns[c]), "num")));
    return row;
  };

  // names are ranked once: comparing them at every sort would take seconds
  const collator = new Intl.Collator(undefined, { numeric: true });
  const ranks = names => {
    const rank = [];
    [...names.keys()].sort((a, b) => collator.compare(names[a], names[b])).forEach((n, position) => { rank[n] = position; });
    return rank;
  };
  const nameRanks = [ranks(data.cases), ranks(data.labels.map(l => l[0])), ranks(data.statuses.map(s => s[1]))];
  const nameColumns = [data.case, data.label, data.status];
  const key = (column, n) => column < 3 ? nameRanks[column][nameColumns[column][n]] : numbers[column - 3][n];

  const find = get("find"), onlyLabel = get("only-label"), onlyStatus = get("only-status");
  const lower = [data.cases, data.labels.map(l => l[0]), data.statuses.map(s => s[1])].map(names => names.map(t => t.toLowerCase()));
  let order = all, shown = all, start = 0;

  const draw = () => {
    const end = Math.min(start + data.page, shown.length);
    body.replaceChildren(...shown.slice(start, end).map(rowOf));
    get("range").textContent = shown.length ? `Rows ${start + 1}–${end} of ${shown.length}` : "No row";
    get("pager").hidden = shown.length <= data.page;
    get("before").disabled = start === 0;
    get("after").disabled = end === shown.length;
    get("found").textContent = shown.length === total ? `${total} row${total === 1 ? "" : "s"}` : `${shown.length} of ${total} rows`;
  };
  const sift = () => {
    const wanted = words(find.value), label = onlyLabel?.value ?? "", status = onlyStatus.value;
    shown = order.filter(n =>
      (label === "" || data.label[n] === Number(label)) && (status === "" || data.status[n] === Number(status)) &&
      wanted.every(word => lower[0][data.case[n]].includes(word) || lower[1][data.label[n]].includes(word) || lower[2][data.status[n]].includes(word)));
    start = 0;
    draw();
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = turn(heads, head);
    order = [...order].sort((a, b) => compare(key(column, a), key(column, b), sign));
    sift();
  }));
  [find, onlyLabel, onlyStatus].forEach(control => control?.addEventListener("input", sift));
  const leaf = by => { start += by; draw(); table.parentElement.scrollTop = 0; };
  get("before").addEventListener("click", () => leaf(-data.page));
  get("after").addEventListener("click", () => leaf(data.page));
  draw();

  // worst is what has no finite distance at all
  const mean = row => row.dataset.mean === "" ? Infinity : Number(row.dataset.mean);
  get("label-order")?.addEventListener("input", event => document.querySelectorAll(".panel").forEach(panel => {
    const rows = panel.listed ??= [...panel.querySelectorAll("tbody tr")], sign = panel.dataset.metric.endsWith("_mm") ? -1 : 1;
    panel.querySelector("tbody").append(...(event.target.value ? [...rows].sort((a, b) => sign * (mean(a) - mean(b)) || 0) : rows));
  }));

  // a dot tells its case; a click finds the case in the table
  const columnOf = metric => data.columns.findIndex(column => column.name === metric);
  const told = n => ["Dice", document.querySelector("[name=measure]:checked")?.parentElement.textContent.trim(), "Reference (ml)", "Difference (ml)"]
    .filter((name, at, names) => name && names.indexOf(name) === at && columnOf(name) >= 0)
    .map(name => `${name} ${written(numbers[columnOf(name)][n], data.columns[columnOf(name)])}`).join(", ");
  document.querySelectorAll(".chart:has(.dots[data-rows])").forEach(chart => dots(
    chart,
    n => [data.cases[data.case[n]], `${data.labels[data.label[n]][0]}: ${told(n)}`],
    n => {
      find.value = data.cases[data.case[n]];
      sift();
      get("all").scrollIntoView();
    },
  ));
})();
