/** The exam page: hanging, tools, keys and the panel of scores. */

import { Breast, Exam, ExamImage, HeatMap, fetchExam, fetchHeatMap, onConnection } from "./data.js";
import { Camera, Settings, Viewport } from "./viewport.js";

const element = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const views = element("views");
const state = element("state");
const settings: Settings = {
  low: 0, high: 1, inverted: false, opacity: 0.5, lowest: 0.3, showHeat: true, showRegion: false, magnify: false,
};
const shared: Camera = { scale: 1, away: 0, down: 0 };
let viewports: Viewport[] = [];
let rest: ExamImage[] = [];
let chosen: Viewport | null = null;
let linked = true;
let measuring = false;
let exam: Exam;

/** Return the four standard views in the order of hanging, and all other images. */
function hang(images: ExamImage[]): [ExamImage[], ExamImage[]] {
  const shown: ExamImage[] = [];
  for (const [side, view] of [["R", "CC"], ["L", "CC"], ["R", "MLO"], ["L", "MLO"]]) {
    const found = images.find(image => image.side === side && image.view === view && image.pixels);
    if (found) shown.push(found);
  }
  for (const image of images) if (shown.length < Math.min(4, images.length) && !shown.includes(image)) shown.push(image);
  return [shown, images.filter(image => !shown.includes(image))];
}

function fit(): void {
  const scales = viewports.filter(viewport => viewport.image.pixels).map(viewport => {
    const [width, height] = viewport.size, [across, tall] = viewport.extent;
    return Math.min(width / across, height / tall);
  });
  place(viewport => Object.assign(viewport.camera, { scale: Math.min(...scales, 1e3), away: 0, down: 0 }));
}

/** Show one source pixel per screen pixel in the chosen view, at its centre. */
function actual(): void {
  const viewport = chosen ?? viewports[0];
  if (viewport) zoom(viewport, 1 / (viewport.spacing[0] * (window.devicePixelRatio || 1)) / viewport.camera.scale, viewport.size[0] / 2, viewport.size[1] / 2);
}

/** Change cameras and draw. Linked viewports have one camera, so a change of one is a change of all. */
function place(change: (viewport: Viewport) => void): void {
  const cameras = new Set<Camera>();
  for (const viewport of viewports) {
    if (!cameras.has(viewport.camera)) change(viewport);
    cameras.add(viewport.camera);
  }
  viewports.forEach(viewport => viewport.draw());
}

/** Zoom by a factor such that the point (x, y) of a viewport stays where it is. */
function zoom(viewport: Viewport, factor: number, x: number, y: number): void {
  const camera = viewport.camera;
  const [left, top] = viewport.origin;
  const before = [(x - left) / camera.scale, (y - top) / camera.scale] as const;
  camera.scale = Math.min(200, Math.max(0.2, camera.scale * factor));
  const [newLeft, newTop] = viewport.origin;
  const shift = (x - newLeft) / camera.scale - before[0];
  camera.away += viewport.image.side === "R" ? -shift : shift;
  camera.down += (y - newTop) / camera.scale - before[1];
  redraw();
}

function redraw(): void { viewports.forEach(viewport => viewport.draw()); }

function toggle(id: string, pressed: boolean): void { element(id).setAttribute("aria-pressed", String(pressed)); }

function choose(viewport: Viewport): void {
  chosen = viewport;
  viewports.forEach(other => other.figure.classList.toggle("chosen", other === viewport));
}

function setLinked(value: boolean): void {
  linked = value;
  toggle("link", linked);
  viewports.forEach(viewport => { viewport.camera = linked ? shared : { ...viewport.camera }; });
  redraw();
}

function setWindow(low: number, high: number): void {
  settings.low = low;
  settings.high = Math.max(low + 0.002, high);
  viewports.forEach(viewport => viewport.updateWindow());
}

/** Pan, window, measure and pinch with mouse, pen or fingers. */
function listen(viewport: Viewport): void {
  const canvas = viewport.canvas;
  const pointers = new Map<number, [number, number]>();
  let start: [number, number] | null = null;
  canvas.addEventListener("contextmenu", event => event.preventDefault());
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    zoom(viewport, Math.exp(-event.deltaY / 500), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("pointerdown", event => {
    choose(viewport);
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    start = [event.offsetX, event.offsetY];
    if (measuring) viewport.setLine(null);
  });
  canvas.addEventListener("pointermove", event => {
    const here: [number, number] = [event.offsetX, event.offsetY];
    viewport.setPointer(here);
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const other = [...pointers.entries()].find(([id]) => id !== event.pointerId)?.[1];
    pointers.set(event.pointerId, here);
    const [dx, dy] = [here[0] - last[0], here[1] - last[1]];
    if (other) {
      const distance = (point: [number, number]): number => Math.hypot(point[0] - other[0], point[1] - other[1]);
      zoom(viewport, distance(here) / Math.max(1, distance(last)), (here[0] + other[0]) / 2, (here[1] + other[1]) / 2);
    } else if (measuring && start) {
      viewport.setLine([...start, ...here]);
    } else if (event.buttons & 2 || event.shiftKey) {
      const width = (settings.high - settings.low) * Math.exp(dx / 200);
      const centre = (settings.high + settings.low) / 2 - dy / 400;
      setWindow(centre - width / 2, centre + width / 2);
    } else {
      viewport.camera.away += (viewport.image.side === "R" ? -dx : dx) / viewport.camera.scale;
      viewport.camera.down += dy / viewport.camera.scale;
      redraw();
    }
  });
  for (const kind of ["pointerup", "pointercancel"] as const) {
    canvas.addEventListener(kind, event => { pointers.delete(event.pointerId); start = null; });
  }
  canvas.addEventListener("pointerleave", () => viewport.setPointer(null));
  viewport.figure.addEventListener("focus", () => choose(viewport));
}

function show(images: ExamImage[], others: ExamImage[]): void {
  views.replaceChildren();
  views.classList.toggle("single", images.length === 1);
  viewports = images.map(image => new Viewport(image, linked ? shared : { ...shared }, settings, exam.tile));
  for (const viewport of viewports) {
    views.append(viewport.figure);
    listen(viewport);
  }
  rest = others;
  const strip = element("strip");
  strip.replaceChildren(...rest.map(image => {
    const button = document.createElement("button");
    button.textContent = `${image.side || "?"}-${image.view || "?"} ${image.status === "ok" ? "" : image.status}`.trim();
    button.title = image.image_id;
    button.addEventListener("click", () => swap(image));
    return button;
  }));
  requestAnimationFrame(fit);
}

/** Show an image of the strip in place of the chosen view. */
function swap(image: ExamImage): void {
  const old = (chosen ?? viewports[0])?.image;
  const shown = viewports.map(viewport => viewport.image === old ? image : viewport.image);
  show(shown, rest.map(other => other === image && old ? old : other));
  void loadHeat();
}

async function loadHeat(): Promise<void> {
  const method = element<HTMLSelectElement>("method").value;
  element("meaning").textContent = method ? exam.methods[method] ?? "" : "";
  await Promise.all(viewports.map(async viewport => {
    if (!method || viewport.image.status === "refused") return viewport.setHeat(null);
    try {
      const heat: HeatMap = await fetchHeatMap(viewport.image.key, method, count => {
        state.textContent = `Computing heat maps: ${count} to go …`;
      });
      if (element<HTMLSelectElement>("method").value === method) viewport.setHeat(heat);
    } catch (error) {
      state.textContent = `${viewport.image.side}-${viewport.image.view} has no heat map: ${(error as Error).message}`;
    }
  }));
  if (state.textContent.startsWith("Computing")) state.textContent = "";
}

function list(entries: [string, string][]): HTMLDListElement {
  const result = document.createElement("dl");
  for (const [name, value] of entries) {
    result.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
  }
  return result;
}

const percent = (value: number | null): string => value === null ? "no score" : `${(100 * value).toFixed(1)} %`;

function describe(breast: Breast): HTMLElement {
  const section = document.createElement("section");
  const name = { R: "Right breast", L: "Left breast" }[breast.side] ?? "Breast of unknown side";
  section.append(Object.assign(document.createElement("h2"), { textContent: name }));
  const score = Object.assign(document.createElement("p"), { className: "score", textContent: percent(breast.probability) });
  if (breast.is_positive) score.classList.add("positive");
  section.append(score);
  const threshold = exam.model.threshold;
  const entries: [string, string][] = [];
  if (breast.is_positive !== null) entries.push(["decision", breast.is_positive ? "at or above the threshold" : "below the threshold"]);
  if (threshold !== null) entries.push(["threshold", percent(threshold)]);
  entries.push(["views", breast.views.replaceAll(";", ", ") || "none"]);
  if (breast.status !== "ok") entries.push([breast.status, breast.reason.replaceAll("_", " ").replaceAll(";", ", ")]);
  for (const [key, value] of Object.entries(breast.outputs)) entries.push([key.replaceAll("_", " "), value]);
  section.append(list(entries));
  return section;
}

function describeImages(): void {
  const panel = element("images");
  panel.replaceChildren(Object.assign(document.createElement("h2"), { textContent: "Images" }));
  for (const image of exam.images) {
    const note = image.status === "ok" ? "" : ` ${image.status}: ${image.meaning || image.reason}${image.remark ? ` (${image.remark})` : ""}`;
    panel.append(list([[`${image.side || "?"}-${image.view || "?"}`, percent(image.probability) + note]]));
  }
}

function link(id: string, key: string | null): void {
  const anchor = element<HTMLAnchorElement>(id);
  anchor.hidden = key === null;
  if (key !== null) anchor.href = `/exams/${key}`;
}

const commands: Record<string, () => void> = {
  i: () => { settings.inverted = !settings.inverted; toggle("invert", settings.inverted); viewports.forEach(viewport => viewport.updateWindow()); },
  l: () => setLinked(!linked),
  m: () => { settings.magnify = !settings.magnify; toggle("magnify", settings.magnify); redraw(); },
  d: () => { measuring = !measuring; toggle("measure", measuring); viewports.forEach(viewport => viewport.setLine(null)); },
  "0": fit,
  "1": actual,
  f: () => { if (document.fullscreenElement) void document.exitFullscreen(); else void document.documentElement.requestFullscreen(); },
  h: () => { settings.showHeat = !settings.showHeat; toggle("flicker", !settings.showHeat); redraw(); },
  r: () => { settings.showRegion = !settings.showRegion; toggle("region", settings.showRegion); redraw(); },
  n: () => { if (exam.after) location.assign(`/exams/${exam.after}`); },
  p: () => { if (exam.before) location.assign(`/exams/${exam.before}`); },
  w: () => location.assign("/"),
};

function connect(): void {
  const buttons = { invert: "i", link: "l", magnify: "m", measure: "d", fit: "0", actual: "1", full: "f", flicker: "h", region: "r" };
  for (const [id, key] of Object.entries(buttons)) element(id).addEventListener("click", () => commands[key]!());
  document.addEventListener("keydown", event => {
    if (["INPUT", "SELECT", "TEXTAREA"].includes((event.target as HTMLElement).tagName)) return;
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in commands)) return;
    event.preventDefault();
    commands[event.key]!();
  });
  element<HTMLSelectElement>("preset").addEventListener("change", event => {
    const [low, high] = (event.target as HTMLSelectElement).value.split(",").map(Number);
    setWindow(low!, high!);
  });
  element<HTMLInputElement>("opacity").addEventListener("input", event => { settings.opacity = Number((event.target as HTMLInputElement).value); redraw(); });
  element<HTMLInputElement>("lowest").addEventListener("input", event => { settings.lowest = Number((event.target as HTMLInputElement).value); viewports.forEach(viewport => viewport.recolour()); });
  element<HTMLSelectElement>("method").addEventListener("change", () => void loadHeat());
  onConnection(lost => {
    if (lost) state.textContent = "The connection to the server is lost. Trying again …";
    else if (state.textContent.startsWith("The connection")) state.textContent = "";
  });
}

async function main(): Promise<void> {
  exam = await fetchExam(views.dataset.exam!);
  link("before", exam.before);
  link("after", exam.after);
  const methods = element<HTMLSelectElement>("method");
  for (const name of Object.keys(exam.methods)) methods.append(Object.assign(document.createElement("option"), { value: name, textContent: name }));
  element("heat-tools").hidden = !Object.keys(exam.methods).length;
  element("region").hidden = !Object.keys(exam.methods).length && !exam.images.some(image => image.region.length);
  const right = (breast: Breast): number => breast.side === "R" ? 0 : 1;
  element("breasts").replaceChildren(...exam.breasts.sort((one, other) => right(one) - right(other)).map(describe));
  describeImages();
  connect();
  state.textContent = "";
  show(...hang(exam.images));
}

main().catch((error: unknown) => { state.className = "error"; state.textContent = `The exam cannot be shown: ${(error as Error).message}`; });
