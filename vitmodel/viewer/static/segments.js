const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const ROOM = 34, ROOM_FOR_SCORE = 78;
export function drawSegments(context, read, toScreen, opacity) {
    const most = Math.max(...read.segments.map(segment => segment.attention), 1e-9);
    context.save();
    context.globalAlpha = Math.min(1, 2 * opacity);
    context.lineJoin = "round";
    for (const segment of [...read.segments].reverse())
        drawBorder(context, segment, toScreen, segment.attention / most);
    const taken = [];
    label(context, [`overview ${percent(read.overview_attention)}`], 8, context.canvas.clientHeight - 14, "left", taken);
    for (const segment of read.segments)
        drawLabel(context, segment, toScreen, taken);
    context.restore();
}
function drawBorder(context, segment, toScreen, share) {
    context.beginPath();
    for (const [x, y] of segment.corners)
        context.lineTo(...toScreen(x + 0.5, y + 0.5));
    context.closePath();
    context.strokeStyle = `rgba(255, 184, 107, ${0.35 + 0.65 * share})`;
    context.lineWidth = 1 + 2 * share;
    context.stroke();
}
function drawLabel(context, segment, toScreen, taken) {
    const corners = segment.corners.map(([x, y]) => toScreen(x + 0.5, y + 0.5));
    const xs = corners.map(corner => corner[0]), ys = corners.map(corner => corner[1]);
    const width = Math.max(...xs) - Math.min(...xs);
    if (width < ROOM)
        return;
    const lines = [percent(segment.attention), ...(width < ROOM_FOR_SCORE ? [] : [`score ${segment.score.toFixed(2)}`])];
    label(context, lines, (Math.max(...xs) + Math.min(...xs)) / 2, (Math.max(...ys) + Math.min(...ys)) / 2, "center", taken);
}
function label(context, lines, x, y, align, taken) {
    context.font = "12px system-ui";
    context.textAlign = align;
    context.textBaseline = "middle";
    const width = Math.max(...lines.map(line => context.measureText(line).width)) + 6, height = 15 * lines.length;
    const left = align === "left" ? x - 3 : x - width / 2, top = y - height / 2;
    if (taken.some(other => left < other.left + other.width && other.left < left + width && top < other.top + other.height && other.top < top + height))
        return;
    taken.push({ left, top, width, height });
    context.fillStyle = "rgba(0, 0, 0, 0.7)";
    context.fillRect(left, top, width, height);
    context.fillStyle = "#ffe0b0";
    lines.forEach((line, index) => context.fillText(line, x, y - height / 2 + 15 * index + 8));
}
