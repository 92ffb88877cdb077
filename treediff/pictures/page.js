"use strict";
// Which node is shown is in the address; the style sheet shows it, and the browser moves the focus to its details.
// This adds the keys and marks the way in the tree.
const links = new Map([...document.querySelectorAll(".tree a")].map((a) => [a.getAttribute("href"), a]));
const sections = new Map([...document.querySelectorAll("section")].map((s) => ["#" + s.id, s]));
const root = "#" + document.querySelector("section.root").id;
const current = () => (sections.has(location.hash) ? location.hash : root);

function mark() {
  const way = new Set();
  for (let node = current(); node; node = sections.get(node).dataset.up) way.add(node);
  for (const [node, link] of links) {
    link.classList.toggle("way", way.has(node));
    if (node === current()) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  const link = links.get(current());
  // Only the tree's own pane scrolls: scrollIntoView would move the whole page on a narrow screen.
  const pane = document.querySelector(".tree");
  const [outer, inner] = [pane.getBoundingClientRect(), link.getBoundingClientRect()];
  if (inner.left < outer.left || inner.right > outer.right) {
    pane.scrollLeft += (inner.left + inner.right - outer.left - outer.right) / 2;
  }
  if (inner.top < outer.top || inner.bottom > outer.bottom) {
    pane.scrollTop += (inner.top + inner.bottom - outer.top - outer.bottom) / 2;
  }
}

addEventListener("hashchange", mark);
addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const way = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right" }[event.key];
  const to = event.key === "Home" ? root : way && sections.get(current()).dataset[way];
  if (way || to) event.preventDefault();
  if (to) location.hash = to;
});
mark();
