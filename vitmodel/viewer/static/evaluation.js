"use strict";
const element = (id) => document.getElementById(id);
const number = element("threshold");
const mover = element("mover");
const state = element("state");
let points = [];
let latest = 0;
let timer = 0;
function connectCurve() {
    const roc = element("roc");
    points = roc ? JSON.parse(roc.dataset.points) : [];
    roc?.addEventListener("click", event => {
        const box = roc.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width, y = 1 - (event.clientY - box.top) / box.height;
        const distance = (point) => Math.hypot(point[1] - x, point[2] - y);
        set(points.reduce((nearest, point) => distance(point) < distance(nearest) ? point : nearest)[0]);
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
        connectCurve();
    }
    catch (error) {
        state.textContent = `Not computed: ${error.message}`;
    }
}
connectCurve();
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
