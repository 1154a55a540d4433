"use strict";
(() => {
  const byId = (name) => document.getElementById(name);

  // ---- language: the browser's own to begin with ----
  const chinese = byId("use-zh");
  const setLanguage = () => { document.documentElement.lang = chinese.checked ? "zh-CN" : "en"; };
  if (/^zh/i.test(navigator.language || "")) chinese.checked = true;
  for (const button of document.querySelectorAll(".switch")) button.addEventListener("change", setLanguage);
  setLanguage();

  // ---- charts: one step, its value in all of them ----
  const charts = [...document.querySelectorAll(".chart > svg")].map((drawing) => ({
    drawing,
    cursor: drawing.querySelector(".cursor"),
    at: drawing.querySelector(".at"),
    values: [...drawing.parentNode.querySelectorAll("b[data-points]")].map((place) => ({
      place,
      last: place.textContent,
      points: place.dataset.points.split(";").map((pair) => pair.split(" ").map(Number)),
    })),
    ...Object.fromEntries(["low", "high", "left", "right"].map((name) => [name, Number(drawing.dataset[name])])),
  }));
  const all = charts.flatMap((chart) => chart.values.flatMap(({ points }) => points.map(([step]) => step)));
  const steps = [...new Set(all)].sort((a, b) => a - b);
  const nearest = (numbers, wanted) =>
    numbers.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best));
  const format = (value) => (Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
  let current = steps.length - 1;

  const show = (step) => {
    current = steps.indexOf(step);
    for (const { cursor, at, values, low, high, left, right } of charts) {
      const x = left + ((step - low) / (high - low)) * (right - left);
      cursor.setAttribute("transform", `translate(${x})`);
      cursor.setAttribute("visibility", "visible");
      at.textContent = step;
      at.setAttribute("x", x + (x > (left + right) / 2 ? -4 : 4));
      at.setAttribute("text-anchor", x > (left + right) / 2 ? "end" : "start");
      for (const { place, points } of values) {
        const found = nearest(points.map(([own]) => own), step);
        const value = format(points.find(([own]) => own === found)[1]);
        // A metric that is measured now and then says of which step its value is.
        place.textContent = found === step ? value : `${value} @${found}`;
      }
    }
  };
  const rest = () => {
    for (const { cursor, at, values } of charts) {
      cursor.setAttribute("visibility", "hidden");
      at.textContent = "";
      for (const { place, last } of values) place.textContent = last;
    }
  };
  for (const { drawing, low, high, left, right } of charts) {
    const point = (event) => {
      const frame = drawing.getBoundingClientRect();
      const x = ((event.clientX - frame.left) / frame.width) * drawing.viewBox.baseVal.width;
      show(nearest(steps, low + ((x - left) / (right - left)) * (high - low)));
    };
    drawing.addEventListener("pointermove", point);
    drawing.addEventListener("pointerdown", point);
    drawing.addEventListener("pointerleave", rest);
    drawing.addEventListener("blur", rest);
    drawing.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      show(steps[Math.min(steps.length - 1, Math.max(0, current + move))]);
    });
  }

  // ---- samples: two columns, and what is searched for ----
  const search = byId("search");
  if (!search) return;
  const cards = [...document.querySelectorAll("#samples article")];
  const choose = () => {
    const wanted = search.value.trim().toLowerCase();
    const chosen = [byId("left").value, byId("right").value];
    let count = 0;
    for (const card of cards) {
      let said = card.querySelector(".prompt").textContent;
      let any = false;
      for (const answer of card.querySelectorAll(".answer")) {
        const place = chosen.indexOf(answer.dataset.column);
        answer.hidden = place < 0;
        answer.classList.toggle("left", place === 0);
        answer.classList.toggle("right", place === 1);
        answer.style.order = place;
        if (place < 0) continue;
        any = true;
        said += ` ${answer.querySelector("p").textContent}`;
      }
      card.hidden = !any || !said.toLowerCase().includes(wanted);
      count += card.hidden ? 0 : 1;
    }
    byId("found").textContent = `${count} / ${cards.length}`;
  };
  for (const name of ["left", "right", "search"]) byId(name).addEventListener("input", choose);
  choose();
})();
