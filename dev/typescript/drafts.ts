/** Readings that are being entered or sent, kept in this browser until the server has stored them. */

import { BASE, DrawnBox, storeReading } from "./data.js";

export interface Body {
  /** Empty until the reading is sent; sent again with the same id, it is stored once. */
  id: string;
  breasts: Record<string, { birads: string; agrees: boolean | null }>;
  note: string; boxes: DrawnBox[]; seconds: number; active_seconds: number;
}
export interface Draft {
  body: Body;
  /** Name that the reader typed, if the server does not know it yet. */
  name: string;
  /** Whether the reader stored it and the server has not confirmed it. */
  waits: boolean;
}

const PREFIX = `vitmodel reading ${BASE}|`;
const place = (exam: string, reader: string): string => `${PREFIX}${exam}|${encodeURIComponent(reader)}`;

/** Return the draft of a reader for an exam; null if there is none, or the browser keeps nothing. */
export function loadDraft(exam: string, reader: string): Draft | null {
  try {
    return JSON.parse(localStorage.getItem(place(exam, reader)) ?? "null") as Draft | null;
  } catch {
    return null;
  }
}

/** Keep a draft; a browser that keeps nothing only loses it when the page is closed. */
export function keepDraft(exam: string, reader: string, draft: Draft): void {
  try { localStorage.setItem(place(exam, reader), JSON.stringify(draft)); } catch { /* the page still has it */ }
}

export function dropDraft(exam: string, reader: string): void {
  try { localStorage.removeItem(place(exam, reader)); } catch { /* there is none */ }
}

/**
 * Send the readings that a reader stored while the server could not be reached, and that no page sends any more.
 *
 * One that the server refuses becomes a draft again, which the page of its exam shows.
 *
 * @param reader Who reads now. Drafts of other readers are left alone, because they would be stored under this name.
 * @param except The exam whose page sends its own.
 */
export async function sendWaiting(reader: string, except = ""): Promise<void> {
  let names: string[] = [];
  try { names = Object.keys(localStorage); } catch { /* there is none */ }
  for (const name of names) {
    const [exam, owner] = name.startsWith(PREFIX) ? name.slice(PREFIX.length).split("|") : [];
    const draft = reader && exam && owner === encodeURIComponent(reader) && exam !== except ? loadDraft(exam, reader) : null;
    if (!exam || !draft?.waits) continue;
    try {
      await storeReading(exam, draft.body);
      dropDraft(exam, reader);
    } catch {
      keepDraft(exam, reader, { ...draft, waits: false });
    }
  }
}

/** Return a random id, also where the page does not come over HTTPS and browsers offer no `randomUUID`. */
export function randomId(): string {
  return [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0")).join("");
}
