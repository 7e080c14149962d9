/** The exam page: hanging, tools and keys. */

import { BASE, Exam, ExamImage, fetchExam, fetchHeatMap, fetchTile, onConnection, pause } from "./data.js";
import { sendWaiting } from "./drafts.js";
import { Display, LAYOUTS, Place, currentLayout, follow, hang, isPanelHidden, keepLayout, keepPanel, tell } from "./layout.js";
import { nameOf, percent, showPanel } from "./panel.js";
import { ReadingForm } from "./reading.js";
import { Camera, Settings, Viewport } from "./viewport.js";

const element = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const views = element("views");
const state = element("state");
const settings: Settings = {
  low: 0, high: 1, inverted: false, opacity: 0.5, lowest: 0.3, showHeat: true, showRegion: false, magnify: false,
};
const shared: Camera = { scale: 1, away: 0, down: 0 };
let viewports: Viewport[] = [];
let places: Place[] = [];
let rest: ExamImage[] = [];
let chosen: Viewport | null = null;
let linked = true;
let tool: "pan" | "measure" | "box" = "pan";
let exam: Exam;
let form: ReadingForm;

function fit(): void {
  const scales = viewports.filter(viewport => viewport.image.pixels).map(viewport => {
    const [width, height] = viewport.size, [across, tall] = viewport.wanted;
    return Math.min(width / across, height / tall);
  });
  place(viewport => Object.assign(viewport.camera, { scale: Math.min(...scales, 1e3), away: 0, down: 0 }));
}

/** Show one source pixel per screen pixel in the chosen view: at the chest wall or, once it was panned, at its centre. */
function actual(): void {
  const viewport = chosen ?? viewports[0];
  if (!viewport) return;
  const [width, height] = viewport.size;
  const wall = { R: width, L: 0 }[viewport.image.side] ?? width / 2;
  const scale = 1 / (viewport.spacing[0] * (window.devicePixelRatio || 1));
  zoom(viewport, scale / viewport.camera.scale, viewport.camera.away === 0 ? wall : width / 2, height / 2);
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
  share();
}

function redraw(): void { viewports.forEach(viewport => viewport.draw()); }

/** Show other windows of the exam what changed here; they are sent nothing while views are not linked. */
function share(): void {
  if (linked) tell({ low: settings.low, high: settings.high, inverted: settings.inverted, ...shared });
}

/** Show what changed in another window of the exam. */
function takeOver({ low, high, inverted, scale, away, down }: Display): void {
  Object.assign(settings, { low, high, inverted });
  toggle("invert", inverted);
  if (linked) Object.assign(shared, { scale, away, down });
  viewports.forEach(viewport => viewport.updateWindow());
}

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
  share();
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
    if (tool === "measure") viewport.setLine(null);
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
    } else if (tool === "measure" && start) {
      viewport.setLine([...start, ...here]);
    } else if (tool === "box" && start) {
      viewport.setBoxes([...boxesOf(viewport), boxBetween(viewport, start, here)]);
    } else if (event.buttons & 2 || event.shiftKey) {
      const width = (settings.high - settings.low) * Math.exp(dx / 200);
      const centre = (settings.high + settings.low) / 2 - dy / 400;
      setWindow(centre - width / 2, centre + width / 2);
    } else {
      viewport.camera.away += (viewport.image.side === "R" ? -dx : dx) / viewport.camera.scale;
      viewport.camera.down += dy / viewport.camera.scale;
      redraw();
      share();
    }
  });
  canvas.addEventListener("pointerup", event => {
    if (tool === "box" && start) finishBox(viewport, start, [event.offsetX, event.offsetY]);
  });
  for (const kind of ["pointerup", "pointercancel"] as const) {
    canvas.addEventListener(kind, event => { pointers.delete(event.pointerId); start = null; });
  }
  canvas.addEventListener("pointerleave", () => viewport.setPointer(null));
  viewport.figure.addEventListener("focus", () => choose(viewport));
}

type Corners = [number, number, number, number];

/** Return the box between two places of the canvas in source pixels. */
function boxBetween(viewport: Viewport, one: [number, number], other: [number, number]): Corners {
  const [a, b] = [viewport.toSource(...one), viewport.toSource(...other)];
  return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
}

function boxesOf(viewport: Viewport): Corners[] {
  return form.boxes.filter(box => box.image === viewport.image.key).map(box => box.box);
}

/** Keep a box unless it is only a click, lies outside the image, or the image is of another exam. */
function finishBox(viewport: Viewport, start: [number, number], end: [number, number]): void {
  const pixels = viewport.image.pixels;
  const [x0, y0, x1, y1] = boxBetween(viewport, start, end);
  const isBox = Math.abs(end[0] - start[0]) > 4 && Math.abs(end[1] - start[1]) > 4;
  if (pixels && isBox && !viewport.image.exam && x1 > 0 && y1 > 0 && x0 < pixels.columns && y0 < pixels.rows) {
    form.add({ image: viewport.image.key, box: [Math.max(0, x0), Math.max(0, y0), Math.min(pixels.columns, x1), Math.min(pixels.rows, y1)] });
  }
  showBoxes();
}

function showBoxes(): void { viewports.forEach(viewport => viewport.setBoxes(boxesOf(viewport))); }

/** Put a small picture of an image before the text of a button; without its file the text stays alone. */
async function addThumbnail(button: HTMLElement, image: ExamImage): Promise<void> {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("aria-hidden", "true");
  try {
    const [values, width] = await fetchTile(image.key, image.pixels!.levels, 0, 0);
    canvas.width = width;
    canvas.height = values.length / width;
    const context = canvas.getContext("2d")!;
    const picture = context.createImageData(canvas.width, canvas.height);
    values.forEach((value, index) => picture.data.set([value >> 8, value >> 8, value >> 8, 255], 4 * index));
    context.putImageData(picture, 0, 0);
    button.prepend(canvas);
  } catch { /* the reason is shown where the image is */ }
}

/** Return a placeholder for a view that the exam does not have. */
function emptyPlace(name: string): HTMLElement {
  const figure = Object.assign(document.createElement("figure"), { className: `empty ${name.startsWith("R") ? "right" : "left"}` });
  figure.append(Object.assign(document.createElement("figcaption"), { textContent: `${name}  none` }));
  return figure;
}

function show(wanted: Place[], others: ExamImage[]): void {
  const layout = LAYOUTS[currentLayout()]!;
  places = wanted;
  views.dataset.columns = String(layout.columns(places.length));
  viewports = [];
  views.replaceChildren(...places.map(place => {
    if (typeof place === "string") return emptyPlace(place);
    const viewport = new Viewport(place, linked ? shared : { ...shared }, settings, exam.tile);
    viewport.isPlain = layout.isPair && !viewports.length;
    viewports.push(viewport);
    listen(viewport);
    return viewport.figure;
  }));
  rest = others;
  const strip = element("strip");
  strip.replaceChildren(...rest.map(image => {
    const button = document.createElement("button");
    button.textContent = `${image.side || "?"}-${image.view || "?"} ${image.status === "ok" ? "" : image.status}`.trim();
    if (image.pixels) void addThumbnail(button, image);
    button.title = image.image_id;
    button.addEventListener("click", () => swap(image));
    return button;
  }));
  showBoxes();
  requestAnimationFrame(fit);
}

/** Show the exam in the layout of this window, with the latest other exam of the patient if the layout has one. */
async function arrange(name: string): Promise<void> {
  const layout = LAYOUTS[name]!;
  keepLayout(name);
  element<HTMLSelectElement>("layout").value = name;
  if (layout.isPair) return showPair();
  const [shown, others] = hang(exam.images, layout);
  const before = layout.withOther ? exam.others[0] : undefined;
  if (layout.withOther && !before) state.textContent = "There is no other exam of this patient.";
  else if (state.textContent.startsWith("There is no other")) state.textContent = "";
  const second = before ? hang((await fetchExam(before.key)).images.map(image => ({ ...image, exam: nameOf(before) })), layout)[0] : [];
  show([...shown, ...second], others);
  void loadHeat();
}

/** Show the chosen image without and with its heat map. */
function showPair(): void {
  const image = chosen?.image.exam ? undefined : exam.images.find(candidate => candidate.key === chosen?.image.key);
  const one = image ?? hang(exam.images, LAYOUTS.four!)[0].find(place => typeof place !== "string");
  if (!one) return;
  const method = element<HTMLSelectElement>("method");
  method.value ||= Object.keys(exam.methods)[0] ?? "";
  show([one, one], exam.images.filter(other => other !== one));
  void loadHeat();
}

function showPanelOrNot(hidden: boolean): void {
  keepPanel(hidden);
  document.body.classList.toggle("without-panel", hidden);
  toggle("panel", !hidden);
}

function setTool(wanted: "measure" | "box"): void {
  tool = tool === wanted ? "pan" : wanted;
  toggle("measure", tool === "measure");
  toggle("box", tool === "box");
  viewports.forEach(viewport => viewport.setLine(null));
}

/** Show an image of the strip in place of the chosen view. */
function swap(image: ExamImage): void {
  if (LAYOUTS[currentLayout()]!.isPair) {
    show([image, image], exam.images.filter(other => other !== image));
    void loadHeat();
    return;
  }
  const old = (chosen ?? viewports[0])?.image;
  const shown = places.map(place => place === old ? image : place);
  show(shown, rest.map(other => other === image && old ? old : other));
  void loadHeat();
}

async function loadHeat(): Promise<void> {
  const method = element<HTMLSelectElement>("method").value;
  element("meaning").textContent = method ? exam.methods[method] ?? "" : "";
  element<HTMLInputElement>("lowest").disabled = method === "segments"; // they have no scale of which to hide a part
  await Promise.all(viewports.map(async viewport => {
    if (!method || viewport.isPlain || viewport.image.status === "refused") return viewport.setHeat(null);
    try {
      const heat = await fetchHeatMap(viewport.image.key, method, count => {
        state.textContent = `Computing heat maps: ${count} to go …`;
      });
      if (element<HTMLSelectElement>("method").value !== method) return;
      viewport.setHeat(heat);
      const shown = viewport.image.probability;
      if (shown !== null && Math.abs(heat.probability - shown) > 5e-4) {
        const name = `${viewport.image.side}-${viewport.image.view}`;
        element("meaning").textContent += ` ${name}: this package now gives ${percent(heat.probability)}, not ${percent(shown)}, so this does not explain the score that is shown.`;
      }
    } catch (error) {
      viewport.setHeat(null);
      state.textContent = `${viewport.image.side}-${viewport.image.view} has no heat map: ${(error as Error).message}`;
    }
  }));
  if (state.textContent.startsWith("Computing")) state.textContent = "";
}

function link(id: string, key: string | null): void {
  const anchor = element<HTMLAnchorElement>(id);
  anchor.hidden = key === null;
  if (key !== null) anchor.href = `${BASE}/exams/${key}`;
}

const commands: Record<string, () => void> = {
  i: () => { settings.inverted = !settings.inverted; toggle("invert", settings.inverted); viewports.forEach(viewport => viewport.updateWindow()); share(); },
  l: () => setLinked(!linked),
  m: () => { settings.magnify = !settings.magnify; toggle("magnify", settings.magnify); redraw(); },
  d: () => setTool("measure"),
  x: () => setTool("box"),
  b: () => { showPanelOrNot(false); form.focus(); },
  s: () => void form.save(),
  t: () => showPanelOrNot(!isPanelHidden()),
  "0": fit,
  "1": actual,
  f: () => { if (document.fullscreenElement) void document.exitFullscreen(); else void document.documentElement.requestFullscreen(); },
  h: () => { settings.showHeat = !settings.showHeat; toggle("flicker", !settings.showHeat); redraw(); },
  r: () => { settings.showRegion = !settings.showRegion; toggle("region", settings.showRegion); redraw(); },
  n: () => { if (exam.after) location.assign(`${BASE}/exams/${exam.after}`); },
  p: () => { if (exam.before) location.assign(`${BASE}/exams/${exam.before}`); },
  w: () => location.assign(`${BASE}/worklist`),
};
for (const [name, layout] of Object.entries(LAYOUTS)) commands[layout.key] = () => void arrange(name);

function connect(): void {
  const buttons = { invert: "i", link: "l", magnify: "m", measure: "d", box: "x", panel: "t", fit: "0", actual: "1", full: "f", flicker: "h", region: "r" };
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
  const layouts = element<HTMLSelectElement>("layout");
  for (const [value, { title }] of Object.entries(LAYOUTS)) layouts.append(Object.assign(document.createElement("option"), { value, textContent: title }));
  layouts.addEventListener("change", () => void arrange(layouts.value));
  onConnection(lost => {
    if (lost) state.textContent = "The connection to the server is lost. Trying again …";
    else if (state.textContent.startsWith("The connection")) state.textContent = "";
  });
}

/** Show an exam that was opened, or of which a reading was stored. */
async function open(opened: Exam): Promise<void> {
  exam = opened;
  const methods = element<HTMLSelectElement>("method");
  methods.replaceChildren(...["", ...Object.keys(exam.methods)].map(value => Object.assign(document.createElement("option"), { value, textContent: value || "none" })));
  element("heat-tools").hidden = !Object.keys(exam.methods).length;
  element("region").hidden = !Object.keys(exam.methods).length && !exam.images.some(image => image.region.length);
  element("date").textContent = exam.date;
  element("note").textContent = exam.note;
  showPanel(exam);
  await arrange(currentLayout());
}

/** Load the page again once the exam is scored, unless the reader has begun to write. */
async function waitForScores(): Promise<void> {
  while ((await fetchExam(exam.key)).status === "waiting") await pause(5000);
  if (form.isEmpty) location.reload();
  else state.textContent = "The exam has been scored. Store your reading and load the page again to see the scores.";
}

async function main(): Promise<void> {
  exam = await fetchExam(views.dataset.exam!);
  link("before", exam.before);
  link("after", exam.after);
  form = new ReadingForm(exam, element("reading"), stored => void open(stored), () => showBoxes());
  connect();
  showPanelOrNot(isPanelHidden());
  state.textContent = "";
  await open(exam);
  follow(exam.key, takeOver);
  if (exam.status === "waiting") void waitForScores();
  await sendWaiting(exam.reader, exam.key);
}

main().catch((error: unknown) => { state.className = "error"; state.textContent = `The exam cannot be shown: ${(error as Error).message}`; });
