// Plotly knows nothing of the page's colours: hand them over, now and whenever the reader's theme changes.
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function paint() {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--text").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const card = style.getPropertyValue("--card").trim();
    document.querySelectorAll(".plotly-graph-div").forEach(function (plot) {
      const change = { "font.color": text, "hoverlabel.bgcolor": card, "hoverlabel.font.color": text };
      Object.keys(plot.layout).filter((key) => /^[xy]axis\d*$/.test(key)).forEach(function (axis) {
        change[axis + ".gridcolor"] = grid;
        change[axis + ".linecolor"] = grid;
      });
      Plotly.relayout(plot, change);
    });
  }
  // drawn while it was folded away, a plot has no width yet
  document.querySelectorAll("details").forEach(function (fold) {
    fold.addEventListener("toggle", () => fold.querySelectorAll(".plotly-graph-div").forEach((plot) => Plotly.Plots.resize(plot)));
  });
  dark.addEventListener("change", paint);
  paint();
})();
