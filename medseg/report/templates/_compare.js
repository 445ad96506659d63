// A dot tells its case, and what each of the two methods has there.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("told").textContent);
  document.querySelectorAll(".overview .chart:has(.dots)").forEach(chart => {
    const label = Number(chart.closest("td").dataset.label);
    const methods = chart.closest("table").dataset.pair.split(" ").map(Number);
    window.pageTools.dots(chart, n => [
      data.cases[n], methods.map(m => `${data.methods[m]} ${data.values[m].at(label)[n]}`).join(", "),
    ]);
  });
})();
