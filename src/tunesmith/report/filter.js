"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const [show, arm, other, search, count] = ["show", "arm", "other", "search", "count"].map(find);
  const rows = Array.from(document.querySelectorAll("details.row"), (element) => ({
    element,
    text: element.textContent.toLowerCase(),
    scores: element.dataset.s.split(",").map((s) => (s === "" ? NaN : Number(s))),
  }));
  const tests = {
    all: () => true,
    wins: (s) => s[arm.value] > s[other.value],
    losses: (s) => s[arm.value] < s[other.value],
    wrong: (s) => s.every((v) => !(v >= 0.9995)),
    differ: (s) => new Set(s.filter((v) => !Number.isNaN(v))).size > 1,
  };
  function apply() {
    const paired = show.value === "wins" || show.value === "losses";
    arm.parentElement.hidden = other.parentElement.hidden = !paired;
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const keep = tests[show.value](row.scores) && row.text.includes(wanted);
      row.element.hidden = !keep;
      shown += keep ? 1 : 0;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  for (const control of [show, arm, other, search]) control.addEventListener("input", apply);
  find("controls").hidden = false;
  apply();
})();
