"""Mammograms in every transfer syntax, through the node: stored byte for byte, and scored as `predict` scores them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden import make_decoders
from peers import MakeStudy
from pydicom import Dataset, Sequence, dcmwrite, uid
from pydicom.encaps import encapsulate
from pynetdicom import AE, _config
from pynetdicom.dsutils import split_dataset
from sqlalchemy import select

from vitmodel.cli import main
from vitmodel.config import NodeConfig
from vitmodel.node.audit import Audit
from vitmodel.node.fingerprint import package_fingerprint
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.models import Instance, Job
from vitmodel.node.receiving import Listener, Receiver
from vitmodel.node.scoring import Scorer
from vitmodel.pixels.decoding import DECODERS
from vitmodel.pixels.pixel_format import PixelFormat

BITS = 12


@pytest.fixture
def port(sqlite: Inbox) -> Iterator[int]:
    receiver = Receiver(sqlite, Listener(port=0), Audit(sqlite.database), lambda report: None)
    yield receiver.start()
    receiver.stop()


def with_pixels(image: Dataset, pixels: np.ndarray, syntax: str, photometric: str = "MONOCHROME2") -> Dataset:
    """Return the image with other pixels of 12 bits, or of 8 bits for JPEG Baseline, in a transfer syntax."""
    stored = 8 if syntax == uid.JPEGBaseline8Bit else BITS
    allocated = 8 if stored == 8 else 16
    pixels = (pixels >> (BITS - stored)).astype(f"uint{allocated}")
    pixel_format = PixelFormat(str(syntax), *pixels.shape, allocated, stored, False, photometric)
    frame, _ = make_decoders.encode(pixel_format, pixels)
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = allocated, stored, stored - 1, 0
    image.PhotometricInterpretation = photometric
    image.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    for keyword in ("WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept"):
        if keyword in image:
            del image[keyword]
    is_encapsulated = uid.UID(syntax).is_encapsulated
    image.PixelData = encapsulate([frame]) if is_encapsulated else frame
    image["PixelData"].VR = "OB" if is_encapsulated else "OW"
    image.file_meta.TransferSyntaxUID = syntax
    return image


def with_lut(image: Dataset) -> Dataset:
    """Return the image with a VOI LUT Sequence: a sigmoid."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [1 << BITS, 0, 16])
    values = 65535 / (1 + np.exp(-np.linspace(-6, 6, 1 << BITS)))
    item.add_new("LUTData", "OW", values.astype("<u2").tobytes())
    image.VOILUTSequence = Sequence([item])
    return image


def variants(make_study: MakeStudy, phantom_pixels: np.ndarray) -> Iterator[Dataset]:
    """Yield one patient's images in every transfer syntax, one as MONOCHROME1 and one with a VOI LUT Sequence."""
    images = iter(make_study((("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")) * 6))
    for syntax in DECODERS:
        yield with_pixels(next(images), phantom_pixels, syntax)
    inverted = ((1 << BITS) - 1) - phantom_pixels
    yield with_pixels(next(images), inverted, uid.ExplicitVRLittleEndian, "MONOCHROME1")
    yield with_lut(with_pixels(next(images), phantom_pixels, uid.ExplicitVRLittleEndian))


def data_set_bytes(path: Path) -> bytes:
    """Return what follows the file meta information: what C-STORE transfers."""
    return path.read_bytes()[split_dataset(path)[1] :]


def test_every_syntax_is_stored_byte_for_byte_and_scored_as_predict_does(
    sqlite: Inbox, port: int, run: Path, make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("dcmcjpeg") is None:
        pytest.skip("dcmcjpeg is not installed (Debian package dcmtk)")
    (plain,) = make_study((("L", "CC"),))
    pixels = plain.pixel_array
    pixels = (pixels.astype(float) / pixels.max() * ((1 << BITS) - 1)).astype("uint16")
    monkeypatch.setattr(make_decoders, "ROWS", pixels.shape[0])
    monkeypatch.setattr(make_decoders, "COLUMNS", pixels.shape[1])
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # send the bytes of the file
    (tmp_path / "sent").mkdir()
    sent: dict[str, Path] = {}
    for image in variants(make_study, pixels):
        path = tmp_path / "sent" / f"{image.SOPInstanceUID}.dcm"
        dcmwrite(path, image, enforce_file_format=True)
        client = AE("MODALITY")
        client.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
        association = client.associate("127.0.0.1", port, ae_title="VITMODEL")
        assert association.send_c_store(path).Status == 0
        association.release()
        sent[str(image.SOPInstanceUID)] = path
    assert len(sent) == len(DECODERS) + 2
    with sqlite.database.read() as session:
        instances = {instance.sop_uid: instance for instance in session.scalars(select(Instance))}
    assert {instance.syntax for instance in instances.values()} == set(DECODERS)
    for sop_uid, path in sent.items():
        assert data_set_bytes(sqlite.folder / instances[sop_uid].path) == data_set_bytes(path), instances[
            sop_uid
        ].syntax

    config = NodeConfig(
        action="run",
        package=run / "package",
        folder=sqlite.folder,
        device="cpu",
        workers=1,
        dicom=("sr",),
        explain=None,
    )
    queue = Queue(sqlite.database)
    queue.gather(GatheringRules(), package_fingerprint(config), force=True)
    assert Scorer(config, queue, "worker").score_next()
    with sqlite.database.read() as session:
        (job,) = session.scalars(select(Job))
    got = {row["image_id"]: row for row in json.loads(job.scores)["images"]}
    assert main(["predict", str(config.package), str(tmp_path / "sent"), str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "scores.csv").open() as file:
        expected = {row["image_id"]: row for row in csv.DictReader(file)}
    assert got.keys() == expected.keys() == sent.keys()
    for sop_uid, row in expected.items():
        syntax = instances[sop_uid].syntax
        assert row["status"] != "refused", (syntax, row["reason"])
        assert got[sop_uid]["probability"] == pytest.approx(float(row["probability"]), abs=1e-7), syntax
