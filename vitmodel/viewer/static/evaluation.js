"use strict";
const element = (id) => document.getElementById(id);
const number = element("threshold");
const mover = element("mover");
const state = element("state");
let points = [];
let latest = 0;
let timer = 0;
const pointsOf = (curve) => JSON.parse(curve.dataset.points);
function connectCurves() {
    const roc = element("roc");
    points = roc ? pointsOf(roc) : [];
    for (const curve of document.querySelectorAll("svg.chooser")) {
        const choices = pointsOf(curve);
        curve.addEventListener("click", event => {
            const box = curve.getBoundingClientRect();
            const x = (event.clientX - box.left) / box.width, y = 1 - (event.clientY - box.top) / box.height;
            const distance = (point) => Math.hypot(point[1] - x, point[2] - y);
            set(choices.reduce((nearest, point) => distance(point) < distance(nearest) ? point : nearest)[0]);
        });
    }
    connectBreasts();
}
function connectBreasts() {
    const strip = element("breasts");
    const links = [...strip.querySelectorAll("a")];
    strip.addEventListener("keydown", event => {
        const here = links.indexOf(document.activeElement);
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const next = step ? here + step : { Home: 0, End: links.length - 1 }[event.key];
        if (here < 0 || next === undefined || !links[next])
            return;
        event.preventDefault();
        links[here].setAttribute("tabindex", "-1");
        links[next].setAttribute("tabindex", "0");
        links[next].focus();
    });
}
function set(threshold) {
    number.value = String(threshold);
    showPlace();
    void load();
}
function showPlace() {
    const index = points.findIndex(point => point[0] <= Number(number.value));
    mover.value = String(index < 0 ? points.length - 1 : index);
}
async function load() {
    const request = ++latest;
    try {
        const response = await fetch(`/evaluation?threshold=${encodeURIComponent(number.value)}`);
        const text = await response.text();
        if (request !== latest)
            return;
        if (!response.ok)
            throw new Error(JSON.parse(text).detail);
        element("result").replaceWith(new DOMParser().parseFromString(text, "text/html").getElementById("result"));
        state.textContent = "";
        connectCurves();
    }
    catch (error) {
        state.textContent = `Not computed: ${error.message}`;
    }
}
connectCurves();
showPlace();
mover.addEventListener("input", () => {
    const point = points[Number(mover.value)];
    if (!point)
        return;
    number.value = String(point[0]);
    clearTimeout(timer);
    timer = window.setTimeout(() => void load(), 80);
});
element("threshold-form").addEventListener("submit", event => { event.preventDefault(); showPlace(); void load(); });
