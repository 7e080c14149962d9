"""Losses agree with independent references, and unknown labels have neither loss nor gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from vitmodel.config.auxiliary import AUXILIARY_TARGETS
from vitmodel.errors import UsageError
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model.network import AuxiliaryHeads
from vitmodel.training.losses import auxiliary_losses, bce, focal, make_loss, prior_bias, soft_f1

LOGITS = torch.tensor([-3.0, -0.5, 0.2, 4.0, 1.0])
LABELS = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])


def test_bce_is_the_log_loss_and_focal_without_focus_is_bce() -> None:
    assert bce()(LOGITS, LABELS).mean().item() == pytest.approx(log_loss(LABELS, torch.sigmoid(LOGITS.double())))
    torch.testing.assert_close(focal(gamma=0.0)(LOGITS, LABELS), bce()(LOGITS, LABELS))


def test_focal_loss_equals_its_formula() -> None:
    p = torch.where(LABELS > 0, torch.sigmoid(LOGITS), 1 - torch.sigmoid(LOGITS))
    torch.testing.assert_close(focal(gamma=2.0)(LOGITS, LABELS), -((1 - p) ** 2) * p.log())


def test_smoothing_softens_positives_only() -> None:
    """The optimal logit of a positive becomes log(0.9 / 0.1), and the loss of a negative does not change."""
    x = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    bce(smoothing=0.1)(x, torch.ones(1)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs() < 1e-6
    torch.testing.assert_close(bce(0.1)(LOGITS[:1], LABELS[:1]), bce()(LOGITS[:1], LABELS[:1]))


def test_soft_f1_equals_the_pf1_metric() -> None:
    labels, scores = LABELS.numpy(), torch.sigmoid(LOGITS).numpy()
    metric = RankedUnits(ScoredUnits(labels, scores, np.arange(5)), threshold=0.5).metric_values()["pf1"]
    assert 1 - soft_f1(LOGITS, LABELS)[0].item() == pytest.approx(metric, rel=1e-5)
    assert soft_f1(LOGITS, torch.zeros(5)).tolist() == [0] * 5


@pytest.mark.parametrize("name", ["bce", "focal", "pf1"])
def test_an_unknown_label_has_no_loss_and_no_gradient(name: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    labels = LABELS.clone()
    labels[2] = math.nan
    losses = make_loss(name, smoothing=0.1)(logits, labels)
    losses.sum().backward()
    assert logits.grad is not None
    assert losses[2] == 0
    assert logits.grad[2] == 0
    assert logits.grad.isfinite().all()
    assert (logits.grad[[0, 1, 3, 4]] != 0).all()
    others = [0, 1, 3, 4]
    if name != "pf1":
        torch.testing.assert_close(losses[others], make_loss(name, smoothing=0.1)(LOGITS[others], LABELS[others]))


def test_prior_bias_starts_at_the_base_rate() -> None:
    """The mean gradient of the head's bias is then 0, so that no step is spent on learning the base rate."""
    labels = torch.tensor([1.0] * 2 + [0.0] * 98)
    bias = torch.tensor(prior_bias(0.02), requires_grad=True)
    bce()(bias.expand(100), labels).mean().backward()
    assert bias.grad is not None
    assert bias.grad.abs() < 1e-6
    for prior in (0.0, 1.0, math.nan):
        with pytest.raises(UsageError, match="one class"):
            prior_bias(prior)


def test_auxiliary_losses_use_only_known_targets() -> None:
    torch.manual_seed(0)
    names = list(AUXILIARY_TARGETS)
    heads = AuxiliaryHeads(8, list(AUXILIARY_TARGETS.values()))
    features = torch.randn(4, 8, requires_grad=True)
    values = {
        "birads": [0.0, "2", None, math.nan],
        "density": ["A", "D", "E", None],
        "invasive": [0.0, 1.0, math.nan, math.nan],
        "biopsy": [math.nan] * 4,
        "difficult_negative_case": [0.0, 0.0, 1.0, math.nan],
        "view": ["CC", "MLO", "AT", "LM"],
        "age": [46.0, 70.0, math.nan, math.nan],
    }
    targets = torch.tensor([target.encode(values[target.name]) for target in AUXILIARY_TARGETS.values()]).T
    outputs = heads(features)
    losses = auxiliary_losses(list(AUXILIARY_TARGETS.values()), outputs, targets)  # (B, A)
    assert (losses[:, names.index("biopsy")] == 0).all()
    losses.sum().backward()
    assert features.grad is not None
    assert features.grad[3].abs().sum() == 0, "an image without known targets must have no gradient"
    assert (features.grad[:3].abs().sum(dim=1) > 0).all()
    assert (losses > 0).equal(~targets.isnan())
    torch.testing.assert_close(targets[:2, names.index("age")], torch.tensor([-1.0, 1.0]))
    density = outputs[:2, 7:11]  # after the seven classes of BI-RADS
    expected = torch.nn.functional.cross_entropy(density, torch.tensor([0, 3]), reduction="none") / math.log(4)
    torch.testing.assert_close(losses[:2, names.index("density")], expected)
