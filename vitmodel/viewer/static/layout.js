import { BASE } from "./data.js";
const all = () => true;
const whole = { shows: all, isPart: false, withOther: false, isPair: false };
export const LAYOUTS = {
    four: { ...whole, title: "two by two", key: "2", columns: count => Math.min(2, count) },
    pair: { ...whole, title: "heat map side by side", key: "3", columns: () => 2, isPair: true },
    row: { ...whole, title: "one row", key: "4", columns: count => count },
    cc: { ...whole, title: "CC only", key: "5", columns: count => count, shows: image => image.view === "CC", isPart: true },
    mlo: { ...whole, title: "MLO only", key: "6", columns: count => count, shows: image => image.view === "MLO", isPart: true },
    right: { ...whole, title: "right only", key: "7", columns: () => 1, shows: image => image.side === "R", isPart: true },
    left: { ...whole, title: "left only", key: "8", columns: () => 1, shows: image => image.side === "L", isPart: true },
    other: { ...whole, title: "with another exam", key: "9", columns: () => 4, withOther: true },
};
const STANDARD = [["R", "CC"], ["L", "CC"], ["R", "MLO"], ["L", "MLO"]];
const channel = new BroadcastChannel("vitmodel-view");
export function currentLayout() {
    const name = sessionStorage.getItem("layout") ?? "four";
    return name in LAYOUTS ? name : "four";
}
export function keepLayout(name) { sessionStorage.setItem("layout", name); }
export function isPanelHidden() { return sessionStorage.getItem("panel") === "hidden"; }
export function keepPanel(hidden) { sessionStorage.setItem("panel", hidden ? "hidden" : "shown"); }
const isImage = (place) => typeof place !== "string";
export function hang(images, layout) {
    const fitting = images.filter(layout.shows);
    const chosen = fitting.length ? fitting : images;
    const places = STANDARD.map(([side, view]) => chosen.find(image => image.side === side && image.view === view && image.pixels) ?? `${side}-${view}`);
    const unused = (side) => chosen.find(image => image.side === side && !places.includes(image));
    STANDARD.forEach(([side], index) => { if (!isImage(places[index]))
        places[index] = unused(side) ?? places[index]; });
    const pairs = [places.slice(0, 2), places.slice(2)].filter(pair => layout.withOther || pair.some(isImage));
    const sides = new Set(pairs.flat().filter(isImage).map(image => image.side));
    const shown = sides.size === 2 || layout.withOther ? pairs.flat() : pairs.flat().filter(isImage);
    for (const image of chosen)
        if (shown.length < Math.min(4, chosen.length) && !shown.includes(image) && !image.side)
            shown.push(image);
    return [shown, images.filter(image => !shown.includes(image))];
}
let shown = "";
const isPart = () => LAYOUTS[currentLayout()].isPart;
export function follow(exam, onDisplay) {
    shown = exam;
    channel.addEventListener("message", (event) => {
        const { exam: other, display } = event.data;
        if (!isPart())
            return;
        if (other !== shown) {
            if (!display)
                location.assign(`${BASE}/exams/${other}`);
        }
        else if (display)
            onDisplay(display);
    });
    channel.postMessage({ exam });
}
export function tell(display) {
    if (shown && isPart())
        channel.postMessage({ exam: shown, display });
}
