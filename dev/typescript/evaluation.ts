/** The evaluation page: the server computes the metrics again while the threshold is moved. */

/** A threshold and where it lies on a curve. */
type Point = [threshold: number, x: number, y: number];

const element = <T>(id: string): T => document.getElementById(id) as T;
const number = element<HTMLInputElement>("threshold");
const mover = element<HTMLInputElement>("mover");
const state = element<HTMLElement>("state");
let points: Point[] = [];
let latest = 0;
let timer = 0;

const pointsOf = (curve: SVGSVGElement): Point[] => JSON.parse(curve.dataset.points!) as Point[];

function connectCurves(): void {
  const roc = element<SVGSVGElement | null>("roc");
  points = roc ? pointsOf(roc) : [];
  for (const curve of document.querySelectorAll<SVGSVGElement>("svg.chooser")) {
    const choices = pointsOf(curve);
    curve.addEventListener("click", event => {
      const box = curve.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width, y = 1 - (event.clientY - box.top) / box.height;
      const distance = (point: Point): number => Math.hypot(point[1] - x, point[2] - y);
      set(choices.reduce((nearest, point) => distance(point) < distance(nearest) ? point : nearest)[0]);
    });
  }
  connectBreasts();
}

/** Let the arrow keys move between the breasts, of which only one is reached by the tab key. */
function connectBreasts(): void {
  const strip = element<SVGSVGElement>("breasts");
  const links = [...strip.querySelectorAll<SVGAElement>("a")];
  strip.addEventListener("keydown", event => {
    const here = links.indexOf(document.activeElement as unknown as SVGAElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step ? here + step : { Home: 0, End: links.length - 1 }[event.key];
    if (here < 0 || next === undefined || !links[next]) return;
    event.preventDefault();
    links[here]!.setAttribute("tabindex", "-1");
    links[next].setAttribute("tabindex", "0");
    links[next].focus();
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
    connectCurves();
  } catch (error) {
    state.textContent = `Not computed: ${(error as Error).message}`;
  }
}

connectCurves();
showPlace();
mover.addEventListener("input", () => {
  const point = points[Number(mover.value)];
  if (!point) return;
  number.value = String(point[0]);
  clearTimeout(timer);
  timer = window.setTimeout(() => void load(), 80);
});
element<HTMLFormElement>("threshold-form").addEventListener("submit", event => { event.preventDefault(); showPlace(); void load(); });
