// The table of all cases, made from #rows a page at a time, and what a chart tells of a dot.
(() => {
  "use strict";
  const { compare, turn, words } = window.pageTools;
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

  // a dot tells its case; a click finds the case in the table
  const tip = document.body.appendChild(make("div"));
  tip.id = "tip";
  tip.hidden = true;
  const REACH = 14;
  const near = (path, event) => {
    path.points ??= [...path.getAttribute("d").matchAll(/M([\d.e+-]+) ([\d.e+-]+)h/g)].map(m => [Number(m[1]), Number(m[2])]);
    path.rows ??= path.dataset.rows.split(" ").map(Number);
    const at = path.getScreenCTM();
    let best = -1, least = REACH;
    path.points.forEach(([x, y], n) => {
      const away = Math.hypot(at.a * x + at.e - event.clientX, at.d * y + at.f - event.clientY);
      if (away < least) { least = away; best = path.rows[n]; }
    });
    return best;
  };
  const columnOf = metric => data.columns.findIndex(column => column.name === metric);
  const told = n => ["Dice", document.querySelector("[name=measure]:checked")?.parentElement.textContent.trim(), "Reference (ml)", "Difference (ml)"]
    .filter((name, at, names) => name && names.indexOf(name) === at && columnOf(name) >= 0)
    .map(name => `${name} ${written(numbers[columnOf(name)][n], data.columns[columnOf(name)])}`).join(", ");
  document.querySelectorAll(".chart:has(.dots[data-rows])").forEach(chart => {
    const path = chart.querySelector(".dots");
    const hide = () => { tip.hidden = true; delete chart.dataset.found; };
    chart.addEventListener("pointermove", event => {
      const n = near(path, event);
      if (n < 0) return hide();
      chart.dataset.found = n;
      tip.replaceChildren(make("strong", data.cases[data.case[n]]), `${data.labels[data.label[n]][0]}: ${told(n)}`);
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4)) + "px";
      tip.style.top = (event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16) + "px";
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("click", () => {
      if (chart.dataset.found === undefined) return;
      find.value = data.cases[data.case[Number(chart.dataset.found)]];
      sift();
      tip.hidden = true;
      get("all").scrollIntoView();
    });
  });

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.print-open:not([open])")];
    opened.forEach(part => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach(part => { part.open = false; }));
})();
