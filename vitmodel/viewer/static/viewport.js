import { fetchTile, isSegments } from "./data.js";
import { drawSegments } from "./segments.js";
const UNKNOWN_HEIGHT = 290;
const AIR = 1.15;
const MAGNIFICATION = 2.5;
const LENS = 90;
export class Viewport {
    image;
    camera;
    settings;
    tile;
    canvas = document.createElement("canvas");
    figure = document.createElement("figure");
    heat = null;
    segments = null;
    isPlain = false;
    problem = "";
    tiles = new Map();
    loading = new Set();
    table = new Uint8Array(65536);
    version = 0;
    heatCanvas = null;
    boxes = [];
    line = null;
    pointer = null;
    waiting = false;
    constructor(image, camera, settings, tile) {
        this.image = image;
        this.camera = camera;
        this.settings = settings;
        this.tile = tile;
        const side = { R: "right", L: "left" }[image.side] ?? "unknown";
        this.figure.className = side;
        this.figure.tabIndex = 0;
        this.figure.dataset.image = image.key;
        this.canvas.setAttribute("role", "img");
        this.canvas.setAttribute("aria-label", `${image.side}-${image.view} of the exam`);
        const caption = document.createElement("figcaption");
        const unscored = image.status === "refused" ? image.status : "";
        const score = image.probability === null ? unscored : `${(100 * image.probability).toFixed(1)} %`;
        caption.textContent = [`${image.side || "?"}-${image.view || "?"}`, score, image.exam ?? ""].join("  ").trim();
        this.figure.append(this.canvas, caption);
        new ResizeObserver(() => this.draw()).observe(this.figure);
        if (!image.pixels)
            this.fail(image.problem ?? image.meaning);
        this.updateWindow();
    }
    fail(message) {
        this.problem = message;
        const text = document.createElement("p");
        text.className = "problem";
        text.textContent = message;
        this.figure.querySelector(".problem")?.remove();
        this.figure.append(text);
    }
    get spacing() {
        const pixels = this.image.pixels;
        if (!pixels)
            return [1, 1];
        if (pixels.spacing)
            return [pixels.spacing[1], pixels.spacing[0]];
        return [UNKNOWN_HEIGHT / pixels.rows, UNKNOWN_HEIGHT / pixels.rows];
    }
    get extent() {
        const pixels = this.image.pixels;
        return pixels ? [pixels.columns * this.spacing[0], pixels.rows * this.spacing[1]] : [1, 1];
    }
    get wanted() {
        const [across, tall] = this.extent;
        const behind = this.image.margin * this.spacing[0];
        const reach = this.image.side && this.image.reach ? AIR * this.image.reach * this.spacing[0] : across;
        return [Math.min(across - behind, reach), tall];
    }
    get size() { return [this.figure.clientWidth, this.figure.clientHeight]; }
    get origin() {
        const [width, height] = this.size;
        const { scale, away, down } = this.camera;
        const [across, tall] = [this.extent[0] * scale, this.extent[1] * scale];
        const top = (height - tall) / 2 + down * scale;
        const behind = this.image.margin * this.spacing[0] * scale;
        if (this.image.side === "R")
            return [width - across + behind - away * scale, top];
        if (this.image.side === "L")
            return [away * scale - behind, top];
        return [(width - across) / 2 + away * scale, top];
    }
    toSource(x, y) {
        const [left, top] = this.origin;
        const column = (x - left) / (this.spacing[0] * this.camera.scale);
        const row = (y - top) / (this.spacing[1] * this.camera.scale);
        return [this.image.mirrored ? (this.image.pixels?.columns ?? 0) - column : column, row];
    }
    toScreen(column, row) {
        const [left, top] = this.origin;
        const across = this.image.mirrored ? (this.image.pixels?.columns ?? 0) - column : column;
        return [left + across * this.spacing[0] * this.camera.scale, top + row * this.spacing[1] * this.camera.scale];
    }
    updateWindow() {
        const { low, high, inverted } = this.settings;
        const span = Math.max(high - low, 1e-4);
        for (let value = 0; value < 65536; value++) {
            const share = Math.min(1, Math.max(0, (value / 65535 - low) / span));
            this.table[value] = Math.round(255 * (inverted ? 1 - share : share));
        }
        this.version++;
        this.draw();
    }
    setHeat(overlay) {
        this.segments = overlay && isSegments(overlay) ? overlay : null;
        this.heat = overlay && !isSegments(overlay) ? overlay : null;
        this.heatCanvas = null;
        this.draw();
    }
    recolour() { this.heatCanvas = null; this.draw(); }
    setLine(line) { this.line = line; this.draw(); }
    setBoxes(boxes) { this.boxes = boxes; this.draw(); }
    setPointer(pointer) { this.pointer = pointer; if (this.settings.magnify)
        this.draw(); }
    draw() {
        if (this.waiting)
            return;
        this.waiting = true;
        requestAnimationFrame(() => { this.waiting = false; this.paint(); });
    }
    paint() {
        const [width, height] = this.size;
        const ratio = window.devicePixelRatio || 1;
        if (this.canvas.width !== Math.round(width * ratio))
            this.canvas.width = Math.round(width * ratio);
        if (this.canvas.height !== Math.round(height * ratio))
            this.canvas.height = Math.round(height * ratio);
        const context = this.canvas.getContext("2d");
        if (!context || !this.image.pixels)
            return;
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        context.fillStyle = "#000";
        context.fillRect(0, 0, width, height);
        this.paintImage(context, 1);
        if (this.segments && this.settings.showHeat)
            drawSegments(context, this.segments, (x, y) => this.toScreen(x, y), this.settings.opacity);
        const [left, top] = this.origin;
        this.figure.dataset.place = [left, top, this.spacing[0] * this.camera.scale, this.spacing[1] * this.camera.scale].join();
        if (this.settings.magnify && this.pointer)
            this.paintLens(context, ...this.pointer);
        this.paintLine(context);
    }
    paintLens(context, x, y) {
        context.save();
        context.beginPath();
        context.arc(x, y, LENS, 0, 2 * Math.PI);
        context.clip();
        context.fillStyle = "#000";
        context.fillRect(x - LENS, y - LENS, 2 * LENS, 2 * LENS);
        context.translate(x, y);
        context.scale(MAGNIFICATION, MAGNIFICATION);
        context.translate(-x, -y);
        this.paintImage(context, MAGNIFICATION);
        context.restore();
        context.strokeStyle = "#7cc4ff";
        context.beginPath();
        context.arc(x, y, LENS, 0, 2 * Math.PI);
        context.stroke();
    }
    paintImage(context, zoom) {
        const pixels = this.image.pixels;
        if (!pixels)
            return;
        const [left, top] = this.origin;
        const across = this.spacing[0] * this.camera.scale, down = this.spacing[1] * this.camera.scale;
        context.save();
        if (this.image.mirrored)
            context.transform(-across, 0, 0, down, left + pixels.columns * across, top);
        else
            context.transform(across, 0, 0, down, left, top);
        const shown = across * zoom * (window.devicePixelRatio || 1);
        const level = Math.min(pixels.levels, Math.max(0, Math.floor(Math.log2(1 / shown))));
        context.imageSmoothingEnabled = shown < 2;
        context.imageSmoothingQuality = "high";
        this.paintTiles(context, pixels.levels);
        if (level < pixels.levels)
            this.paintTiles(context, level);
        this.paintHeat(context, pixels.columns, pixels.rows);
        this.paintBoxes(context);
        context.restore();
    }
    paintTiles(context, level) {
        const pixels = this.image.pixels;
        if (!pixels)
            return;
        const side = this.tile * 2 ** level;
        const [width, height] = this.size;
        const corners = [this.toSource(0, 0), this.toSource(width, height)];
        const from = [Math.min(corners[0][0], corners[1][0]), corners[0][1]];
        const to = [Math.max(corners[0][0], corners[1][0]), corners[1][1]];
        const first = from.map(edge => Math.max(0, Math.floor(edge / side)));
        const last = [Math.min(to[0], pixels.columns - 1), Math.min(to[1], pixels.rows - 1)].map(edge => Math.floor(edge / side));
        for (let row = first[1]; row <= last[1]; row++) {
            for (let column = first[0]; column <= last[0]; column++) {
                const tile = this.find(level, row, column);
                if (tile)
                    context.drawImage(tile, column * side, row * side, tile.width * 2 ** level, tile.height * 2 ** level);
            }
        }
    }
    find(level, row, column) {
        const place = `${level}/${row}/${column}`;
        const tile = this.tiles.get(place);
        if (!tile) {
            void this.load(place, level, row, column);
            return null;
        }
        if (!tile.canvas || tile.version !== this.version) {
            tile.canvas = this.render(tile, tile.canvas);
            tile.version = this.version;
        }
        return tile.canvas;
    }
    async load(place, level, row, column) {
        if (this.loading.has(place))
            return;
        this.loading.add(place);
        try {
            const [values, width] = await fetchTile(this.image.key, level, row, column);
            this.tiles.set(place, { values, width, canvas: null, version: -1 });
            this.draw();
        }
        catch (error) {
            this.fail(error.message);
        }
    }
    render(tile, canvas) {
        const result = canvas ?? document.createElement("canvas");
        const height = tile.values.length / tile.width;
        result.width = tile.width;
        result.height = height;
        const context = result.getContext("2d");
        const picture = context.createImageData(tile.width, height);
        const words = new Uint32Array(picture.data.buffer);
        for (let index = 0; index < words.length; index++)
            words[index] = 0xff000000 | (this.table[tile.values[index]] * 0x010101);
        context.putImageData(picture, 0, 0);
        return result;
    }
    paintHeat(context, columns, rows) {
        if (this.heat && this.settings.showHeat) {
            this.heatCanvas ??= colour(this.heat, this.settings.lowest);
            context.imageSmoothingEnabled = true;
            context.globalAlpha = this.settings.opacity;
            context.drawImage(this.heatCanvas, 0, 0, columns, rows);
            context.globalAlpha = 1;
        }
        const outline = this.heat?.outline ?? this.image.region;
        if (!this.settings.showRegion || !outline.length)
            return;
        context.beginPath();
        outline.forEach(([x, y], index) => index ? context.lineTo(x + 0.5, y + 0.5) : context.moveTo(x + 0.5, y + 0.5));
        context.closePath();
        context.strokeStyle = "#ffb86b";
        context.lineWidth = 2 / (this.spacing[0] * this.camera.scale);
        context.stroke();
    }
    paintBoxes(context) {
        context.strokeStyle = "#7cc4ff";
        context.lineWidth = 2 / (this.spacing[0] * this.camera.scale);
        for (const [x0, y0, x1, y1] of this.boxes)
            context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
    paintLine(context) {
        if (!this.line)
            return;
        const [x0, y0, x1, y1] = this.line;
        const millimetres = Math.hypot(x1 - x0, y1 - y0) / this.camera.scale;
        context.strokeStyle = context.fillStyle = "#7cc4ff";
        context.lineWidth = 1.5;
        context.beginPath();
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
        context.stroke();
        context.font = "14px system-ui";
        const known = this.image.pixels?.spacing;
        context.fillText(known ? `${millimetres.toFixed(1)} mm` : "pixel size unknown", x1 + 8, y1);
    }
}
function colour(heat, lowest) {
    const canvas = document.createElement("canvas");
    canvas.width = heat.width;
    canvas.height = heat.height;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(heat.width, heat.height);
    heat.values.forEach((value, index) => {
        const share = (value - 1) / 254;
        if (value === 0 || share < lowest)
            return;
        picture.data[4 * index] = 255 * Math.min(1, 0.35 + 1.1 * share);
        picture.data[4 * index + 1] = 255 * Math.max(0, 1.5 * share - 0.5);
        picture.data[4 * index + 2] = 255 * Math.max(0, 0.5 - 0.7 * share);
        picture.data[4 * index + 3] = 255;
    });
    context.putImageData(picture, 0, 0);
    return canvas;
}
