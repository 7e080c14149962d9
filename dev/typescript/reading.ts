/** The form of the reader: BI-RADS and agreement per breast, a remark, drawn boxes, and the time that it took. */

import { DrawnBox, Exam, Reading, setReader, storeReading } from "./data.js";
import { Body, Draft, dropDraft, keepDraft, loadDraft, randomId } from "./drafts.js";

const SIDES: Record<string, string> = { R: "Right breast", L: "Left breast", "": "Breast of unknown side" };

function make<K extends keyof HTMLElementTagNameMap>(
  kind: K, values: Partial<HTMLElementTagNameMap[K]> = {}, ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const result = Object.assign(document.createElement(kind), values);
  result.append(...children);
  return result;
}

const agreementOf = (agrees: boolean | null): string => agrees === null ? "" : agrees ? "yes" : "no";

export class ReadingForm {
  boxes: DrawnBox[] = [];
  private dirty = false;
  private id = "";
  /** Counts the changes, so that those made while a reading is being sent are not lost. */
  private version = 0;
  /** Seconds that earlier pages spent on the reading. */
  private before = { seconds: 0, active_seconds: 0 };
  private active = 0;
  private visibleSince: number | null = document.visibilityState === "visible" ? performance.now() : null;
  private form = make("form", { id: "reading-form" });
  private message = make("p", { id: "reading-state" });
  private saving = false;

  /**
   * @param exam The exam that is read.
   * @param place Where the form is shown.
   * @param onStored Called with the exam as the reader may see it after storing.
   * @param onBoxes Called when a box is removed.
   */
  constructor(private exam: Exam, private place: HTMLElement, private onStored: (exam: Exam) => void, private onBoxes: () => void) {
    this.message.setAttribute("role", "status");
    this.fill(exam);
    const draft = loadDraft(exam.key, exam.reader);
    if (draft) this.restore(draft);
    document.addEventListener("visibilitychange", () => this.countTime());
    window.addEventListener("beforeunload", event => { if (this.dirty) event.preventDefault(); });
    this.form.addEventListener("input", () => this.change());
    this.form.addEventListener("submit", event => { event.preventDefault(); void this.save(); });
  }

  /** Add a box in source pixels. */
  add(box: DrawnBox): void {
    this.boxes.push(box);
    this.listBoxes();
    this.change();
  }

  /** Whether the reader has entered nothing that is not stored. */
  get isEmpty(): boolean { return !this.dirty; }

  focus(): void { this.form.querySelector<HTMLSelectElement>("select")?.focus(); }

  async save(): Promise<void> {
    if (this.saving) return;
    this.id ||= randomId();
    await this.send(this.body());
  }

  /** Send a reading, again and again while the server cannot be reached. */
  private async send(body: Body): Promise<void> {
    this.saving = true;
    const version = this.version, { key, reader } = this.exam;
    keepDraft(key, reader, { body, name: this.typedName(), waits: true });
    try {
      if (this.typedName()) await setReader(this.typedName());
      const exam = await storeReading(key, body);
      const changed = this.version === version ? null : this.body();
      dropDraft(key, reader);
      this.saving = this.dirty = false;
      this.id = "";
      this.fill(exam);
      this.onStored(exam);
      if (changed) this.show(changed);
    } catch (error) {
      this.saving = false;
      keepDraft(key, reader, { body: this.body(), name: this.typedName(), waits: false });
      this.message.className = "error";
      this.message.textContent = `Not stored: ${(error as Error).message}`;
    }
  }

  /** Show what an earlier page kept, and send it if the reader had stored it. */
  private restore(draft: Draft): void {
    this.before = draft.body;
    const name = this.form.querySelector<HTMLInputElement>("#reader-name");
    if (name) name.value = draft.name;
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
    this.dirty = false; // it is kept, and a second window of the exam must not ask before it follows the first
  }

  /** Fill the form with a reading that is not stored. */
  private show(body: Body): void {
    for (const field of this.form.querySelectorAll<HTMLFieldSetElement>("fieldset[data-side]")) {
      const breast = body.breasts[field.dataset.side!];
      field.querySelector<HTMLSelectElement>("select.birads")!.value = breast?.birads ?? "";
      const agreement = field.querySelector<HTMLSelectElement>("select.agreement");
      if (agreement) agreement.value = agreementOf(breast?.agrees ?? null);
    }
    this.form.querySelector("textarea")!.value = body.note;
    this.boxes = [...body.boxes];
    this.listBoxes();
    this.change();
  }

  private change(): void {
    this.dirty = true;
    this.id = "";
    this.version++;
    this.message.className = "";
    this.message.textContent = "Not stored yet.";
    // while a reading is being sent, the draft is that one
    if (!this.saving) keepDraft(this.exam.key, this.exam.reader, { body: this.body(), name: this.typedName(), waits: false });
  }

  private typedName(): string { return this.form.querySelector<HTMLInputElement>("#reader-name")?.value.trim() ?? ""; }

  /** Return what the form holds. */
  private body(): Body {
    this.countTime();
    return {
      id: this.id, breasts: this.breasts(), note: this.form.querySelector("textarea")!.value, boxes: [...this.boxes],
      seconds: this.before.seconds + performance.now() / 1000, active_seconds: this.before.active_seconds + this.active / 1000,
    };
  }

  /** Count the time during which the page is visible. */
  private countTime(): void {
    const now = performance.now();
    if (this.visibleSince !== null) this.active += now - this.visibleSince;
    this.visibleSince = document.visibilityState === "visible" ? now : null;
  }

  private breasts(): Record<string, { birads: string; agrees: boolean | null }> {
    const result: Record<string, { birads: string; agrees: boolean | null }> = {};
    for (const field of this.form.querySelectorAll<HTMLFieldSetElement>("fieldset[data-side]")) {
      const agreement = field.querySelector<HTMLSelectElement>("select.agreement")?.value ?? "";
      const birads = field.querySelector<HTMLSelectElement>("select.birads")!.value;
      result[field.dataset.side!] = { birads, agrees: agreement === "" ? null : agreement === "yes" };
    }
    return result;
  }

  /** Show the form with what the reader stored last. */
  private fill(exam: Exam): void {
    this.exam = exam;
    const own = exam.readings.filter(reading => reading.reader === exam.reader).at(-1);
    this.boxes = own ? [...own.boxes] : [];
    const name = exam.reader
      ? make("p", {}, `Reader: ${exam.reader}`)
      : make("label", {}, "Your name ", make("input", { id: "reader-name", required: true, maxLength: 64, autocomplete: "off" }));
    const note = make("textarea", { rows: 2, maxLength: 5000, value: own?.note ?? "" });
    this.form.replaceChildren(
      name, ...exam.breasts.map(breast => this.breastField(exam, breast.side, own)),
      make("label", {}, "Remark ", note), make("ul", { id: "boxes" }), make("button", { id: "store", title: "Key s" }, "Store reading"), this.message,
    );
    this.message.className = "";
    this.message.textContent = own ? `Stored at ${own.stored.slice(0, 16).replace("T", " ")}.` : "";
    this.place.replaceChildren(make("h2", {}, "Reading"), this.form, this.otherReadings(exam));
    this.listBoxes();
  }

  private breastField(exam: Exam, side: string, own: Reading | undefined): HTMLElement {
    const stored = own?.breasts[side];
    const choice = (values: [string, string][], chosen: string, className: string): HTMLSelectElement => {
      const select = make("select", { className }, ...values.map(([value, textContent]) => make("option", { value, textContent })));
      select.value = chosen;
      return select;
    };
    const birads = choice([["", "–"], ...exam.birads.map((name): [string, string] => [name, name])], stored?.birads ?? "", "birads");
    const agreement = choice([["", "–"], ["yes", "agree"], ["no", "disagree"]], agreementOf(stored?.agrees ?? null), "agreement");
    const field = make("fieldset", {}, make("legend", {}, SIDES[side] ?? side), make("label", {}, "BI-RADS ", birads));
    if (!exam.hidden) field.append(make("label", {}, "With the score ", agreement));
    field.dataset.side = side;
    return field;
  }

  private listBoxes(): void {
    const list = this.form.querySelector("#boxes")!;
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

  private otherReadings(exam: Exam): HTMLElement {
    const lines = exam.readings.filter(reading => reading.reader !== exam.reader).map(reading => {
      const breasts = Object.entries(reading.breasts).filter(([, breast]) => breast.birads);
      const text = breasts.map(([side, breast]) => `${side || "?"} BI-RADS ${breast.birads}`).join(", ");
      return make("p", { className: "soft" }, `${reading.reader}, ${reading.stored.slice(0, 10)}: ${text || reading.note}`);
    });
    return make("div", { id: "other-readings" }, ...lines);
  }
}
