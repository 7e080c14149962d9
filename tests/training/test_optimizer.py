"""Parameter groups and the learning rate schedule."""

from __future__ import annotations

import pytest
import torch

from vitmodel.config import Size
from vitmodel.model.architecture import ExamConfig, NetworkConfig, ViTConfig, Vocabulary
from vitmodel.model.network import Network
from vitmodel.model.vit import ViT
from vitmodel.training.optimizer import layer_index, parameter_groups, warmup_cosine

CONFIG = ViTConfig(
    image_size=Size(32, 16), patch=16, dim=12, depth=3, heads=2, pool="attention", registers=1, layer_scale=0.1
)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_every_parameter_is_in_one_group_and_only_kernels_decay(layer_decay: float, stem: str) -> None:
    model = ViT(ViTConfig(**vars(CONFIG) | {"stem": stem, "dim": 16}))
    groups = parameter_groups(model, 1.0, 0.05, layer_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    kernels = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert decaying == {id(kernel) for kernel in kernels}
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("alone", [True, False])
def test_layer_decay_halves_the_learning_rate_per_layer(alone: bool) -> None:
    """This holds for a ViT alone, and for one inside the network and module of a training."""
    network = Network(NetworkConfig(vit=CONFIG, exam=ExamConfig(views=Vocabulary("view", ("CC",)))))
    model = ViT(CONFIG) if alone else network.trunk
    groups = parameter_groups(model if alone else torch.nn.ModuleDict({"model": network}), 1.0, 0.05, 0.5)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert alone or {rates[id(parameter)] for parameter in network.exam.parameters()} == {1.0}
    assert [rates[id(block.attn.qkv.weight)] for block in model.blocks] == [0.125, 0.25, 0.5]
    assert rates[id(model.head.weight)] == rates[id(model.head.bias)] == rates[id(model.norm.weight)] == 1.0
    stem = (model.pos_embed, model.cls_token, model.reg_token, model.patch_embed.proj.weight)
    assert {rates[id(parameter)] for parameter in stem} == {0.0625}
    assert layer_index("blocks.11.mlp.fc1.weight", 12) == 12


def test_warmup_is_linear_and_the_decay_is_torchs_cosine() -> None:
    """Compare with torch's own cosine schedule, and check start, warm-up, peak and end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90, eta_min=0.01)
    for step in range(90):
        assert warmup_cosine(0.1 + 0.9 * step / 90, 0.1) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert [warmup_cosine(done, 0.1) for done in (0.0, 0.05, 0.1, 1.0)] == pytest.approx([0.01, 0.5, 1.0, 0.01])
    assert warmup_cosine(0.0, 0.0) == 1.0
