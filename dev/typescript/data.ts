/** What the server sends, and requests that wait for a lost connection to come back. */

export interface Pixels { rows: number; columns: number; levels: number; spacing: [number, number] | null; voi: string }
export interface ExamImage {
  key: string; image_id: string; side: string; view: string; status: string; reason: string; remark: string;
  meaning: string; probability: number | null; region: [number, number][]; mirrored: boolean; typicality: number | null;
  outputs: Record<string, string>; machine: string; pixels: Pixels | null; problem?: string;
  /** Source pixels behind the chest wall, and from it to the end of the breast; null = unknown. */
  margin: number; reach: number | null;
  /** Date or id of the exam if it is not the one of the page. */
  exam?: string;
}
export interface Breast {
  side: string; probability: number | null; other: number | null; is_positive: boolean | null; status: string;
  reason: string; meaning: string; views: string; outputs: Record<string, string>;
  /** Calibration interval of the probability. */
  interval: [number, number] | null;
}
export interface OtherExam { key: string; exam_id: string; date: string; breasts: Breast[] }
export interface DrawnBox { image: string; box: [number, number, number, number] }
export interface Reading {
  id: string; reader: string; stored: string; is_blinded: boolean; note: string; boxes: DrawnBox[];
  breasts: Record<string, { birads: string; agrees: boolean | null }>;
}
export interface Model {
  name: string; version: string; threshold: number | null; label: string; prevalence: number | null;
  notes: Record<string, string>; card: boolean;
}
export interface Exam {
  key: string; patient_id: string; exam_id: string; date: string; status: string; note: string; hidden: boolean;
  images: ExamImage[]; breasts: Breast[]; truth: Record<string, number>; model: Model; other_title: string; methods: Record<string, string>;
  tile: number; before: string | null; after: string | null; others: OtherExam[];
  reader: string; readings: Reading[]; birads: string[]; notice: string;
}
export interface HeatMap {
  width: number; height: number; values: Uint8Array; low: number; high: number; unit: string; outline: [number, number][];
  /** Probability of the image that was explained. */
  probability: number;
}
export interface Segment { corners: [number, number][]; attention: number; score: number }
/** The segments of an image, in place of a map. */
export interface Segments { segments: Segment[]; overview_attention: number; probability: number }
export const isSegments = (overlay: HeatMap | Segments): overlay is Segments => "segments" in overlay;

/** Path below which the pages of this reading room are. */
export const BASE = document.body.dataset.base ?? "";

export const pause = (milliseconds: number): Promise<void> => new Promise(resolve => setTimeout(resolve, milliseconds));

/** Called with true when the server stops answering, and with false when it answers again. */
let report: (lost: boolean) => void = () => undefined;
export function onConnection(listener: (lost: boolean) => void): void { report = listener; }

/** Return the server's answer; where it cannot be reached, ask again until it can. */
async function ask(address: string, request?: RequestInit): Promise<Response> {
  for (let wait = 500; ; wait = Math.min(8000, 2 * wait)) {
    try {
      const response = await fetch(address, request);
      report(false);
      return response;
    } catch {
      report(true);
      await pause(wait);
    }
  }
}

export async function fetchExam(key: string): Promise<Exam> {
  const response = await ask(`${BASE}/api/exams/${key}`);
  if (!response.ok) throw new Error(`the server answered with status ${response.status}`);
  return await response.json() as Exam;
}

/** Store a reading and return the exam as the reader may see it then. A repeated `id` is stored once. */
export async function storeReading(key: string, body: object): Promise<Exam> {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await ask(`${BASE}/api/exams/${key}/readings`, request);
  const answer = await response.json();
  if (!response.ok) throw new Error(typeof answer.detail === "string" ? answer.detail : `status ${response.status}`);
  return answer as Exam;
}

/** Tell the server the name of the reader. */
export async function setReader(name: string): Promise<void> {
  const response = await ask(`${BASE}/reader`, { method: "POST", body: new URLSearchParams({ name }) });
  if (!response.ok) throw new Error((await response.json()).detail);
}

/** Return the grey values of a tile, brighter = denser, and its width. */
export async function fetchTile(key: string, level: number, row: number, column: number): Promise<[Uint16Array, number]> {
  const response = await ask(`${BASE}/api/images/${key}/tiles/${level}/${row}/${column}`);
  if (!response.ok) throw new Error((await response.json().catch(() => ({ detail: `status ${response.status}` }))).detail);
  return [new Uint16Array(await response.arrayBuffer()), Number(response.headers.get("X-Width"))];
}

/** Return a heat map once the server has computed it; `waiting` is called with the number of maps still to compute. */
export async function fetchHeatMap(key: string, method: string, waiting: (count: number) => void): Promise<HeatMap | Segments> {
  for (;;) {
    const response = await ask(`${BASE}/api/images/${key}/heat-maps/${method}`);
    const answer = await response.json();
    if (response.status === 202) {
      waiting(answer.waiting);
      await pause(300);
      continue;
    }
    if (!response.ok) throw new Error(answer.error ?? answer.detail);
    if (isSegments(answer)) return answer;
    return { ...answer, values: Uint8Array.from(atob(answer.values), character => character.charCodeAt(0)) };
  }
}
