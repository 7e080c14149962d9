/** The panel of scores: breasts, images, other exams of the patient and the model. */

import { BASE, Breast, Exam, OtherExam } from "./data.js";

const element = (id: string): HTMLElement => document.getElementById(id)!;
const NAMES: Record<string, string> = { R: "Right breast", L: "Left breast" };

export const percent = (value: number | null): string => value === null ? "no score" : `${(100 * value).toFixed(1)} %`;

function heading(text: string): HTMLHeadingElement { return Object.assign(document.createElement("h2"), { textContent: text }); }

function list(entries: [string, string | Node][]): HTMLDListElement {
  const result = document.createElement("dl");
  for (const [name, value] of entries) {
    const description = document.createElement("dd");
    description.append(value);
    result.append(Object.assign(document.createElement("dt"), { textContent: name }), description);
  }
  return result;
}

/** Return a bar with the calibration interval as a band and the threshold as a mark. */
function bar(value: number, interval: [number, number] | null, threshold: number | null): SVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = (name: string, values: Record<string, string | number>): void => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, text] of Object.entries(values)) part.setAttribute(key, String(text));
    svg.append(part);
  };
  for (const [key, text] of Object.entries({ width: 200, height: 12, "aria-hidden": "true" })) svg.setAttribute(key, String(text));
  shape("rect", { class: "track", width: 200, height: 12 });
  shape("rect", { class: "fill", width: 200 * value, height: 12 });
  if (interval) shape("rect", { class: "band", x: 200 * interval[0], width: Math.max(1, 200 * (interval[1] - interval[0])), y: 4, height: 4 });
  if (threshold !== null) shape("line", { class: "threshold", x1: 200 * threshold, x2: 200 * threshold, y1: 0, y2: 12 });
  return svg;
}

/** Return a percentage that no line break divides. */
const joined = (value: number): string => percent(value).replace(" ", "\u00a0");

/** Return how far the probability can be relied on: its calibration interval, and the prevalence that it relates to. */
function calibrationNote(breast: Breast, exam: Exam): string {
  const interval = breast.interval
    ? `Calibration interval ${joined(breast.interval[0])} to ${joined(breast.interval[1])}.`
    : "No calibration interval: the package or the version that scored stores none.";
  const prevalence = exam.model.prevalence === null
    ? "Prevalence of the calibration unknown: the package is not at hand."
    : `Calibrated where ${joined(exam.model.prevalence)} are positive.`;
  return `${interval} ${prevalence}`;
}

function describe(breast: Breast, exam: Exam): HTMLElement {
  const section = document.createElement("section");
  section.append(heading(NAMES[breast.side] ?? "Breast of unknown side"));
  const text = exam.hidden ? "hidden until you have stored a reading" : breast.status === "waiting" ? "not scored yet" : percent(breast.probability);
  const score = Object.assign(document.createElement("p"), { className: "score", textContent: text });
  if (breast.is_positive) score.classList.add("positive");
  section.append(score);
  const threshold = exam.model.threshold;
  if (breast.probability !== null) {
    section.append(bar(breast.probability, breast.interval, threshold));
    section.append(Object.assign(document.createElement("p"), { className: "soft calibration", textContent: calibrationNote(breast, exam) }));
  }
  const entries: [string, string][] = [];
  if (exam.other_title && !exam.hidden) entries.push([exam.other_title, percent(breast.other)]);
  if (breast.is_positive !== null) entries.push(["decision", breast.is_positive ? "at or above the threshold" : "below the threshold"]);
  const truth = exam.truth[breast.side];
  if (truth !== undefined) entries.push(["label", truth === 1 ? "positive" : "negative"]);
  entries.push(["views", breast.views.replaceAll(";", ", ") || "none"]);
  if (breast.status !== "ok" && breast.status !== "waiting") entries.push([breast.status, breast.meaning]);
  for (const [key, value] of Object.entries(breast.outputs)) entries.push([key.replaceAll("_", " "), shorten(value)]);
  section.append(list(entries));
  return section;
}

/** Return a number with four digits; other text as it is. */
function shorten(text: string): string { return /^\d*\.\d{5,}/.test(text) ? Number(text).toPrecision(4) : text; }

function showImages(exam: Exam): void {
  const panel = element("images");
  panel.replaceChildren(heading("Images"));
  for (const image of exam.images) {
    const parts = exam.hidden && image.status !== "refused" ? [] : [percent(image.probability)];
    if (image.typicality !== null) parts.push(`typicality ${percent(image.typicality)}`);
    for (const [key, value] of Object.entries(image.outputs)) parts.push(`${key.replaceAll("_", " ")} ${shorten(value)}`);
    if (image.status !== "ok") parts.push(`${image.status}: ${image.meaning || image.reason}${image.remark ? ` (${image.remark})` : ""}`);
    if (image.machine) parts.push(`machine ${image.machine}`);
    panel.append(list([[`${image.side || "?"}-${image.view || "?"}`, parts.join("; ")]]));
  }
}

export const nameOf = (exam: OtherExam): string => exam.date || exam.exam_id || "exam without a date";

function showOthers(exam: Exam): void {
  const panel = element("others");
  panel.replaceChildren();
  if (!exam.others.length) return;
  panel.append(heading("Other exams of this patient"));
  panel.append(list(exam.others.map(other => {
    const anchor = Object.assign(document.createElement("a"), { href: `${BASE}/exams/${other.key}`, textContent: nameOf(other) });
    const scores = other.breasts.map(breast => `${breast.side || "?"} ${breast.probability === null ? "–" : percent(breast.probability)}`);
    const description = document.createElement("span");
    description.append(anchor, ` ${scores.join(", ")}`);
    return [other.exam_id === nameOf(other) ? "exam" : other.exam_id || "exam", description];
  })));
}

function showModel(exam: Exam): void {
  const panel = element("model");
  panel.replaceChildren();
  const model = exam.model;
  if (!model.name) return;
  const entries: [string, string | Node][] = [["name", model.name], ["version", model.version], ["label", model.label]];
  if (model.threshold !== null && !model.notes.Threshold) entries.push(["threshold", percent(model.threshold)]);
  for (const [name, note] of Object.entries(model.notes)) entries.push([name.toLowerCase(), note]);
  if (model.prevalence !== null) {
    entries.push(["prevalence", `probabilities hold where ${percent(model.prevalence)} are positive; where fewer are, as in screening, they are too high`]);
  }
  if (model.card) entries.push(["card", Object.assign(document.createElement("a"), { href: `${BASE}/model-card`, textContent: "model card" })]);
  panel.append(heading("Model"), list(entries));
}

/** Show all that is known of an exam, as far as the reader may see it. */
export function showPanel(exam: Exam): void {
  const order = (breast: Breast): number => breast.side === "R" ? 0 : 1;
  element("breasts").replaceChildren(...exam.breasts.sort((one, other) => order(one) - order(other)).map(breast => describe(breast, exam)));
  showImages(exam);
  showOthers(exam);
  showModel(exam);
}
