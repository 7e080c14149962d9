/** What the server sends, and requests that wait for a lost connection to come back. */

export interface Pixels { rows: number; columns: number; levels: number; spacing: [number, number] | null; voi: string }
export interface ExamImage {
  key: string; image_id: string; side: string; view: string; status: string; reason: string; remark: string;
  meaning: string; probability: number | null; region: [number, number][]; mirrored: boolean;
  pixels: Pixels | null; problem?: string;
}
export interface Breast {
  side: string; probability: number | null; is_positive: boolean | null; status: string; reason: string; views: string;
  outputs: Record<string, string>;
}
export interface Exam {
  key: string; patient_id: string; exam_id: string; status: string; images: ExamImage[]; breasts: Breast[];
  model: { name: string; version: string; threshold: number | null; label: string };
  methods: Record<string, string>; tile: number; before: string | null; after: string | null; notice: string;
}
export interface HeatMap {
  width: number; height: number; values: Uint8Array; low: number; high: number; unit: string; outline: [number, number][];
}

const pause = (milliseconds: number): Promise<void> => new Promise(resolve => setTimeout(resolve, milliseconds));

/** Called with true when the server stops answering, and with false when it answers again. */
let report: (lost: boolean) => void = () => undefined;
export function onConnection(listener: (lost: boolean) => void): void { report = listener; }

/** Return the server's answer; where it cannot be reached, ask again until it can. */
async function ask(address: string): Promise<Response> {
  for (let wait = 500; ; wait = Math.min(8000, 2 * wait)) {
    try {
      const response = await fetch(address);
      report(false);
      return response;
    } catch {
      report(true);
      await pause(wait);
    }
  }
}

export async function fetchExam(key: string): Promise<Exam> {
  const response = await ask(`/api/exams/${key}`);
  if (!response.ok) throw new Error(`the server answered with status ${response.status}`);
  return await response.json() as Exam;
}

/** Return the grey values of a tile, brighter = denser, and its width. */
export async function fetchTile(key: string, level: number, row: number, column: number): Promise<[Uint16Array, number]> {
  const response = await ask(`/api/images/${key}/tiles/${level}/${row}/${column}`);
  if (!response.ok) throw new Error((await response.json().catch(() => ({ detail: `status ${response.status}` }))).detail);
  return [new Uint16Array(await response.arrayBuffer()), Number(response.headers.get("X-Width"))];
}

/** Return a heat map once the server has computed it; `waiting` is called with the number of maps still to compute. */
export async function fetchHeatMap(key: string, method: string, waiting: (count: number) => void): Promise<HeatMap> {
  for (;;) {
    const response = await ask(`/api/images/${key}/heat-maps/${method}`);
    const answer = await response.json();
    if (response.status === 202) {
      waiting(answer.waiting);
      await pause(300);
      continue;
    }
    if (!response.ok) throw new Error(answer.error ?? answer.detail);
    return { ...answer, values: Uint8Array.from(atob(answer.values), character => character.charCodeAt(0)) };
  }
}
