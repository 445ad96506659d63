// A dot tells its case, and what each of the two methods has there.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("told").textContent);
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.hidden = true;
  const REACH = 14;
  const near = (path, event) => {
    path.points ??= [...path.getAttribute("d").matchAll(/M([\d.e+-]+) ([\d.e+-]+)h/g)].map(m => [Number(m[1]), Number(m[2])]);
    path.cases ??= path.dataset.rows.split(" ").map(Number);
    const at = path.getScreenCTM();
    let best = -1, least = REACH;
    path.points.forEach(([x, y], n) => {
      const away = Math.hypot(at.a * x + at.e - event.clientX, at.d * y + at.f - event.clientY);
      if (away < least) { least = away; best = path.cases[n]; }
    });
    return best;
  };
  document.querySelectorAll(".overview .chart:has(.dots)").forEach(chart => {
    const path = chart.querySelector(".dots"), label = Number(chart.closest("td").dataset.label);
    const methods = chart.closest("table").dataset.pair.split(" ").map(Number);
    const hide = () => { tip.hidden = true; };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointermove", event => {
      const found = near(path, event);
      if (found < 0) return hide();
      const name = document.createElement("strong");
      name.textContent = data.cases[found];
      tip.replaceChildren(name, methods.map(m => `${data.methods[m]} ${data.values[m].at(label)[found]}`).join(", "));
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4)) + "px";
      tip.style.top = (event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16) + "px";
    });
  });
})();
