"""Stage: model package -> ONNX file, in 32 bits or 8, held to the package's own logits. Knows no graph: model/runtime.py writes it."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))

import numpy as np
import torch

from vitmodel.config import ExportConfig, PredictorConfig
from vitmodel.data.manifest import read_manifest, usable
from vitmodel.data.rows import rows_of
from vitmodel.model.package import TENSORS
from vitmodel.model.packing import Pack, forward, pack
from vitmodel.model.runtime import export_onnx, load_onnx, quantize
from vitmodel.predictor import Predictor
from vitmodel.utils import UsageError, VitmodelError, progress, sha256_file

TOLERANCE = 1e-4  # between logits of torch and of ONNX Runtime, in 32 bits


def export(config: ExportConfig) -> None:
    """Write OUT and say by how much its logits differ from the package's. Raises VitmodelError where 32 bits differ at all."""
    predictor = Predictor(PredictorConfig(package=config.package, device="cpu"))
    if predictor.preprocessing.mm_per_pixel is not None:
        raise UsageError(f"{config.package}: its crops have many sizes (mm_per_pixel), an ONNX file has one; run it by --runtime torch")
    network, models = predictor.model, [member.trunk for member in predictor.members[0].models]
    if network.sources or network.exam or network.segments:
        raise UsageError(
            f"{config.package}: has sources, segments or the fusion of exams, an ONNX file holds a ViT alone; run it by --runtime torch"
        )
    weights = sha256_file(config.package / TENSORS)
    if config.precision == "fp32":
        export_onnx(models, config.out, weights)
        crops = noise(predictor)
    else:
        crops = calibration_crops(predictor, config)
        quantize(models, config.out, crops, weights)
    exported = load_onnx(config.out, "onnx", weights)
    with torch.inference_mode():
        own = [torch.stack([forward(model, each) for model in models]).mean(dim=0) for each in crops]
        difference = torch.cat([exported(each) - logits for each, logits in zip(crops, own, strict=True)]).abs()
    print(f"{config.out}: on {len(crops)} images its logits differ by {difference.mean():.1e} on average, {difference.max():.1e} at most")
    if config.precision == "fp32" and not difference.max() <= TOLERANCE:
        raise VitmodelError(f"{config.out}: its logits differ by more than {TOLERANCE} from the package's; do not use it")


def noise(predictor: Predictor) -> list[Pack]:
    """Images of noise, the lower half of each air."""
    model = predictor.model.config.vit
    images = torch.rand(4, model.channels, *model.image_size, generator=torch.Generator().manual_seed(0))
    images[:, :, model.image_size.height // 2 :] = 0
    return [pack([image], model.patch, air=not predictor.packed) for image in images]


def calibration_crops(predictor: Predictor, config: ExportConfig) -> list[Pack]:
    """Crops spread over the manifest's usable rows, but not those of test patients. Raises UsageError where there are none."""
    if config.calibration is None:
        raise UsageError("calibration: int8 needs a manifest of crops, such as RUN/manifest.csv, to see which values occur")
    table = usable(read_manifest(config.calibration))
    table = table[table["split"] != "test"]
    chosen = table.iloc[np.unique(np.linspace(0, len(table) - 1, config.images).round().astype(int))] if len(table) else table
    crops = [predictor.load(row).pack for row in progress(rows_of(chosen), "calibrate")]
    found = [crop for crop in crops if crop is not None]
    if not found:
        raise UsageError(f"{config.calibration}: has no usable crop outside of the split test")
    return found
