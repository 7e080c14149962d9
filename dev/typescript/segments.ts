/** The segments that a network of large images read: borders and labels over the image. */

import { Segment, Segments } from "./data.js";

const percent = (value: number): string => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
/** Smallest width of a segment on the screen, in CSS pixels, that has room for its attention, and for its score as well. */
const ROOM = 34, ROOM_FOR_SCORE = 78;
interface Area { left: number; top: number; width: number; height: number }

/**
 * Draw the borders of segments, the stronger the more attention they have, and their attention and score.
 *
 * @param toScreen Function from source pixels to CSS pixels of the canvas.
 */
export function drawSegments(
  context: CanvasRenderingContext2D, read: Segments, toScreen: (x: number, y: number) => [number, number], opacity: number,
): void {
  const most = Math.max(...read.segments.map(segment => segment.attention), 1e-9);
  context.save();
  context.globalAlpha = Math.min(1, 2 * opacity);
  context.lineJoin = "round";
  for (const segment of [...read.segments].reverse()) drawBorder(context, segment, toScreen, segment.attention / most);
  const taken: Area[] = [];
  label(context, [`overview ${percent(read.overview_attention)}`], 8, context.canvas.clientHeight - 14, "left", taken);
  for (const segment of read.segments) drawLabel(context, segment, toScreen, taken); // the most attention comes first
  context.restore();
}

function drawBorder(context: CanvasRenderingContext2D, segment: Segment, toScreen: (x: number, y: number) => [number, number], share: number): void {
  context.beginPath();
  for (const [x, y] of segment.corners) context.lineTo(...toScreen(x + 0.5, y + 0.5));
  context.closePath();
  context.strokeStyle = `rgba(255, 184, 107, ${0.35 + 0.65 * share})`;
  context.lineWidth = 1 + 2 * share;
  context.stroke();
}

function drawLabel(
  context: CanvasRenderingContext2D, segment: Segment, toScreen: (x: number, y: number) => [number, number], taken: Area[],
): void {
  const corners = segment.corners.map(([x, y]) => toScreen(x + 0.5, y + 0.5));
  const xs = corners.map(corner => corner[0]), ys = corners.map(corner => corner[1]);
  const width = Math.max(...xs) - Math.min(...xs);
  if (width < ROOM) return;
  const lines = [percent(segment.attention), ...(width < ROOM_FOR_SCORE ? [] : [`score ${segment.score.toFixed(2)}`])];
  label(context, lines, (Math.max(...xs) + Math.min(...xs)) / 2, (Math.max(...ys) + Math.min(...ys)) / 2, "center", taken);
}

/** Write lines of text on a dark ground, with their middle at a height, unless another label is there. */
function label(
  context: CanvasRenderingContext2D, lines: string[], x: number, y: number, align: CanvasTextAlign, taken: Area[],
): void {
  context.font = "12px system-ui";
  context.textAlign = align;
  context.textBaseline = "middle";
  const width = Math.max(...lines.map(line => context.measureText(line).width)) + 6, height = 15 * lines.length;
  const left = align === "left" ? x - 3 : x - width / 2, top = y - height / 2;
  if (taken.some(other => left < other.left + other.width && other.left < left + width && top < other.top + other.height && other.top < top + height)) return;
  taken.push({ left, top, width, height });
  context.fillStyle = "rgba(0, 0, 0, 0.7)";
  context.fillRect(left, top, width, height);
  context.fillStyle = "#ffe0b0";
  lines.forEach((line, index) => context.fillText(line, x, y - height / 2 + 15 * index + 8));
}
