"use strict";
(() => {
  const orderOf = (row, column, numeric) => {
    const value = row.cells[column].dataset.order;
    if (value === undefined || value === "") return null;
    return numeric ? Number(value) : value;
  };

  // Rows without a value stay last, whichever way.
  const sortRows = (table, column, numeric, descending) => {
    const body = table.tBodies[0];
    const keyed = Array.from(body.rows, (row, place) => ({ row, place, key: orderOf(row, column, numeric) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
      const order = numeric ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
      return (descending ? -order : order) || a.place - b.place;
    });
    body.append(...keyed.map((entry) => entry.row));
  };

  for (const table of document.querySelectorAll(".grid table")) {
    const headings = Array.from(table.tHead.rows[0].cells);
    headings.forEach((heading, column) => {
      if (!heading.dataset.sort) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const numeric = heading.dataset.sort === "number";
        const before = heading.getAttribute("aria-sort");
        // Numbers are asked for from the largest down, words from A.
        const descending = before ? before === "ascending" : numeric;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortRows(table, column, numeric, descending);
      });
    });
  }

  // A long group shows its first images until asked for all, or for some of them.
  const few = matchMedia("(max-width: 40rem)").matches ? 8 : 24;

  for (const gallery of document.querySelectorAll(".gallery")) {
    const form = gallery.querySelector(".filter");
    if (!form) continue;
    const { group, class: ofClass, text } = form.elements;
    const output = form.querySelector("output");
    const shots = Array.from(gallery.querySelectorAll(".shot"));
    const words = new Map(shots.map((shot) => [shot, shot.textContent.toLowerCase()]));
    const apply = () => {
      const wanted = text.value.trim().toLowerCase();
      const chosen = Boolean(group.value || ofClass.value || wanted);
      let found = 0;
      for (const section of gallery.querySelectorAll(".group")) {
        const more = section.querySelector(".more");
        const folded = !chosen && more.dataset.open !== "true";
        const own = Array.from(section.querySelectorAll(".shot"));
        const fitting = own.filter(
          (shot) =>
            (!group.value || section.dataset.group === group.value) &&
            (!ofClass.value || shot.dataset.class === ofClass.value) &&
            words.get(shot).includes(wanted),
        );
        const shown = new Set(folded ? fitting.slice(0, few) : fitting);
        for (const shot of own) shot.hidden = !shown.has(shot);
        more.hidden = shown.size === fitting.length;
        more.dataset.left = fitting.length - shown.size;
        section.hidden = fitting.length === 0;
        found += fitting.length;
      }
      output.textContent = chosen ? `${found} of ${shots.length}` : `${found} ${output.dataset.noun ?? "images"}`;
    };
    for (const more of gallery.querySelectorAll(".more")) {
      more.addEventListener("click", () => {
        more.dataset.open = "true";
        apply();
      });
    }
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    apply();
  }

  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let parent = target; parent; parent = parent.parentElement) if (parent.tagName === "DETAILS") parent.open = true;
    if (target.classList.contains("shot")) {
      // Who asks for the images of a class sees all of them, and no others.
      const filter = target.closest(".gallery").querySelector(".filter");
      filter.elements.group.value = target.closest(".group").dataset.group;
      filter.elements.class.value = target.dataset.class;
      filter.elements.text.value = "";
      filter.dispatchEvent(new Event("input"));
    }
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", reveal);
  reveal();

  // What goes on beyond the right edge fades there.
  const scrollers = document.querySelectorAll(".scroll, .paper, nav ul");
  const fade = (box) => box.classList.toggle("cut", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
  for (const box of scrollers) box.addEventListener("scroll", () => fade(box), { passive: true });
  const fadeAll = () => scrollers.forEach(fade);
  window.addEventListener("resize", fadeAll);
  window.addEventListener("load", fadeAll);
  fadeAll();

  // Paper shows cards unfolded, and has no edge to scroll to.
  window.addEventListener("beforeprint", () => {
    for (const box of scrollers) box.classList.remove("cut");
    for (const details of document.querySelectorAll("details.card")) details.open = true;
  });
})();
