// What every page does: the theme, sorting and filtering of tables. Without a script the page is whole, only still.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("has-script");

  const theme = document.getElementById("theme"), prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;
  const tellTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tellTheme(); });
  prefersDark.addEventListener("change", tellTheme);
  tellTheme();

  const NUMBERS = { inf: Infinity, "-inf": -Infinity, nan: NaN, "": NaN };
  const order = new Intl.Collator(undefined, { numeric: true }).compare;
  const value = cell => {
    const given = cell.dataset.value;
    return given === undefined ? cell.textContent.trim() : given in NUMBERS ? NUMBERS[given] : Number(given);
  };
  const absent = x => typeof x === "number" && Number.isNaN(x);
  // what has no number stays at the end whichever way the table is sorted
  const compare = (a, b, sign) => absent(a) || absent(b) ? absent(a) - absent(b)
    : sign * (typeof a === "number" && typeof b === "number" ? (a === b ? 0 : a - b) : order(String(a), String(b)));
  const turn = (heads, head) => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    return sign;
  };
  const words = text => text.toLowerCase().split(/\s+/).filter(Boolean);

  document.querySelectorAll("table[data-sortable]").forEach(table => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const sign = turn(heads, head);
      const keyed = [...table.tBodies[0].rows].map(row => [value(row.cells[column]), row]);
      keyed.sort((p, q) => compare(p[0], q[0], sign));
      table.tBodies[0].append(...keyed.map(pair => pair[1]));
    }));
  });
  document.querySelectorAll("input[data-filter]").forEach(input => {
    const id = input.dataset.filter, rows = [...document.getElementById(id).tBodies[0].rows];
    const count = document.querySelector(`[data-count="${CSS.escape(id)}"]`);
    input.addEventListener("input", () => {
      const wanted = words(input.value);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !wanted.every(word => text.includes(word));
        shown += !row.hidden;
      }
      if (count) count.textContent = `${shown} of ${rows.length} rows`;
    });
  });

  // a dot of a chart tells what it is; dots are points of one path, whose data-rows says which they are
  const tip = document.createElement("div"), REACH = 14;
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
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
  const dots = (chart, told, chosen) => {
    const path = chart.querySelector(".dots");
    const hide = () => { tip.hidden = true; delete chart.dataset.found; };
    chart.addEventListener("pointermove", event => {
      const found = near(path, event);
      if (found < 0) return hide();
      if (chosen) chart.dataset.found = found;
      const [name, text] = told(found), strong = document.createElement("strong");
      strong.textContent = name;
      tip.replaceChildren(strong, text);
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4)) + "px";
      tip.style.top = (event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16) + "px";
    });
    chart.addEventListener("pointerleave", hide);
    if (chosen) chart.addEventListener("click", () => {
      if (chart.dataset.found === undefined) return;
      chosen(Number(chart.dataset.found));
      hide();
    });
  };

  // the style opens these on paper too; older browsers need this
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.print-open:not([open])")];
    opened.forEach(part => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach(part => { part.open = false; }));

  window.pageTools = Object.freeze({ compare, turn, words, dots });
})();
