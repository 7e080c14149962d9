export const isSegments = (overlay) => "segments" in overlay;
export const BASE = document.body.dataset.base ?? "";
export const pause = (milliseconds) => new Promise(resolve => setTimeout(resolve, milliseconds));
let report = () => undefined;
export function onConnection(listener) { report = listener; }
async function ask(address, request) {
    for (let wait = 500;; wait = Math.min(8000, 2 * wait)) {
        try {
            const response = await fetch(address, request);
            report(false);
            return response;
        }
        catch {
            report(true);
            await pause(wait);
        }
    }
}
export async function fetchExam(key) {
    const response = await ask(`${BASE}/api/exams/${key}`);
    if (!response.ok)
        throw new Error(`the server answered with status ${response.status}`);
    return await response.json();
}
export async function storeReading(key, body) {
    const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const response = await ask(`${BASE}/api/exams/${key}/readings`, request);
    const answer = await response.json();
    if (!response.ok)
        throw new Error(typeof answer.detail === "string" ? answer.detail : `status ${response.status}`);
    return answer;
}
export async function setReader(name) {
    const response = await ask(`${BASE}/reader`, { method: "POST", body: new URLSearchParams({ name }) });
    if (!response.ok)
        throw new Error((await response.json()).detail);
}
export async function fetchTile(key, level, row, column) {
    const response = await ask(`${BASE}/api/images/${key}/tiles/${level}/${row}/${column}`);
    if (!response.ok)
        throw new Error((await response.json().catch(() => ({ detail: `status ${response.status}` }))).detail);
    return [new Uint16Array(await response.arrayBuffer()), Number(response.headers.get("X-Width"))];
}
export async function fetchHeatMap(key, method, waiting) {
    for (;;) {
        const response = await ask(`${BASE}/api/images/${key}/heat-maps/${method}`);
        const answer = await response.json();
        if (response.status === 202) {
            waiting(answer.waiting);
            await pause(300);
            continue;
        }
        if (!response.ok)
            throw new Error(answer.error ?? answer.detail);
        if (isSegments(answer))
            return answer;
        return { ...answer, values: Uint8Array.from(atob(answer.values), character => character.charCodeAt(0)) };
    }
}
