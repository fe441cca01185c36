"use strict";
// Draws every chart from the JSON in the page: colours come from the theme in force, buttons choose the view and the inits.
(() => {
  const specification = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Replace every "var(--name)" in a figure by its value in the theme in force.
  const themed = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    return value;
  };

  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => ({
    figure,
    views: specification[figure.dataset.chart],
    view: 0,
    hidden: new Set(),
  }));

  const draw = ({ figure, views, view, hidden }) => {
    const style = getComputedStyle(document.documentElement);
    figure.querySelectorAll("[data-panel]").forEach((place, index) => {
      const panel = themed(views[view][index], style);
      const data = panel.data.map((trace) => ({ ...trace, visible: !hidden.has(trace.legendgroup) }));
      place.setAttribute("aria-label", panel.alt);
      Plotly.react(place, data, panel.layout, { responsive: true, displayModeBar: false });
    });
  };

  for (const chart of charts) {
    const views = chart.figure.querySelectorAll("[data-view]");
    views.forEach((button) =>
      button.addEventListener("click", () => {
        chart.view = Number(button.dataset.view);
        views.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        draw(chart);
      }),
    );
    chart.figure.querySelectorAll("[data-init]").forEach((button) =>
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        if (shown) chart.hidden.delete(button.dataset.init);
        else chart.hidden.add(button.dataset.init);
        button.setAttribute("aria-pressed", String(shown));
        draw(chart);
      }),
    );
    draw(chart);
  }
  dark.addEventListener("change", () => charts.forEach(draw));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((box) => (box.open = true)));
})();
