"""Supervised finetuning: the model learns to give the answers of the examples.

    nll    the mean of -log p over the learned tokens: plain cross-entropy
    dft    the same with each token weighted by its own p, treated as a constant (https://arxiv.org/abs/2508.05629)

Both are the formulas of TRL's SFTTrainer, over learned tokens only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qllava.training.objectives.objective import Objective, Outcome
from qllava.training.step.exact import PackOutput


def supervised(loss_type: str) -> Objective:
    """Return the objective of TRL's setting `loss_type`: `dft`, or cross-entropy under its other names."""
    return dft if loss_type == "dft" else nll


def nll(found: PackOutput, count: Tensor | None) -> Outcome:
    """Return the cross-entropy of a pack; see `Objective` for the arguments."""
    assert found.log_probs is not None
    return _outcome(found, -found.log_probs, count)


def dft(found: PackOutput, count: Tensor | None) -> Outcome:
    """Return the cross-entropy of a pack with each token weighted by its probability; see `Objective`."""
    assert found.log_probs is not None
    return _outcome(found, -found.log_probs * found.log_probs.exp().detach(), count)


def _outcome(found: PackOutput, of_tokens: Tensor, count: Tensor | None) -> Outcome:
    """Return the mean loss of the tokens, with the entropy and the share of correct predictions.

    Args:
        found: Outputs of the pack.
        of_tokens: Losses of the tokens, (L,); zero in a weightless pack.
        count: Learned tokens of the optimizer step; None for the mean over this pack.
    """
    assert found.label_mask is not None and found.entropy is not None and found.is_top1 is not None
    learned = found.label_mask.sum()
    total = learned if count is None else count
    # A pack without learned tokens has the loss 0 instead of 0 / 0.
    loss = of_tokens.sum() / torch.as_tensor(total).clamp(min=1)
    sums = {"entropy": found.entropy.detach().sum(), "mean_token_accuracy": found.is_top1.sum()}
    return Outcome(loss, learned, sums)
