"""What sources and fusion promise: fresh they change nothing, order and copies of images do not matter, nor what else is in the pack."""

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
    """A network in evaluation mode, perturbed so that no parameter hides behind an initial 0 or 1."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(**{"vit": VIT, "sources": SOURCES, "exam": EXAM} | options))
    with torch.no_grad():
        for parameter in network.parameters() if perturbed else ():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def image(seed: int) -> Tensor:
    return torch.rand(1, 48, 32, generator=torch.Generator().manual_seed(seed))


def exam(*images: tuple[int, str, int]) -> PackedBatch:
    """A pack of (seed, breast, view) with made-up sources."""
    metadata = [
        ImageMetadata(sources=(seed % 3, view), view=view, breast="LR".index(side), exam=0)
        for seed, side, view in images
    ]
    return pack_images([image(seed) for seed, _, _ in images], 16, metadata=metadata)


FOUR = (1, "L", 1), (2, "L", 2), (3, "R", 1), (4, "R", 2)


def say(network: Network, pack: PackedBatch) -> Logits:
    with torch.inference_mode():
        return network(pack)


def close(first: Tensor | None, second: Tensor | None) -> bool:
    assert first is not None
    assert second is not None
    return torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("options", [{"sources": None, "exam": None}, {"exam": None}, {}])
def test_fresh_extras_leave_the_vit_as_it_is(options: dict[str, Any]) -> None:
    network = build(perturbed=False, **options)
    plain = forward(network.trunk, exam(*FOUR))
    assert torch.equal(say(network, exam(*FOUR)).images, plain)
    if network.exam is not None:
        assert close(say(network, exam(*FOUR)).breasts, torch.stack([plain[:2].mean(), plain[2:].mean()]))


def test_each_source_has_a_part_of_its_own() -> None:
    network = build()
    seen = [
        say(network, replace(exam(FOUR[0]), metadata=(ImageMetadata(sources=sources),))).images.item()
        for sources in [(0, 0), (1, 0), (1, 2)]
    ]
    assert len(set(seen)) == 3
    assert seen[0] == say(network, replace(exam(FOUR[0]), metadata=(ImageMetadata(),))).images.item(), (
        "what is not known goes the shared way"
    )


def test_only_the_sources_that_are_seen_learn() -> None:
    network = build(exam=None)
    network(replace(exam(FOUR[0]), metadata=(ImageMetadata(sources=(1, 0)),))).images.sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("sources.blocks.2.0") or name == "sources.tokens.0":
            learned = parameter.grad.flatten(1).abs().amax(dim=1) > 0
            assert learned.tolist() == [False, True, False], name


@pytest.mark.parametrize("asymmetry", [True, False])
def test_neither_order_nor_copies_nor_company_matter(asymmetry: bool) -> None:
    network = build(exam=replace(EXAM, asymmetry=asymmetry))
    alone = say(network, exam(*FOUR))
    mixed = say(network, exam(FOUR[2], FOUR[1], FOUR[3], FOUR[0]))
    assert close(mixed.breasts.flip(0), alone.breasts)
    assert close(mixed.images[[3, 1, 0, 2]], alone.images)
    assert close(mixed.patients, alone.patients)
    twice = say(network, exam(*FOUR, FOUR[0], FOUR[0]))
    assert close(twice.breasts, alone.breasts), "a breast is known by what it shows, not by how many images it has"
    together = say(network, concat_separate_packs([exam((7, "L", 1)), exam(*FOUR), exam(*FOUR[:3])]))
    assert close(together.breasts[1:3], alone.breasts)
    assert close(together.breasts[3:], say(network, exam(*FOUR[:3])).breasts), (
        "an exam that lacks an image is the exam without it"
    )
    assert close(together.patients[1], alone.patients[0])


def test_the_other_breast_counts_only_with_asymmetry() -> None:
    for asymmetry in (True, False):
        network = build(exam=replace(EXAM, asymmetry=asymmetry))
        both, one = say(network, exam(*FOUR)).breasts[:1], say(network, exam(*FOUR[:2])).breasts
        assert close(both, one) is not asymmetry


@pytest.mark.parametrize("count", [1, 2, 8])
def test_any_number_of_images(count: int) -> None:
    said = say(build(), exam(*((seed, "L", seed % 3) for seed in range(count))))
    assert (said.images.shape, said.breasts.shape, said.patients.shape) == ((count, 1), (1,), (1,))
    assert close(said.patients, said.breasts), "one breast only"


def test_images_of_two_exams_are_no_breast() -> None:
    mixed = replace(exam(*FOUR[:2]), metadata=(ImageMetadata(breast=3, exam=0), ImageMetadata(breast=3, exam=1)))
    with pytest.raises(UsageError, match="images 1, 2 are of one breast, but not of one exam"):
        build()(mixed)


@pytest.mark.parametrize("logits", [[-60.0, -50.0], [-2.0, 0.5], [3.0], [40.0, -40.0]])
def test_the_patient_has_a_cancer_if_any_breast_has_one(logits: list[float]) -> None:
    healthy = -sum(math.log1p(math.exp(logit)) for logit in logits)  # the logarithm of that probability, in 64 bits
    wanted = math.log(-math.expm1(healthy)) - healthy
    assert noisy_or_logits(torch.tensor(logits), [range(len(logits))]).item() == pytest.approx(wanted, rel=1e-5)


def test_attention_of_wholes_sums_to_one_and_needs_parts() -> None:
    torch.manual_seed(0)
    integrator, parts = Integrator(VIT, 2), torch.randn(5, 32)
    reading = integrator.attention(parts, [2, 3], torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0]))
    assert [len(each) for each in reading] == [2, 3]
    assert all(each.sum().item() == pytest.approx(1) for each in reading)
    with pytest.raises(UsageError, match="whole 2 of 2"):
        integrator(parts, [5, 0])


@pytest.mark.parametrize("options", [{"sources": None, "exam": None}, {}])
def test_a_config_survives_json_and_tensors_their_names(options: dict[str, Any]) -> None:
    network = build(**options)
    copy = Network(NetworkConfig.from_dict(network.config.to_dict()))
    assert copy.config == network.config
    copy.load_tensors(network.tensors())
    assert close(say(copy.eval(), exam(*FOUR)).images, say(network, exam(*FOUR)).images)
    assert set(network.trunk.state_dict()) <= set(network.tensors())
    if options:
        assert network.config.to_dict() == VIT.to_dict(), "an old package and a new one without extras are alike"
