"""The network in a memory of its own, as on a GPU: what is computed there is what is computed here, and nothing mixes the two.

No GPU is needed. The other memory is made up: its tensors say that they lie on PyTorch's device `meta`, and keep their data here. An
operation on tensors of both memories is an error, as on CUDA, where single numbers and indices alone may come from here. What only a GPU
has (its kernels, its 16 bits, its speed) is not tested.
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


class Away(Tensor):
    """A tensor in the other memory, and what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        form: dict[str, Any] = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
            "device": AWAY,
        }
        away: Away = Tensor._make_wrapper_subclass(cls, held.shape, **form)  # type: ignore[attr-defined]
        away.held = held
        return away

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("nobody has entered OtherMemory")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__format__, Tensor.__reduce_ex__):  # to print and to save it
            return function(args[0].held, *args[1:])
        if function in (
            Tensor.__getitem__,
            Tensor.__setitem__,
        ):  # PyTorch itself would make an index of a list on `meta`, without data
            args = (args[0], listed(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def listed(index: Any) -> Any:
    """An index with tensors in place of lists."""
    if isinstance(index, tuple):
        return tuple(map(listed, index))
    return torch.as_tensor(index) if isinstance(index, list) else index


class OtherMemory(TorchDispatchMode):
    """While it is entered, tensors can be moved to `AWAY` and made there, and are computed with by the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        assert all(isinstance(each, Away) or each.device != AWAY for each in tensors), (
            f"{function}: a tensor without data"
        )
        away, where = {id(each.held): each for each in tensors if isinstance(each, Away)}, kwargs.get("device")
        if not away and where != AWAY:
            return function(*args, **kwargs)
        if function not in COPIES:
            free = (
                [id(each) for each in tree_leaves(args[1])]
                if function in INDEXING and isinstance(args[0], Away)
                else []
            )
            mixed = [each for each in tensors if not isinstance(each, Away) and each.dim() and id(each) not in free]
            assert not mixed, f"{function}: tensors of two memories, those here {[tuple(each.shape) for each in mixed]}"
        found = function(*tree_map(held, args), **tree_map(held, kwargs))
        if function is aten.copy_.default:
            return args[0]
        if where is not None and where != AWAY:
            return found
        # what was changed in place is given back itself
        return tree_map(
            lambda each: away[id(each)] if id(each) in away else Away(each) if isinstance(each, Tensor) else each, found
        )


def held(each: Any) -> Any:
    """What the CPU computes with in place of tensors, and of places, in the other memory."""
    return each.held if isinstance(each, Away) else torch.device("cpu") if each == AWAY else each


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training and prediction take the other memory for their device."""
    tensor = torch.tensor

    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:  # PyTorch's own would have no data
        return tensor(*args, device=None if device == AWAY else device, **kwargs).to(device or "cpu")

    monkeypatch.setattr(torch, "tensor", make)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which tensors that hold others do not know
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda *_: None)
    monkeypatch.setattr("vitmodel.training.trainer.resolve_strategy", lambda _: SingleDeviceStrategy(AWAY))
    for module in ("vitmodel.training.fit", "vitmodel.scoring.ensemble"):
        monkeypatch.setattr(f"{module}.resolve_device", lambda _: AWAY)
    with OtherMemory():
        yield


def test_mixing_tensors_of_two_devices_is_an_error(elsewhere: None) -> None:
    here = torch.arange(3.0)
    away = here.to(AWAY)
    assert away.device == AWAY
    assert (2 * away + here[1]).cpu().tolist() == [1, 3, 5]
    assert away[torch.tensor([2, 0])].cpu().tolist() == [2, 0]
    for mixing in (
        lambda: away + here,
        lambda: torch.cat([away, here]),
        lambda: here[away.long()],
        lambda: here.add_(away),
    ):
        with pytest.raises(AssertionError, match="two memories"):
            mixing()
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


def settled(package: Path, images: pd.DataFrame, method: str) -> tuple[np.ndarray, np.ndarray]:
    """What a package says of images and, as a heat map, of the first of them."""
    predictor = Predictor(PredictorConfig(package=package, flip=True, jobs=1))
    rows = predictor.attach(images)
    logits = predictor.predict_logits(rows)[1]
    return logits, predictor.explain(predictor.stream.load(rows.rows[0]), method)


@pytest.mark.parametrize(("recipe", "method"), RECIPES)
def test_another_device_gives_the_same_weights_scores_and_maps(
    recipe: str, method: str, crops: Path, flags: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    table, options = str(crops / "manifest.csv"), [*flags, "--device", "cpu", *recipe.split()]
    package, images = tmp_path / "here" / "package", usable_rows(read_manifest(crops / "manifest.csv"))[:8]
    assert main(["train", table, str(tmp_path / "here"), *options]) == 0
    said, heat = settled(package, images, method)

    request.getfixturevalue("elsewhere")
    assert main(["train", table, str(tmp_path / "away"), *options]) == 0
    trained = load_file(tmp_path / "away" / "package" / TENSORS_FILE)
    for name, tensor in load_file(package / TENSORS_FILE).items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    said_away, heat_away = settled(package, images, method)
    np.testing.assert_allclose(said_away, said, rtol=1e-4, atol=1e-5)
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
