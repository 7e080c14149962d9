"""The command `export`: write a model package as ONNX, in 32 or 8 bits, and compare its logits with the package's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vitmodel.config import ExportConfig, PredictorConfig, Size
from vitmodel.data.exams import image_metadata
from vitmodel.data.manifest import read_manifest, usable_rows
from vitmodel.data.rows import to_manifest_rows
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.onnx import EncoderGraph, ViTGraph, export_onnx, image_inputs, quantize, record_encoder_inputs
from vitmodel.model.package import TENSORS_FILE
from vitmodel.model.package_check import record_file
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, pack_images
from vitmodel.scoring.loaded_package import LoadedPackage
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import progress, sha256_file

TOLERANCE = 1e-4
"""Largest allowed difference of a logit between PyTorch and ONNX Runtime in 32 bits."""


def export(config: ExportConfig) -> None:
    """Write OUT and print how far its logits differ from the package's.

    Raises:
        UsageError: The extra `export` is not installed, or 8 bits have no crops to calibrate on.
        VitmodelError: In 32 bits, a logit differs by more than TOLERANCE.
    """
    predictor = Predictor(PredictorConfig(package=config.package, device="cpu"))
    member = predictor.ensemble.packages[0]
    packs = noise_packs(predictor) if config.precision == "fp32" else calibration_packs(predictor, config)
    write_graphs(member, packs, config)
    with torch.inference_mode():
        expected = np.concatenate([member.logits(pack) for pack in packs])
        member.use_onnx("onnx", config.out)
        difference = np.abs(np.concatenate([member.logits(pack) for pack in packs]) - expected)
    written = " and ".join(map(str, member.onnx_paths(config.out)))
    print(
        f"{written}: on {len(packs)} images the logits differ by {difference.mean():.1e} on average, "
        f"{difference.max():.1e} at most"
    )
    if config.precision == "fp32" and not difference.max() <= TOLERANCE:
        raise VitmodelError(
            f"{written}: logits differ by more than {TOLERANCE} from the package's; do not use this file"
        )


def write_graphs(member: LoadedPackage, packs: list[PackedBatch], config: ExportConfig) -> None:
    """Export or quantize each graph of the package; `packs` are what 8 bits are calibrated on."""
    weights = sha256_file(member.folder / TENSORS_FILE)
    graphs: list[ViTGraph | EncoderGraph] = [EncoderGraph(model) for model in member.models]
    if member.is_single_graph:
        auxiliary = [model.auxiliary for model in member.models if model.auxiliary is not None]
        graphs = [ViTGraph([model.trunk for model in member.models], auxiliary)]
    for number, (graph, path) in enumerate(zip(graphs, member.onnx_paths(config.out), strict=True)):
        if config.precision == "fp32":
            export_onnx(graph, path, weights)
        elif member.is_single_graph:
            quantize(graph, path, image_inputs(packs), weights)
        else:
            quantize(graph, path, record_encoder_inputs(member.models[number], packs), weights)
        if path.resolve().parent == config.package.resolve():
            record_file(config.package, path.name)


def noise_packs(predictor: Predictor) -> list[PackedBatch]:
    """Return images of noise to compare logits on.

    The lower half of each is air. They are twice as high as a segment if the network reads segments, and they cover
    several sources.
    """
    model = predictor.ensemble.model.config
    height, width = model.vit.image_size
    size = Size(2 * height, width) if model.segments else Size(height, width)
    images = torch.rand(4, model.vit.channels, *size, generator=torch.Generator().manual_seed(0))
    images[:, :, size.height // 2 :] = 0
    columns = model.sources.columns if model.sources else ()
    metadata = [
        ImageMetadata(sources=tuple(number % len(column) for column in columns)) for number in range(len(images))
    ]
    air = not predictor.ensemble.packed
    return [
        pack_images([image], model.vit.patch, air=air, metadata=[entry])
        for image, entry in zip(images, metadata, strict=True)
    ]


def calibration_packs(predictor: Predictor, config: ExportConfig) -> list[PackedBatch]:
    """Return crops spread evenly over the manifest's usable rows, without those of test patients.

    Raises:
        UsageError: There is no manifest or no such crop.
    """
    if config.calibration is None:
        raise UsageError(
            "calibration: int8 needs crops to measure the range of the activations; "
            "name their manifest, such as RUN/manifest.csv, with --calibration"
        )
    table = usable_rows(read_manifest(config.calibration))
    table = table[table["split"] != "test"]
    if len(table):
        positions = np.linspace(0, len(table) - 1, config.images).round().astype(int)
        table = table.iloc[np.unique(positions)]
    packs = []
    metadata = image_metadata(table, predictor.ensemble.model.config)
    for row, row_metadata in zip(progress(to_manifest_rows(table), "calibrate"), metadata, strict=True):
        pack = predictor.stream.load(row, replace(row_metadata, breast=-1, exam=-1)).pack  # each image by itself
        if pack is not None:
            packs.append(pack)
    if not packs:
        raise UsageError(
            f"{config.calibration}: has no usable crop outside the split test; name another manifest with --calibration"
        )
    return packs
