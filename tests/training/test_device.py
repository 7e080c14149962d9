"""Computing on another device gives the same results as on the CPU, and no operation mixes tensors of two devices.

No GPU is needed. The other device is simulated: its tensors report PyTorch's device `meta` and hold their data on the
CPU. An operation on tensors of both devices is an error, as on CUDA, where only scalars and indices may come from the
CPU. What only a GPU has (its kernels, 16-bit arithmetic, speed) is not tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vitmodel.cli import main
from vitmodel.config import PredictorConfig
from vitmodel.data.manifest import read_manifest, usable_rows
from vitmodel.model.package import TENSORS_FILE
from vitmodel.scoring.predictor import Predictor

AWAY = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class AwayTensor(Tensor):
    """A tensor on the simulated device, and the CPU tensor with its data."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data_on_cpu: Tensor) -> AwayTensor:
        properties: dict[str, Any] = {
            "strides": data_on_cpu.stride(),
            "storage_offset": data_on_cpu.storage_offset(),
            "dtype": data_on_cpu.dtype,
            "device": AWAY,
        }
        away: AwayTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data_on_cpu.shape, **properties
        )
        away.data_on_cpu = data_on_cpu
        return away

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("a tensor of the simulated device was used outside SimulatedDevice")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__format__, Tensor.__reduce_ex__):  # printing and saving
            return function(args[0].data_on_cpu, *args[1:])
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            # PyTorch itself would convert a list to an index on `meta`, which has no data.
            args = (args[0], lists_to_tensors(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def lists_to_tensors(index: Any) -> Any:
    """Return an index with its lists converted to tensors."""
    if isinstance(index, tuple):
        return tuple(map(lists_to_tensors, index))
    return torch.as_tensor(index) if isinstance(index, list) else index


class SimulatedDevice(TorchDispatchMode):
    """Context in which tensors can be moved to and created on `AWAY`; the CPU computes with them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            assert isinstance(tensor, AwayTensor) or tensor.device != AWAY, f"{function}: a tensor without data"
        away = {id(tensor.data_on_cpu): tensor for tensor in tensors if isinstance(tensor, AwayTensor)}
        device = kwargs.get("device")
        if not away and device != AWAY:
            return function(*args, **kwargs)
        if function not in COPIES:
            check_devices(function, args, tensors)
        result = function(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        if function is aten.copy_.default:
            return args[0]
        if device is not None and device != AWAY:
            return result

        def to_away(leaf: Any) -> Any:
            if id(leaf) in away:  # an in-place operation returns its own argument
                return away[id(leaf)]
            return AwayTensor(leaf) if isinstance(leaf, Tensor) else leaf

        return tree_map(to_away, result)


def check_devices(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise AssertionError if `tensors` are on two devices. Scalars and indices may be on the CPU, as on CUDA."""
    is_indexing = function in INDEXING and isinstance(args[0], AwayTensor)
    indices = [id(leaf) for leaf in tree_leaves(args[1])] if is_indexing else []
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, AwayTensor)]
    mixed = [tuple(tensor.shape) for tensor in on_cpu if tensor.dim() and id(tensor) not in indices]
    assert not mixed, f"{function}: tensors on two devices, those on the CPU have shapes {mixed}"


def to_cpu(leaf: Any) -> Any:
    """Return the CPU tensor of a tensor on `AWAY`, and the CPU for the device itself."""
    if isinstance(leaf, AwayTensor):
        return leaf.data_on_cpu
    return torch.device("cpu") if leaf == AWAY else leaf


@pytest.fixture
def simulated_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let training and prediction use the simulated device."""
    tensor = torch.tensor

    def make_tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:  # torch's result would have no data
        return tensor(*args, device=None if device == AWAY else device, **kwargs).to(device or "cpu")

    monkeypatch.setattr(torch, "tensor", make_tensor)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # wrapper subclasses do not support inference mode
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda *_: None)
    monkeypatch.setattr("vitmodel.training.trainer.resolve_strategy", lambda _: SingleDeviceStrategy(AWAY))
    for module in ("vitmodel.training.fit", "vitmodel.scoring.ensemble"):
        monkeypatch.setattr(f"{module}.resolve_device", lambda _: AWAY)
    with SimulatedDevice():
        yield


def test_mixing_tensors_of_two_devices_is_an_error(simulated_device: None) -> None:
    on_cpu = torch.arange(3.0)
    away = on_cpu.to(AWAY)
    assert away.device == AWAY
    assert (2 * away + on_cpu[1]).cpu().tolist() == [1, 3, 5]
    assert away[torch.tensor([2, 0])].cpu().tolist() == [2, 0]
    for mix in (
        lambda: away + on_cpu,
        lambda: torch.cat([away, on_cpu]),
        lambda: on_cpu[away.long()],
        lambda: on_cpu.add_(away),
    ):
        with pytest.raises(AssertionError, match="two devices"):
            mix()
    with pytest.raises(RuntimeError, match="numpy"):
        away.numpy()


RECIPES = [
    ("--stem conv --ema 0.9 --auxiliary [view,age] --loss focal --epochs 1", "rollout"),
    pytest.param(
        "--pool attention --checkpointing true --loss pf1 --optimizer sgd --freeze 1 --accumulate 2 --epochs 2",
        "occlusion",
        marks=pytest.mark.slow,
    ),
    (
        "--fusion true --asymmetry true --sources site_id,machine_id --source-images 1 --tokens 1000 --epochs 1",
        "gradient",
    ),
    pytest.param("--segments 256 --epochs 1", "integrated", marks=pytest.mark.slow),
]


def logits_and_heat_map(package: Path, images: pd.DataFrame, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a package's logits of images, and its heat map of the first image."""
    predictor = Predictor(PredictorConfig(package=package, flip=True, jobs=1))
    rows = predictor.attach(images)
    logits = predictor.predict_logits(rows)[1]
    return logits, predictor.explain(predictor.stream.load(rows.rows[0]), method)


@pytest.mark.parametrize(("recipe", "method"), RECIPES)
def test_another_device_gives_the_same_weights_scores_and_maps(
    recipe: str, method: str, crops: Path, flags: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    table = str(crops / "manifest.csv")
    options = [*flags, "--device", "cpu", *recipe.split()]
    if "--segments" in options:  # segments have a token budget of their own
        del options[options.index("--tokens") : options.index("--tokens") + 2]
    package = tmp_path / "cpu" / "package"
    images = usable_rows(read_manifest(crops / "manifest.csv"))[:8]
    assert main(["train", table, str(tmp_path / "cpu"), *options]) == 0
    logits, heat = logits_and_heat_map(package, images, method)

    request.getfixturevalue("simulated_device")
    assert main(["train", table, str(tmp_path / "away"), *options]) == 0
    trained = load_file(tmp_path / "away" / "package" / TENSORS_FILE)
    for name, tensor in load_file(package / TENSORS_FILE).items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    logits_away, heat_away = logits_and_heat_map(package, images, method)
    np.testing.assert_allclose(logits_away, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(heat_away, heat, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("verb", ["train", "predict", "evaluate"])
def test_an_absent_gpu_is_a_usage_error(
    verb: str, run: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(crops / "manifest.csv")
    inputs = [table] if verb == "train" else [str(run / "package"), table]
    assert main([verb, *inputs, str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "no CUDA device is available; use --device cpu" in capsys.readouterr().err
