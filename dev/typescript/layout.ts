/** Which views a window shows, and how: one screen for all, or one window per screen. */

import { BASE, ExamImage } from "./data.js";

export interface Layout {
  /** What the page calls it. */
  title: string;
  key: string;
  columns: (count: number) => number;
  shows: (image: ExamImage) => boolean;
  /** Whether it shows a part of the exam only; such a window follows the exam of another one. */
  isPart: boolean;
  /** Whether a second row shows another exam of the patient. */
  withOther: boolean;
  /** Whether one image is shown twice, without and with its heat map. */
  isPair: boolean;
}

const all = (): boolean => true;
const whole = { shows: all, isPart: false, withOther: false, isPair: false };
export const LAYOUTS: Record<string, Layout> = {
  four: { ...whole, title: "two by two", key: "2", columns: count => Math.min(2, count) },
  pair: { ...whole, title: "heat map side by side", key: "3", columns: () => 2, isPair: true },
  row: { ...whole, title: "one row", key: "4", columns: count => count },
  cc: { ...whole, title: "CC only", key: "5", columns: count => count, shows: image => image.view === "CC", isPart: true },
  mlo: { ...whole, title: "MLO only", key: "6", columns: count => count, shows: image => image.view === "MLO", isPart: true },
  right: { ...whole, title: "right only", key: "7", columns: () => 1, shows: image => image.side === "R", isPart: true },
  left: { ...whole, title: "left only", key: "8", columns: () => 1, shows: image => image.side === "L", isPart: true },
  other: { ...whole, title: "with another exam", key: "9", columns: () => 4, withOther: true },
};
const STANDARD: [string, string][] = [["R", "CC"], ["L", "CC"], ["R", "MLO"], ["L", "MLO"]];
const channel = new BroadcastChannel("vitmodel-view");

/** Return the layout of this window, which it keeps from exam to exam. */
export function currentLayout(): string {
  const name = sessionStorage.getItem("layout") ?? "four";
  return name in LAYOUTS ? name : "four";
}
export function keepLayout(name: string): void { sessionStorage.setItem("layout", name); }
export function isPanelHidden(): boolean { return sessionStorage.getItem("panel") === "hidden"; }
export function keepPanel(hidden: boolean): void { sessionStorage.setItem("panel", hidden ? "hidden" : "shown"); }

/** A place of the hanging: an image, or the name of the view that is missing there. */
export type Place = ExamImage | string;
const isImage = (place: Place): place is ExamImage => typeof place !== "string";

/**
 * Return the places that a layout shows, and all other images. A layout that fits none shows four.
 *
 * Right images hang at the left and left ones at the right, so that chest walls meet. Where a view is missing, another
 * image of its side takes its place, or the place stays empty. Pairs and sides without any image are left out.
 */
export function hang(images: ExamImage[], layout: Layout): [Place[], ExamImage[]] {
  const fitting = images.filter(layout.shows);
  const chosen = fitting.length ? fitting : images;
  const places: Place[] = STANDARD.map(([side, view]) =>
    chosen.find(image => image.side === side && image.view === view && image.pixels) ?? `${side}-${view}`);
  const unused = (side: string): ExamImage | undefined => chosen.find(image => image.side === side && !places.includes(image));
  STANDARD.forEach(([side], index) => { if (!isImage(places[index]!)) places[index] = unused(side) ?? places[index]!; });
  const pairs = [places.slice(0, 2), places.slice(2)].filter(pair => layout.withOther || pair.some(isImage));
  const sides = new Set(pairs.flat().filter(isImage).map(image => image.side));
  const shown = sides.size === 2 || layout.withOther ? pairs.flat() : pairs.flat().filter(isImage);
  for (const image of chosen) if (shown.length < Math.min(4, chosen.length) && !shown.includes(image) && !image.side) shown.push(image);
  return [shown, images.filter(image => !shown.includes(image))];
}

/** Grey window and camera of an exam, which the windows that show parts of it share. */
export interface Display { low: number; high: number; inverted: boolean; scale: number; away: number; down: number }
type Message = { exam: string; display?: Display };
let shown = "";

const isPart = (): boolean => LAYOUTS[currentLayout()]!.isPart;

/**
 * Follow other windows, if this window shows only a part of the exam: open the exam that they open, and take over how
 * they show this one.
 */
export function follow(exam: string, onDisplay: (display: Display) => void): void {
  shown = exam;
  channel.addEventListener("message", (event: MessageEvent<Message>) => {
    const { exam: other, display } = event.data;
    if (!isPart()) return;
    if (other !== shown) { if (!display) location.assign(`${BASE}/exams/${other}`); }
    else if (display) onDisplay(display);
  });
  channel.postMessage({ exam } satisfies Message);
}

/** Tell windows with other parts of the exam how this one shows its part. */
export function tell(display: Display): void {
  if (shown && isPart()) channel.postMessage({ exam: shown, display } satisfies Message);
}
