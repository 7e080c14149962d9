/** The evaluation page: the server computes the metrics again while the threshold is moved. */

type Point = [threshold: number, fpr: number, tpr: number];

const element = <T>(id: string): T => document.getElementById(id) as T;
const number = element<HTMLInputElement>("threshold");
const mover = element<HTMLInputElement>("mover");
const state = element<HTMLElement>("state");
let points: Point[] = [];
let latest = 0;
let timer = 0;

function connectCurve(): void {
  const roc = element<SVGSVGElement | null>("roc");
  points = roc ? JSON.parse(roc.dataset.points!) as Point[] : [];
  roc?.addEventListener("click", event => {
    const box = roc.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = 1 - (event.clientY - box.top) / box.height;
    const distance = (point: Point): number => Math.hypot(point[1] - x, point[2] - y);
    set(points.reduce((nearest, point) => distance(point) < distance(nearest) ? point : nearest)[0]);
  });
}

function set(threshold: number): void {
  number.value = String(threshold);
  showPlace();
  void load();
}

/** Put the slider to the point of the threshold. */
function showPlace(): void {
  const index = points.findIndex(point => point[0] <= Number(number.value));
  mover.value = String(index < 0 ? points.length - 1 : index);
}

async function load(): Promise<void> {
  const request = ++latest;
  try {
    const response = await fetch(`/evaluation?threshold=${encodeURIComponent(number.value)}`);
    const text = await response.text();
    if (request !== latest) return;
    if (!response.ok) throw new Error(JSON.parse(text).detail);
    element<HTMLElement>("result").replaceWith(new DOMParser().parseFromString(text, "text/html").getElementById("result")!);
    state.textContent = "";
    connectCurve();
  } catch (error) {
    state.textContent = `Not computed: ${(error as Error).message}`;
  }
}

connectCurve();
showPlace();
mover.addEventListener("input", () => {
  const point = points[Number(mover.value)];
  if (!point) return;
  number.value = String(point[0]);
  clearTimeout(timer);
  timer = window.setTimeout(() => void load(), 80);
});
element<HTMLFormElement>("threshold-form").addEventListener("submit", event => { event.preventDefault(); showPlace(); void load(); });
