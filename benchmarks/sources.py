"""Sources learned apart and exams read whole, on phantoms that no single image can tell and on real mammograms: one command, resumable.

python benchmarks/sources.py WORK [--parts vendors one_view asymmetry real] [--json FILE]

All models of a part see the same batches of whole exams, whether or not they look at more than one image at a time. `data.exam_phantoms`
says what its designs are. `real` is rsna_640 by `vitmodel etl`, in patient-wise folds, every score out of fold. There the presence of the
other breast tells the label (docs/LOG.md), so each breast is shown alone, in one CC and one MLO image. The controls say what is left to
count: the number of images and of breasts, the machine, and the same fusion on crops that are all alike, of these exams and of the exams
as they came.

A row is an AUROC over images, each with the label of its breast and, but for "single image", the score of its breast. In the designs every
breast has two images, so that this is the breast's AUROC, and each row can be compared with the one above it. Intervals are of resampled
patients. A second start does only what is missing: what a model says is a file in WORK.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from vitmodel.cli import main as vitmodel
from vitmodel.config import AugmentConfig, Size
from vitmodel.data.dataset import read_crop
from vitmodel.data.exam_phantoms import draw_exam, write_exams
from vitmodel.data.manifest import breast_ids, read_manifest, usable
from vitmodel.data.panel import tile
from vitmodel.data.splits import assign_folds
from vitmodel.data.transforms import Augmentation
from vitmodel.measure.bootstrap import Interval
from vitmodel.measure.compare import compare
from vitmodel.measure.metrics import measure
from vitmodel.measure.sample import Sample
from vitmodel.model.architecture import PRESETS, ExamConfig, NetworkConfig, SourcesConfig, Vocabulary
from vitmodel.model.fusion import breasts
from vitmodel.model.losses import bce
from vitmodel.model.network import Logits, Network
from vitmodel.model.optimisation import parameter_groups, warmup_cosine
from vitmodel.model.packing import About, pack
from vitmodel.utils import atomic_path, progress, seed_from, to_json, write_atomic

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SIZE = Size(128, 64)
TRUNK = replace(PRESETS["vit_micro"], image_size=SIZE)
PATIENTS = {"train": 500, "val": 50, "test": 300}
FOLDS = 5
BATCH = 32  # images in a step, about
LR = 1e-3
SHARED = 0.2  # source dropout: how often an image goes the way of an unknown source


@dataclass(frozen=True)
class Model:
    """What stands around the trunk."""

    sources: tuple[str, ...] = ()
    fusion: bool = False
    asymmetry: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a part's table."""

    title: str
    model: str
    level: str = "breast"
    """Whose score an image has: its own (`image`) or its breast's."""


@dataclass(frozen=True)
class Part:
    """What is trained, and what stands in the table."""

    models: Mapping[str, Model]
    rows: tuple[Row, ...]
    machines: Mapping[str, str]
    """Subsets of the rows by title; an empty one is all."""
    epochs: int
    augment: AugmentConfig | None


PARTS = {
    "vendors": Part(
        {"pooled": Model(), "sources": Model(("machine_id",))},
        (Row("pooled", "pooled"), Row("sources", "sources")),
        {"machines A and B": "AB", "machine C, unseen": "C"},
        16,
        None,
    ),
    "one_view": Part(
        {"image": Model(), "fusion": Model(fusion=True)},
        (Row("single image", "image", "image"), Row("mean of views", "image"), Row("fusion", "fusion")),
        {"": ""},
        16,
        None,
    ),
    "asymmetry": Part(
        {"image": Model(), "breast": Model(fusion=True, asymmetry=False), "exam": Model(fusion=True)},
        (
            Row("single image", "image", "image"),
            Row("mean of views", "image"),
            Row("fusion of one breast's views", "breast"),
            Row("fusion of both breasts", "exam"),
        ),
        {"": ""},
        16,
        None,
    ),
}
PARTS["real"] = Part(
    {
        "image": Model(),
        "fusion": Model(fusion=True, asymmetry=False),
        "sources": Model(("view", "machine_id"), fusion=True, asymmetry=False),
    },
    (
        Row("single image", "image", "image"),
        Row("mean of views", "image"),
        Row("fusion", "fusion"),
        Row("fusion + sources", "sources"),
    ),
    {"": ""},
    8,
    AugmentConfig(),
)


@dataclass(frozen=True)
class Exams:
    """Crops in memory and their table."""

    table: pd.DataFrame
    crops: np.ndarray  # N H W uint8

    @property
    def labels(self) -> torch.Tensor:
        return torch.from_numpy(self.table["cancer"].to_numpy(np.float32))

    def groups(self, order: np.random.Generator | None = None) -> Iterator[list[int]]:
        """Rows of whole exams, some `BATCH` images at a time; in the order of the table or in a random one."""
        exams = list(self.table.groupby("patient_id", sort=False).indices.values())
        rows: list[int] = []
        for number in range(len(exams)) if order is None else order.permutation(len(exams)):
            rows += exams[number].tolist()
            if len(rows) >= BATCH:
                yield rows
                rows = []
        if rows:
            yield rows

    def part(self, rows: np.ndarray) -> Exams:
        """The images in `rows` (N, bool)."""
        return Exams(self.table[rows].reset_index(drop=True), self.crops[rows])


def read(table: pd.DataFrame) -> Exams:
    table = table.assign(breast=breast_ids(table)).reset_index(drop=True)
    return Exams(table, np.stack([read_crop(path) for path in table["path"]]))


def vocabulary(table: pd.DataFrame, column: str) -> Vocabulary:
    return Vocabulary(column, tuple(sorted(table[column].dropna().unique())))


def build(model: Model, train: Exams) -> Network:
    sources = SourcesConfig(columns=tuple(vocabulary(train.table, column) for column in model.sources)) if model.sources else None
    exam = ExamConfig(views=vocabulary(train.table, "view"), asymmetry=model.asymmetry) if model.fusion else None
    return Network(NetworkConfig(vit=TRUNK, sources=sources, exam=exam))


def say(
    network: Network, exams: Exams, rows: list[int], augment: AugmentConfig | None, rng: np.random.Generator
) -> tuple[Logits, Sequence[About]]:
    """What the network says of a step's images, and what is known of each; in training an image may be changed, and its source unknown."""
    config = network.config
    patients, sides = (pd.factorize(exams.table[column].iloc[rows])[0].tolist() for column in ("patient_id", "breast"))
    about = []
    for patient, breast, (_, known) in zip(patients, sides, exams.table.iloc[rows].iterrows(), strict=True):
        sources = tuple(column.index(known[column.column]) for column in (config.sources.columns if config.sources else ()))
        if network.training:
            sources = tuple(0 if rng.random() < SHARED else source for source in sources)
        about.append(About(sources=sources, view=config.exam.views.index(known["view"]) if config.exam else 0, breast=breast, exam=patient))
    crops = [crop.astype(np.float32) / 255 for crop in exams.crops[rows]]
    crops = crops if augment is None else [Augmentation.sample(augment, rng).apply(crop) for crop in crops]
    return network(pack([torch.from_numpy(crop)[None] for crop in crops], config.vit.patch, about=about)), about


def known_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over what has a label."""
    known = ~labels.isnan()
    return bce()(logits[known], labels[known]).sum() / known.sum().clamp(min=1)


def fit(model: Model, train: Exams, part: Part, what: str) -> Network:
    """Images and, with a fusion, breasts have a loss each."""
    seed = seed_from(what)
    torch.manual_seed(seed)
    network, labels, rng = build(model, train).train(), train.labels, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(parameter_groups(network, LR, 0.05), lr=LR, fused=True)
    steps = [rows for _ in range(part.epochs) for rows in train.groups(rng)]
    for step, rows in enumerate(progress(steps, what, total=len(steps), unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = LR * warmup_cosine(step / len(steps), 0.1)
        said, about = say(network, train, rows, part.augment, rng)
        loss = known_loss(said.images[:, 0], labels[rows])
        if said.breasts is not None:
            loss = loss + known_loss(said.breasts, labels[[rows[breast[0]] for breast in breasts(about)]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network


def score(network: Network, exams: Exams) -> pd.DataFrame:
    """Probabilities by row: `image_score`, its own, and `breast_score`, its breast's, without a fusion the mean of its images'."""
    network.eval()
    scores = pd.DataFrame(index=exams.table.index, columns=["image_score", "breast_score"], dtype=float)
    with torch.inference_mode():
        for rows in exams.groups():
            said, about = say(network, exams, rows, None, np.random.default_rng(0))
            scores.loc[rows, "image_score"] = expit(said.images[:, 0].numpy())
            if said.breasts is not None:
                for logit, breast in zip(said.breasts.numpy(), breasts(about), strict=True):
                    scores.loc[[rows[place] for place in breast], "breast_score"] = expit(logit)
    return scores.fillna({"breast_score": scores["image_score"].groupby(exams.table["breast"]).transform("mean")})


def real_crops(work: Path) -> pd.DataFrame:
    """The labelled crops of rsna_640, made by ETL where they are missing."""
    folder = work / f"rsna_640_{SIZE}"
    if not (folder / "manifest.csv").exists():
        vitmodel(["etl", str(DATA / "rsna_640"), str(folder), "--size", str(SIZE), "--jobs", "1"])
    table = usable(read_manifest(folder / "manifest.csv")).dropna(subset=["cancer"])
    return assign_folds(table[table["view"].isin(["CC", "MLO"])], FOLDS)


def one_of_each_view(table: pd.DataFrame) -> pd.DataFrame:
    """The first CC and the first MLO image of every breast that has both."""
    table = table.assign(breast=breast_ids(table)).drop_duplicates(["breast", "view"])
    return table[table.groupby("breast")["view"].transform("size") == 2]


def blank(exams: Exams) -> Exams:
    """The same exams, all crops alike: what a model then tells, it tells from their number and their views."""
    return Exams(exams.table, np.full_like(exams.crops, 128))


def once(path: Path, train: Exams, test: Exams, model: Model, part: Part) -> pd.DataFrame:
    """What the model says of `test`, from the file that an earlier start left or from a training."""
    if not path.exists():
        what = f"{path.parent.name} {path.stem}"
        began, cpu = time.perf_counter(), time.process_time()
        network = fit(model, train, part, what)
        said = test.table[["image_id", "patient_id", "breast", "machine_id", "cancer"]].join(score(network, test))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            said.assign(cpu_s=time.process_time() - cpu, wall_s=time.perf_counter() - began).to_csv(temporary, index=False)
    return pd.read_csv(path, dtype={"image_id": str, "patient_id": str, "breast": str, "machine_id": str})


def scored(name: str, work: Path) -> dict[str, pd.DataFrame]:
    """By model of a part, what it says of the held-out images whose label is known."""
    part, folder = PARTS[name], work / name
    if name == "real":
        exams = read(one_of_each_view(real_crops(work)))
        return {key: out_of_fold(exams, folder / key, model, part) for key, model in part.models.items()}
    manifest = folder / "manifest.csv"
    table = read_manifest(manifest if manifest.exists() else write_exams(folder, name, PATIENTS, SIZE))  # type: ignore[arg-type]
    train, test = (read(table[table["split"] == split]) for split in ("train", "test"))
    said = {key: once(folder / f"{key}.csv", train, test, model, part) for key, model in part.models.items()}
    return {key: each.dropna(subset=["cancer"]).reset_index(drop=True) for key, each in said.items()}


def out_of_fold(exams: Exams, folder: Path, model: Model, part: Part) -> pd.DataFrame:
    """What models that did not learn from its fold say of each image."""
    held = [(exams.table["fold"] == fold).to_numpy() for fold in range(FOLDS)]
    parts = [once(folder / f"{fold}.csv", exams.part(~rows), exams.part(rows), model, part) for fold, rows in enumerate(held)]
    return pd.concat(parts, ignore_index=True)


def auroc(table: pd.DataFrame, scores: pd.Series) -> Interval:
    return measure(Sample(table["cancer"], scores, table["patient_id"]), 0.5).intervals["auroc"]


def gain(table: pd.DataFrame, first: pd.Series, second: pd.Series) -> Interval:
    samples = [Sample(table["cancer"], scores, table["patient_id"]) for scores in (first, second)]
    return compare(samples[0], samples[1], (0.5, 0.5)).differences["auroc"]


def lines_of(name: str, work: Path) -> Iterator[dict[str, Any]]:
    """The table of a part."""
    part, said = PARTS[name], scored(name, work)
    for title, machines in part.machines.items():
        before: pd.Series | None = None
        for row in part.rows:
            table = said[row.model]
            table = table[table["machine_id"].isin(list(machines))] if machines else table
            line: dict[str, Any] = {"part": name, "subset": title, "row": row.title, "breasts": table["breast"].nunique()}
            line |= {"positive": int(table.drop_duplicates("breast")["cancer"].sum()), "cpu_s": float(table["cpu_s"].iloc[0])}
            line["auroc"] = auroc(table, table[f"{row.level}_score"])
            line["gain"] = None if before is None else gain(table, before, table[f"{row.level}_score"])
            before = table[f"{row.level}_score"]
            yield line


def controls(work: Path) -> Iterator[dict[str, Any]]:
    """What is left to count on the real exams, and what there was: AUROC per breast of things that are no pixels."""
    came, chosen = (read(table) for table in (real_crops(work), one_of_each_view(real_crops(work))))
    alike = replace(PARTS["real"], epochs=2)
    for subset, exams, asymmetry in (("as they came", came, True), ("one CC, one MLO, one breast", chosen, False)):
        table = exams.table
        sizes = table.groupby("breast")["breast"].transform("size") / 10
        others = table.groupby("patient_id")["breast"].transform("nunique") / 10
        said = out_of_fold(blank(exams), work / "real" / f"blank_{subset.split()[0]}", Model(fusion=True, asymmetry=asymmetry), alike)
        tried = {
            "number of images": (table, sizes),
            "number of breasts": (table, 1 - others),
            "machine": (table, prevalence_of_machine(table)),
        }
        for what, (rows, scores) in (tried | {"fusion of blank crops": (said, said["breast_score"])}).items():
            breasts_alone = ~rows["breast"].duplicated()
            yield {"part": "real", "subset": subset, "row": what, "auroc": auroc(rows[breasts_alone], scores[breasts_alone])}


def prevalence_of_machine(table: pd.DataFrame) -> pd.Series:
    """The share of cancers on the image's machine in the other folds."""
    scores = pd.Series(0.0, index=table.index)
    for fold in range(FOLDS):
        held = table["fold"] == fold
        rates = table[~held].groupby("machine_id")["cancer"].mean()
        scores[held] = table.loc[held, "machine_id"].map(rates).fillna(table.loc[~held, "cancer"].mean())
    return scores


def picture() -> np.ndarray:
    """One exam of each design, four images in a row, with what is known of each breast."""
    sick, healthy = {"L": True, "R": False}, {"L": False, "R": False}
    cases = [("vendors", sick, "A"), ("vendors", sick, "B"), ("one_view", sick, "A"), ("asymmetry", sick, "A"), ("asymmetry", healthy, "A")]
    crops, captions = [], []
    for design, sides, machine in cases:
        exam = draw_exam(design, 3, sides, machine)  # type: ignore[arg-type]
        for (side, view), crop in exam.crops(Size(192, 128)).items():
            crops.append(crop)
            captions.append(f"{side} {view} " + {0.0: "benign", 1.0: "CANCER"}.get(exam.labels[side], "unknown"))
        captions[-4] = (f"{design} {machine}: " if design == "vendors" else f"{design}: ") + captions[-4]
    return tile(crops, captions, columns=4)


def show(lines: list[dict[str, Any]]) -> None:
    print("| part | subset | row | breasts (cancers) | AUROC | gain over the row above | CPU s |\n|---|---|---|---|---|---|---|")
    for line in lines:
        counts = f"{line['breasts']} ({line['positive']})" if "breasts" in line else ""
        cells = [line["part"], line["subset"], line["row"], counts, line["auroc"], line.get("gain") or "", f"{line.get('cpu_s', 0):.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(1)
    write_atomic(arguments.work / "exams.png", cv2.imencode(".png", picture())[1].tobytes())
    lines: list[dict[str, Any]] = []
    for name in arguments.parts:
        lines += lines_of(name, arguments.work)
        if name == "real":
            lines += controls(arguments.work)
    show(lines)
    if arguments.json:
        plain = [{key: asdict(value) if isinstance(value, Interval) else value for key, value in line.items()} for line in lines]
        write_atomic(arguments.json, to_json(plain))


if __name__ == "__main__":
    main()
