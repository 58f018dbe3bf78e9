"""An optimizer step pack by pack, with a model of one weight: no trainer and no language model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from qllava.config import InputError
from qllava.data.collate import Kept
from qllava.training.step.packs import PackStep

LENGTHS = (4, 3, 2, 1)


class Collator:
    """Packs of at most so many tokens; a pack is the tokens of its samples, each of which is its sample's length."""

    tokens_per_pack: int | None = None

    def __call__(self, samples: list[int]) -> dict[str, Any]:
        packs: list[list[int]] = [[]]
        for length in samples:
            if packs[-1] and self.tokens_per_pack and len(packs[-1]) + length > self.tokens_per_pack:
                packs.append([])
            packs[-1] += [length] * length
        packs = [{"input_ids": torch.tensor([pack])} for pack in packs]
        return {"packs": packs, "lengths": torch.tensor(samples), "kept": Kept([{"id": n} for n in samples], [])}

    def shorten(self, tokens: int) -> None:
        """As PackCollator's."""
        self.tokens_per_pack = tokens

    def again(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As PackCollator's."""
        return self([sample["id"] for sample in batch["kept"].samples])


class Card:
    """Computes packs in a memory that holds so many tokens."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most, self.model = most, nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)
        self.said: list[str] = []
        self.packs: list[int] = []
        accelerator = Accelerator(cpu=True)
        self.collator: Any = Collator()
        self.step = PackStep(self.collator, accelerator, learn=self.learn, looking=nullcontext, say=self.said.append)

    def learn(self, model: nn.Module, pack: dict[str, Any], count: Any) -> torch.Tensor:
        tokens = pack["input_ids"][0]
        self.packs.append(len(tokens))
        loss = model(tokens[:, None].float()).sum() / count
        loss.backward()
        if len(tokens) > self.most:  # its gradient is there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss.detach()

    def compute(self, batches: list[list[int]]) -> tuple[float, float, list[dict[str, Any]]]:
        """Loss, gradient and samples of a step of several batches."""
        for samples in batches:
            self.step.add(self.model, self.collator(samples), 10, 1)
        losses, samples = self.step.taken()
        assert self.model.weight.grad is not None
        return float(torch.stack(losses).sum()), float(self.model.weight.grad), samples


def test_the_step_is_computed_again_in_halves() -> None:
    whole = Card()
    loss, gradient, samples = whole.compute([[1], list(LENGTHS)])
    assert whole.packs == [1, 10] and not whole.said and whole.step.halved is None
    small = Card(most=5)
    again = small.compute([[1], list(LENGTHS)])
    assert again == (pytest.approx(loss), pytest.approx(gradient), samples)
    assert small.packs == [1, 10, 1, 4, 5, 1], "the batch before, too: its gradient was thrown away"
    assert small.step.halved == 5
    assert small.said == ["Out of memory at step 1: from now on packs have at most 5 tokens."]


def test_a_batch_that_was_made_before_is_cut() -> None:
    card = Card()
    made = card.collator(list(LENGTHS))
    card.collator.shorten(5)
    card.step.add(card.model, made, 10, 1)
    assert card.packs == [4, 5, 1] and not card.said


def test_a_sample_that_does_not_fit_ends_the_run() -> None:
    card = Card(most=2)
    with pytest.raises(InputError, match="Out of memory at step 1 with a single sample of 4 tokens. "):
        card.compute([list(LENGTHS)])


def test_other_errors_pass() -> None:
    card = Card()
    with pytest.raises(RuntimeError, match="shapes"):
        card.step._learn = lambda *_: (_ for _ in ()).throw(RuntimeError("shapes"))  # type: ignore[method-assign]
        card.compute([list(LENGTHS)])


def test_a_step_that_was_taken_is_gone() -> None:
    card = Card()
    card.compute([[1]])
    assert card.step.taken() == ([], [])
