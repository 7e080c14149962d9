"""Stage: model package -> ONNX file, in 32 bits or 8, held to the package's own logits. Knows no graph: model/onnx.py writes it."""

from dataclasses import replace

import numpy as np
import torch

from vitmodel.config import ExportConfig, PredictorConfig, Size
from vitmodel.data.exams import about_images
from vitmodel.data.manifest import read_manifest, usable
from vitmodel.data.rows import rows_of
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.onnx import Encoder, KeptPatches, export_onnx, inputs_of_encoder, inputs_of_images, quantize
from vitmodel.model.package import TENSORS
from vitmodel.model.packed_batch import About, Pack, pack
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import progress, sha256_file

TOLERANCE = 1e-4  # between logits of torch and of ONNX Runtime, in 32 bits


def export(config: ExportConfig) -> None:
    """Write OUT and say by how much its logits differ from the package's. Raises VitmodelError where 32 bits differ at all."""
    predictor = Predictor(PredictorConfig(package=config.package, device="cpu"))
    member, weights = predictor.ensemble.members[0], sha256_file(config.package / TENSORS)
    crops = noise(predictor) if config.precision == "fp32" else calibration_crops(predictor, config)
    paths = member.onnx_files(config.out)
    graphs: list[KeptPatches | Encoder] = [Encoder(each) for each in member.models]
    if member.one_graph:
        graphs = [KeptPatches([each.trunk for each in member.models])]
    for number, (graph, path) in enumerate(zip(graphs, paths, strict=True)):
        if config.precision == "fp32":
            export_onnx(graph, path, weights)
        else:
            inputs = inputs_of_images(crops) if member.one_graph else inputs_of_encoder(member.models[number], crops)
            quantize(graph, path, inputs, weights)
    with torch.inference_mode():
        own = np.concatenate([member.logits(each) for each in crops])
        member.run_by("onnx", config.out)
        difference = np.abs(np.concatenate([member.logits(each) for each in crops]) - own)
    written = " and ".join(map(str, paths))
    print(f"{written}: on {len(crops)} images the logits differ by {difference.mean():.1e} on average, {difference.max():.1e} at most")
    if config.precision == "fp32" and not difference.max() <= TOLERANCE:
        raise VitmodelError(f"{written}: logits differ by more than {TOLERANCE} from the package's; do not use it")


def noise(predictor: Predictor) -> list[Pack]:
    """Images of noise, the lower half of each air, twice as high as a segment where the network reads in segments, and of any source."""
    model = predictor.ensemble.model.config
    height, width = model.vit.image_size
    size = Size(2 * height, width) if model.segments else Size(height, width)
    images = torch.rand(4, model.vit.channels, *size, generator=torch.Generator().manual_seed(0))
    images[:, :, size.height // 2 :] = 0
    columns = model.sources.columns if model.sources else ()
    about = [About(sources=tuple(number % len(column) for column in columns)) for number in range(len(images))]
    air = not predictor.ensemble.packed
    return [pack([image], model.vit.patch, air=air, about=[known]) for image, known in zip(images, about, strict=True)]


def calibration_crops(predictor: Predictor, config: ExportConfig) -> list[Pack]:
    """Crops spread over the manifest's usable rows, but not those of test patients. Raises UsageError where there are none."""
    if config.calibration is None:
        raise UsageError("calibration: int8 needs a manifest of crops, such as RUN/manifest.csv, to see which values occur")
    table = usable(read_manifest(config.calibration))
    table = table[table["split"] != "test"]
    chosen = table.iloc[np.unique(np.linspace(0, len(table) - 1, config.images).round().astype(int))] if len(table) else table
    alone = [replace(about, breast=-1, exam=-1) for about in about_images(chosen, predictor.ensemble.model.config)]
    rows = zip(progress(rows_of(chosen), "calibrate"), alone, strict=True)
    found = [crop for crop in (predictor.stream.load(*each).pack for each in rows) if crop is not None]
    if not found:
        raise UsageError(f"{config.calibration}: has no usable crop outside of the split test")
    return found
