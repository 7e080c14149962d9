import { sendWaiting } from "./drafts.js";
void sendWaiting(document.querySelector("main").dataset.reader ?? "");
const links = [...document.querySelectorAll("tbody a")];
function move(step) {
    const here = links.indexOf(document.activeElement);
    const next = here < 0 ? (step > 0 ? 0 : links.length - 1) : Math.min(links.length - 1, Math.max(0, here + step));
    links[next]?.focus();
}
document.addEventListener("keydown", event => {
    const target = event.target;
    if (["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName) || event.ctrlKey || event.metaKey || event.altKey)
        return;
    if (event.key === "j" || event.key === "ArrowDown")
        move(1);
    else if (event.key === "k" || event.key === "ArrowUp")
        move(-1);
    else if (event.key === "/")
        document.querySelector("input[type=search]")?.focus();
    else
        return;
    event.preventDefault();
});
