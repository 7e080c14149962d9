/** Keys of the worklist: j, k and arrows move between exams, / goes to the search. Readings that wait are sent. */

import { sendWaiting } from "./drafts.js";

void sendWaiting(document.querySelector("main")!.dataset.reader ?? "");

const links = [...document.querySelectorAll<HTMLAnchorElement>("tbody a")];

function move(step: number): void {
  const here = links.indexOf(document.activeElement as HTMLAnchorElement);
  const next = here < 0 ? (step > 0 ? 0 : links.length - 1) : Math.min(links.length - 1, Math.max(0, here + step));
  links[next]?.focus();
}

document.addEventListener("keydown", event => {
  const target = event.target as HTMLElement;
  if (["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j" || event.key === "ArrowDown") move(1);
  else if (event.key === "k" || event.key === "ArrowUp") move(-1);
  else if (event.key === "/") document.querySelector<HTMLInputElement>("input[type=search]")?.focus();
  else return;
  event.preventDefault();
});
