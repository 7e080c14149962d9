import { BASE, storeReading } from "./data.js";
const PREFIX = `vitmodel reading ${BASE}|`;
const place = (exam, reader) => `${PREFIX}${exam}|${encodeURIComponent(reader)}`;
export function loadDraft(exam, reader) {
    try {
        return JSON.parse(localStorage.getItem(place(exam, reader)) ?? "null");
    }
    catch {
        return null;
    }
}
export function keepDraft(exam, reader, draft) {
    try {
        localStorage.setItem(place(exam, reader), JSON.stringify(draft));
    }
    catch { }
}
export function dropDraft(exam, reader) {
    try {
        localStorage.removeItem(place(exam, reader));
    }
    catch { }
}
export async function sendWaiting(reader, except = "") {
    let names = [];
    try {
        names = Object.keys(localStorage);
    }
    catch { }
    for (const name of names) {
        const [exam, owner] = name.startsWith(PREFIX) ? name.slice(PREFIX.length).split("|") : [];
        const draft = reader && exam && owner === encodeURIComponent(reader) && exam !== except ? loadDraft(exam, reader) : null;
        if (!exam || !draft?.waits)
            continue;
        try {
            await storeReading(exam, draft.body);
            dropDraft(exam, reader);
        }
        catch {
            keepDraft(exam, reader, { ...draft, waits: false });
        }
    }
}
export function randomId() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0")).join("");
}
