"""Objectives, from a few numbers: no model and no trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qllava.training.objectives import held_out
from qllava.training.objectives.supervised import dft, nll, supervised
from qllava.training.step.exact import PackOutput

PROBABILITIES = torch.tensor([0.5, 0.25, 0.125])


def outputs(*, weight: bool = True) -> PackOutput:
    """Three learned tokens of known probability, the first of which the model had right."""
    log_probs = PROBABILITIES.log().requires_grad_()
    right = torch.tensor([True, False, False])
    if not weight:
        return PackOutput(0 * log_probs, torch.zeros_like(right), 0 * log_probs.detach(), torch.zeros_like(right))
    return PackOutput(log_probs, torch.ones_like(right), torch.tensor([1.0, 2.0, 3.0]), right)


def test_cross_entropy_is_the_share_of_a_steps_mean() -> None:
    found = nll(outputs(), torch.tensor(12))
    assert float(found.loss.detach()) == pytest.approx(float(-PROBABILITIES.log().sum()) / 12)
    assert int(found.learned) == 3
    assert {name: float(value) for name, value in found.sums.items()} == {"entropy": 6, "mean_token_accuracy": 1}
    alone = nll(outputs(), None)
    assert float(alone.loss.detach()) == pytest.approx(float(-PROBABILITIES.log().mean()))


def test_dft_weights_each_token_by_its_probability() -> None:
    given = outputs()
    found = dft(given, torch.tensor(3))
    assert float(found.loss.detach()) == pytest.approx(float((-PROBABILITIES * PROBABILITIES.log()).mean()))
    assert given.log_probs is not None
    (gradient,) = torch.autograd.grad(found.loss, given.log_probs)
    assert torch.allclose(gradient, -PROBABILITIES / 3), "the weight is a constant"


@pytest.mark.parametrize("count", [None, torch.tensor(0)])
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_a_pack_without_weight_has_a_loss_and_gradients_of_zero(loss_type: str, count: Any) -> None:
    given = outputs(weight=False)
    found = supervised(loss_type)(given, count)
    assert float(found.loss.detach()) == 0 and int(found.learned) == 0
    found.loss.backward()


def test_held_out_means_are_over_learned_tokens() -> None:
    """Two packs of other sizes: a mean of their means would be another figure."""
    one = outputs()
    two = PackOutput(*(x[:1] for x in (one.log_probs, one.label_mask, one.entropy, one.is_top1)))
    answers = iter([one, two])
    found = held_out.sums(nll, lambda **_: next(answers), {"packs": [{}, {}]}, lambda pack: pack)  # type: ignore[arg-type]
    assert found["tokens"] == 4
    means = held_out.means(found)
    assert means.keys() == {"loss", "entropy", "mean_token_accuracy"}
    assert means["loss"] == pytest.approx(float(-torch.cat([PROBABILITIES, PROBABILITIES[:1]]).log().mean()))
    assert means["entropy"] == pytest.approx(7 / 4) and means["mean_token_accuracy"] == pytest.approx(2 / 4)
