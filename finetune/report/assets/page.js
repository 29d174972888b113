"use strict";
// The slider over the states of the grid. Without it the grid shows them all.
window.startGrid = (before) => {
  const grid = document.querySelector(".grid");
  if (!grid) return;
  const slider = grid.querySelector("#slider"), at = grid.querySelector("#at"), all = grid.querySelector("#all");
  const cells = [...grid.querySelectorAll("[data-state]")];
  const show = () => {
    for (const cell of cells) cell.classList.toggle("on", cell.dataset.state === slider.value);
    const on = cells.find((cell) => cell.dataset.state === slider.value);
    at.textContent = on.dataset.name;
    slider.setAttribute("aria-valuetext", on.dataset.name);
  };
  const showAll = (every) => {
    all.setAttribute("aria-pressed", String(every));
    grid.classList.toggle("sliding", !every);
  };
  slider.value = before ? Math.min(before.at, slider.max) : grid.dataset.start;
  slider.addEventListener("input", () => { showAll(false); show(); });
  all.addEventListener("click", () => showAll(grid.classList.contains("sliding")));
  grid.querySelector(".control").hidden = false;
  showAll(before ? before.all : false);
  show();
};
window.startGrid();
