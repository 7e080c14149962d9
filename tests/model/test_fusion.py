"""Source adapters and exam fusion.

New parts change nothing, and results depend neither on the order or copies of images nor on the rest of the pack.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitmodel.config import Size
from vitmodel.errors import UsageError
from vitmodel.model.architecture import ExamConfig, NetworkConfig, SourcesConfig, ViTConfig, Vocabulary
from vitmodel.model.fusion import Integrator, noisy_or_logits
from vitmodel.model.network import Logits, Network
from vitmodel.model.packed_attention import forward
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, concat_separate_packs, pack_images

VIT = ViTConfig(image_size=Size(48, 32), dim=32, depth=3, heads=2)
SOURCES = SourcesConfig(
    columns=(Vocabulary("machine_id", ("a", "b")), Vocabulary("view", ("CC", "MLO"))), rank=4, every=2
)
EXAM = ExamConfig(views=Vocabulary("view", ("CC", "MLO")))


def build(perturbed: bool = True, **options: Any) -> Network:
    """Return a network in evaluation mode; if `perturbed`, no parameter keeps its initial 0 or 1."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(**{"vit": VIT, "sources": SOURCES, "exam": EXAM} | options))
    with torch.no_grad():
        for parameter in network.parameters() if perturbed else ():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def random_image(seed: int) -> Tensor:
    return torch.rand(1, 48, 32, generator=torch.Generator().manual_seed(seed))


def exam(*images: tuple[int, str, int]) -> PackedBatch:
    """Return a pack of images given as (seed, breast, view), whose sources follow from seed and view."""
    metadata = [
        ImageMetadata(sources=(seed % 3, view), view=view, breast="LR".index(side), exam=0)
        for seed, side, view in images
    ]
    return pack_images([random_image(seed) for seed, _, _ in images], 16, metadata=metadata)


FOUR = (1, "L", 1), (2, "L", 2), (3, "R", 1), (4, "R", 2)


def predict(network: Network, pack: PackedBatch) -> Logits:
    """Return the logits of a pack, without gradients."""
    with torch.inference_mode():
        return network(pack)


def close(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two tensors are equal up to 1e-5."""
    assert first is not None
    assert second is not None
    return torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("options", [{"sources": None, "exam": None}, {"exam": None}, {}])
def test_new_parts_do_not_change_the_vit(options: dict[str, Any]) -> None:
    network = build(perturbed=False, **options)
    plain = forward(network.trunk, exam(*FOUR))
    assert torch.equal(predict(network, exam(*FOUR)).images, plain)
    if network.exam is not None:
        assert close(predict(network, exam(*FOUR)).breasts, torch.stack([plain[:2].mean(), plain[2:].mean()]))


def test_each_source_has_parameters_of_its_own() -> None:
    network = build()

    def logit(metadata: ImageMetadata) -> float:
        return predict(network, replace(exam(FOUR[0]), metadata=(metadata,))).images.item()

    logits = [logit(ImageMetadata(sources=sources)) for sources in [(0, 0), (1, 0), (1, 2)]]
    assert len(set(logits)) == 3
    assert logits[0] == logit(ImageMetadata()), "unknown sources must use the shared adapters"


def test_only_the_adapters_of_the_batch_s_sources_get_gradients() -> None:
    network = build(exam=None)
    network(replace(exam(FOUR[0]), metadata=(ImageMetadata(sources=(1, 0)),))).images.sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("sources.blocks.2.0") or name == "sources.tokens.0":
            has_gradient = parameter.grad.flatten(1).abs().amax(dim=1) > 0
            assert has_gradient.tolist() == [False, True, False], name


@pytest.mark.parametrize("asymmetry", [True, False])
def test_scores_depend_neither_on_order_nor_copies_nor_other_exams(asymmetry: bool) -> None:
    network = build(exam=replace(EXAM, asymmetry=asymmetry))
    alone = predict(network, exam(*FOUR))
    reordered = predict(network, exam(FOUR[2], FOUR[1], FOUR[3], FOUR[0]))
    assert close(reordered.breasts.flip(0), alone.breasts)
    assert close(reordered.images[[3, 1, 0, 2]], alone.images)
    assert close(reordered.patients, alone.patients)
    copied = predict(network, exam(*FOUR, FOUR[0], FOUR[0]))
    assert close(copied.breasts, alone.breasts), "copies of an image must not change the breast's logit"
    together = predict(network, concat_separate_packs([exam((7, "L", 1)), exam(*FOUR), exam(*FOUR[:3])]))
    assert close(together.breasts[1:3], alone.breasts)
    incomplete = predict(network, exam(*FOUR[:3]))
    assert close(together.breasts[3:], incomplete.breasts), "the images of other exams must not take part"
    assert close(together.patients[1], alone.patients[0])


def test_the_other_breast_changes_the_logit_only_with_asymmetry() -> None:
    for asymmetry in (True, False):
        network = build(exam=replace(EXAM, asymmetry=asymmetry))
        with_other = predict(network, exam(*FOUR)).breasts[:1]
        without_other = predict(network, exam(*FOUR[:2])).breasts
        assert close(with_other, without_other) is not asymmetry


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_breast_may_have_any_number_of_images(count: int) -> None:
    logits = predict(build(), exam(*((seed, "L", seed % 3) for seed in range(count))))
    assert (logits.images.shape, logits.breasts.shape, logits.patients.shape) == ((count, 1), (1,), (1,))
    assert close(logits.patients, logits.breasts), "a patient with one breast must have that breast's logit"


def test_a_breast_with_images_of_two_exams_is_refused() -> None:
    mixed = replace(exam(*FOUR[:2]), metadata=(ImageMetadata(breast=3, exam=0), ImageMetadata(breast=3, exam=1)))
    with pytest.raises(UsageError, match="images 1, 2 belong to one breast but to several exams"):
        build()(mixed)


@pytest.mark.parametrize("logits", [[-60.0, -50.0], [-2.0, 0.5], [3.0], [40.0, -40.0]])
def test_the_patient_s_logit_is_the_noisy_or_of_the_breasts(logits: list[float]) -> None:
    log_healthy = -sum(math.log1p(math.exp(logit)) for logit in logits)  # log probability of no cancer, in 64 bits
    expected = math.log(-math.expm1(log_healthy)) - log_healthy
    assert noisy_or_logits(torch.tensor(logits), [range(len(logits))]).item() == pytest.approx(expected, rel=1e-5)


def test_attention_to_parts_sums_to_one_and_a_whole_without_parts_is_refused() -> None:
    torch.manual_seed(0)
    integrator = Integrator(VIT, 2)
    parts = torch.randn(5, 32)
    attention = integrator.attention(parts, [2, 3], torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0]))
    assert [len(whole) for whole in attention] == [2, 3]
    assert all(whole.sum().item() == pytest.approx(1) for whole in attention)
    with pytest.raises(UsageError, match="whole 2 of 2"):
        integrator(parts, [5, 0])


@pytest.mark.parametrize("options", [{"sources": None, "exam": None}, {}])
def test_a_network_is_restored_from_its_config_and_tensors(options: dict[str, Any]) -> None:
    network = build(**options)
    copy = Network(NetworkConfig.from_dict(network.config.to_dict()))
    assert copy.config == network.config
    copy.load_tensors(network.tensors())
    assert close(predict(copy.eval(), exam(*FOUR)).images, predict(network, exam(*FOUR)).images)
    assert set(network.trunk.state_dict()) <= set(network.tensors())
    if options:
        assert network.config.to_dict() == VIT.to_dict(), (
            "without optional parts the values must be those of older packages"
        )
