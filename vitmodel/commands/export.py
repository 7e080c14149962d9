"""Stage: model package -> ONNX file, in 32 bits or 8, held to the package's own logits. Knows no graph: model/onnx.py writes it."""

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
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, pack_images
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import progress, sha256_file

TOLERANCE = 1e-4  # between logits of torch and of ONNX Runtime, in 32 bits


def export(config: ExportConfig) -> None:
    """Write OUT and say by how much its logits differ from the package's. Raises VitmodelError where 32 bits differ at all."""
    predictor = Predictor(PredictorConfig(package=config.package, device="cpu"))
    member, weights = predictor.ensemble.packages[0], sha256_file(config.package / TENSORS_FILE)
    crops = noise_packs(predictor) if config.precision == "fp32" else calibration_crops(predictor, config)
    paths = member.onnx_paths(config.out)
    graphs: list[ViTGraph | EncoderGraph] = [EncoderGraph(each) for each in member.models]
    if member.is_single_graph:
        graphs = [ViTGraph([each.trunk for each in member.models])]
    for number, (graph, path) in enumerate(zip(graphs, paths, strict=True)):
        if config.precision == "fp32":
            export_onnx(graph, path, weights)
        else:
            inputs = (
                image_inputs(crops) if member.is_single_graph else record_encoder_inputs(member.models[number], crops)
            )
            quantize(graph, path, inputs, weights)
    with torch.inference_mode():
        own = np.concatenate([member.logits(each) for each in crops])
        member.use_onnx("onnx", config.out)
        difference = np.abs(np.concatenate([member.logits(each) for each in crops]) - own)
    written = " and ".join(map(str, paths))
    print(
        f"{written}: on {len(crops)} images the logits differ by {difference.mean():.1e} on average, {difference.max():.1e} at most"
    )
    if config.precision == "fp32" and not difference.max() <= TOLERANCE:
        raise VitmodelError(f"{written}: logits differ by more than {TOLERANCE} from the package's; do not use it")


def noise_packs(predictor: Predictor) -> list[PackedBatch]:
    """Images of noise, the lower half of each air, twice as high as a segment where the network reads in segments, and of any source."""
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
        pack_images([image], model.vit.patch, air=air, metadata=[known])
        for image, known in zip(images, metadata, strict=True)
    ]


def calibration_crops(predictor: Predictor, config: ExportConfig) -> list[PackedBatch]:
    """Crops spread over the manifest's usable rows, but not those of test patients. Raises UsageError where there are none."""
    if config.calibration is None:
        raise UsageError(
            "calibration: int8 needs a manifest of crops, such as RUN/manifest.csv, to see which values occur"
        )
    table = usable_rows(read_manifest(config.calibration))
    table = table[table["split"] != "test"]
    chosen = (
        table.iloc[np.unique(np.linspace(0, len(table) - 1, config.images).round().astype(int))]
        if len(table)
        else table
    )
    alone = [
        replace(metadata, breast=-1, exam=-1) for metadata in image_metadata(chosen, predictor.ensemble.model.config)
    ]
    rows = zip(progress(to_manifest_rows(chosen), "calibrate"), alone, strict=True)
    found = [crop for crop in (predictor.stream.load(*each).pack for each in rows) if crop is not None]
    if not found:
        raise UsageError(f"{config.calibration}: has no usable crop outside of the split test")
    return found
