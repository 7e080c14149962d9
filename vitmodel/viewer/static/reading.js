import { setReader, storeReading } from "./data.js";
import { dropDraft, keepDraft, loadDraft, randomId } from "./drafts.js";
const SIDES = { R: "Right breast", L: "Left breast", "": "Breast of unknown side" };
function make(kind, values = {}, ...children) {
    const result = Object.assign(document.createElement(kind), values);
    result.append(...children);
    return result;
}
const agreementOf = (agrees) => agrees === null ? "" : agrees ? "yes" : "no";
export class ReadingForm {
    exam;
    place;
    onStored;
    onBoxes;
    boxes = [];
    dirty = false;
    id = "";
    version = 0;
    before = { seconds: 0, active_seconds: 0 };
    active = 0;
    visibleSince = document.visibilityState === "visible" ? performance.now() : null;
    form = make("form", { id: "reading-form" });
    message = make("p", { id: "reading-state" });
    saving = false;
    constructor(exam, place, onStored, onBoxes) {
        this.exam = exam;
        this.place = place;
        this.onStored = onStored;
        this.onBoxes = onBoxes;
        this.message.setAttribute("role", "status");
        this.fill(exam);
        const draft = loadDraft(exam.key, exam.reader);
        if (draft)
            this.restore(draft);
        document.addEventListener("visibilitychange", () => this.countTime());
        window.addEventListener("beforeunload", event => { if (this.dirty)
            event.preventDefault(); });
        this.form.addEventListener("input", () => this.change());
        this.form.addEventListener("submit", event => { event.preventDefault(); void this.save(); });
    }
    add(box) {
        this.boxes.push(box);
        this.listBoxes();
        this.change();
    }
    get isEmpty() { return !this.dirty; }
    focus() { this.form.querySelector("select")?.focus(); }
    async save() {
        if (this.saving)
            return;
        this.id ||= randomId();
        await this.send(this.body());
    }
    async send(body) {
        this.saving = true;
        const version = this.version, { key, reader } = this.exam;
        keepDraft(key, reader, { body, name: this.typedName(), waits: true });
        try {
            if (this.typedName())
                await setReader(this.typedName());
            const exam = await storeReading(key, body);
            const changed = this.version === version ? null : this.body();
            dropDraft(key, reader);
            this.saving = this.dirty = false;
            this.id = "";
            this.fill(exam);
            this.onStored(exam);
            if (changed)
                this.show(changed);
        }
        catch (error) {
            this.saving = false;
            keepDraft(key, reader, { body: this.body(), name: this.typedName(), waits: false });
            this.message.className = "error";
            this.message.textContent = `Not stored: ${error.message}`;
        }
    }
    restore(draft) {
        this.before = draft.body;
        const name = this.form.querySelector("#reader-name");
        if (name)
            name.value = draft.name;
        this.show(draft.body);
        this.id = draft.body.id;
        if (draft.waits) {
            this.message.textContent = "Sending the reading that this browser kept …";
            void this.send(draft.body);
            return;
        }
        const discard = make("button", { type: "button", textContent: "discard it" });
        discard.addEventListener("click", () => {
            dropDraft(this.exam.key, this.exam.reader);
            this.dirty = false;
            this.fill(this.exam);
        });
        this.message.replaceChildren("Not stored yet; this browser kept it. ", discard);
        this.dirty = false;
    }
    show(body) {
        for (const field of this.form.querySelectorAll("fieldset[data-side]")) {
            const breast = body.breasts[field.dataset.side];
            field.querySelector("select.birads").value = breast?.birads ?? "";
            const agreement = field.querySelector("select.agreement");
            if (agreement)
                agreement.value = agreementOf(breast?.agrees ?? null);
        }
        this.form.querySelector("textarea").value = body.note;
        this.boxes = [...body.boxes];
        this.listBoxes();
        this.change();
    }
    change() {
        this.dirty = true;
        this.id = "";
        this.version++;
        this.message.className = "";
        this.message.textContent = "Not stored yet.";
        if (!this.saving)
            keepDraft(this.exam.key, this.exam.reader, { body: this.body(), name: this.typedName(), waits: false });
    }
    typedName() { return this.form.querySelector("#reader-name")?.value.trim() ?? ""; }
    body() {
        this.countTime();
        return {
            id: this.id, breasts: this.breasts(), note: this.form.querySelector("textarea").value, boxes: [...this.boxes],
            seconds: this.before.seconds + performance.now() / 1000, active_seconds: this.before.active_seconds + this.active / 1000,
        };
    }
    countTime() {
        const now = performance.now();
        if (this.visibleSince !== null)
            this.active += now - this.visibleSince;
        this.visibleSince = document.visibilityState === "visible" ? now : null;
    }
    breasts() {
        const result = {};
        for (const field of this.form.querySelectorAll("fieldset[data-side]")) {
            const agreement = field.querySelector("select.agreement")?.value ?? "";
            const birads = field.querySelector("select.birads").value;
            result[field.dataset.side] = { birads, agrees: agreement === "" ? null : agreement === "yes" };
        }
        return result;
    }
    fill(exam) {
        this.exam = exam;
        const own = exam.readings.filter(reading => reading.reader === exam.reader).at(-1);
        this.boxes = own ? [...own.boxes] : [];
        const name = exam.reader
            ? make("p", {}, `Reader: ${exam.reader}`)
            : make("label", {}, "Your name ", make("input", { id: "reader-name", required: true, maxLength: 64, autocomplete: "off" }));
        const note = make("textarea", { rows: 2, maxLength: 5000, value: own?.note ?? "" });
        this.form.replaceChildren(name, ...exam.breasts.map(breast => this.breastField(exam, breast.side, own)), make("label", {}, "Remark ", note), make("ul", { id: "boxes" }), make("button", { id: "store", title: "Key s" }, "Store reading"), this.message);
        this.message.className = "";
        this.message.textContent = own ? `Stored at ${own.stored.slice(0, 16).replace("T", " ")}.` : "";
        this.place.replaceChildren(make("h2", {}, "Reading"), this.form, this.otherReadings(exam));
        this.listBoxes();
    }
    breastField(exam, side, own) {
        const stored = own?.breasts[side];
        const choice = (values, chosen, className) => {
            const select = make("select", { className }, ...values.map(([value, textContent]) => make("option", { value, textContent })));
            select.value = chosen;
            return select;
        };
        const birads = choice([["", "–"], ...exam.birads.map((name) => [name, name])], stored?.birads ?? "", "birads");
        const agreement = choice([["", "–"], ["yes", "agree"], ["no", "disagree"]], agreementOf(stored?.agrees ?? null), "agreement");
        const field = make("fieldset", {}, make("legend", {}, SIDES[side] ?? side), make("label", {}, "BI-RADS ", birads));
        if (!exam.hidden)
            field.append(make("label", {}, "With the score ", agreement));
        field.dataset.side = side;
        return field;
    }
    listBoxes() {
        const list = this.form.querySelector("#boxes");
        list.replaceChildren(...this.boxes.map((box, index) => {
            const image = this.exam.images.find(candidate => candidate.key === box.image);
            const name = `box on ${image?.side || "?"}-${image?.view || "?"}`;
            const remove = make("button", { type: "button", textContent: "remove" });
            remove.setAttribute("aria-label", `remove ${name}`);
            remove.addEventListener("click", () => { this.boxes.splice(index, 1); this.listBoxes(); this.change(); this.onBoxes(); });
            return make("li", {}, `${name} `, remove);
        }));
        this.onBoxes();
    }
    otherReadings(exam) {
        const lines = exam.readings.filter(reading => reading.reader !== exam.reader).map(reading => {
            const breasts = Object.entries(reading.breasts).filter(([, breast]) => breast.birads);
            const text = breasts.map(([side, breast]) => `${side || "?"} BI-RADS ${breast.birads}`).join(", ");
            return make("p", { className: "soft" }, `${reading.reader}, ${reading.stored.slice(0, 10)}: ${text || reading.note}`);
        });
        return make("div", { id: "other-readings" }, ...lines);
    }
}
