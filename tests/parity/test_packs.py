"""Packs equal the separate samples: loss and every gradient, in fp32, for random mixtures."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import cross_entropy

from qllava.data.collate import pack_tensors
from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import lay_out, packs_of
from qllava.training.step.attention import looking_at
from qllava.training.step.exact import pack_forward, prune_last_layer, stop_tower
from tests.tiny_models import IMAGE_SIZE, IMAGE_TOKENS, make_tiny_model, make_tiny_processor

PROCESSOR = make_tiny_processor()
IMAGE = PROCESSOR.tokenizer.convert_tokens_to_ids("<image>")


def a_sample(
    rng: random.Random, number: int, images: tuple[str, ...], prefix: list[int], plain: bool
) -> dict[str, Any]:
    """A sample that begins with the prefix that samples of these images share; `plain`: it is learned at once."""
    words = [rng.randrange(10, 300) for _ in range(rng.randint(1, 12))]
    ids = prefix + words
    labels = [IGNORE_INDEX] * len(prefix) + [w if plain or rng.random() < 0.5 else IGNORE_INDEX for w in words]
    labels[-1] = ids[-1]
    shown = {"image_files": list(images), "image_tokens": [IMAGE_TOKENS] * len(images)}
    return {"id": str(number), "input_ids": ids, "labels": labels, **shown}


def a_mixture(seed: int) -> list[dict[str, Any]]:
    """0 to 3 images a sample, 1 to 6 samples a set of images, texts between them, captions among them."""
    rng = random.Random(seed)
    samples: list[dict[str, Any]] = []
    for group in range(rng.randint(1, 4)):
        count = rng.randint(0, 3)
        images = tuple(f"{group}-{k}" if rng.random() < 0.8 else "everywhere" for k in range(count))
        plain = count == 1 and rng.random() < 0.4
        prefix = [1]
        for _ in images:
            prefix += [rng.randrange(10, 300)] * rng.randint(0, 2) + [IMAGE] * IMAGE_TOKENS
        prefix += [] if plain else [rng.randrange(10, 300) for _ in range(rng.randint(1, 3))]
        for _ in range(rng.randint(1, 6)):
            own = prefix if rng.random() < 0.85 else [2, *prefix]
            samples.append(a_sample(rng, len(samples), images, own, plain))
    rng.shuffle(samples)
    return samples


def pixels(name: str) -> torch.Tensor:
    """The pixel values of an image that is made of its name."""
    colour = tuple(random.Random(name).randrange(256) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour)
    image.paste("white", (random.Random(name + "x").randrange(20), 3, 24, 20))
    values: torch.Tensor = PROCESSOR.image_processor(image, return_tensors="pt")["pixel_values"]
    return values


def learner(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model in which everything learns but the tower.

    Its weights are drawn large, so that answers differ; here they are as small as usual, for large ones amplify what is
    rounded: two ways to the same gradient were 1e-5 apart, and each of them further from that in fp64.
    """
    model: Any = make_tiny_model(PROCESSOR).to(dtype)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for weight in layer.parameters():
                weight.mul_(0.2 if weight.dim() == 2 else 1.0)
    return model


def separate(model: Any, samples: list[dict[str, Any]]) -> torch.Tensor:
    """The sum of losses, each sample by itself through transformers' own forward pass."""
    total = torch.zeros(())
    for sample in samples:
        inputs = {"input_ids": torch.tensor([sample["input_ids"]])}
        if sample["image_files"]:
            inputs["pixel_values"] = torch.cat([pixels(name) for name in sample["image_files"]]).to(model.dtype)
        logits = model(**inputs).logits[0, :-1]
        labels = torch.tensor(sample["labels"][1:])
        total = total + cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total


def packed(
    model: Any, samples: list[dict[str, Any]], *, share: bool = True, tokens_per_pack: int | None = None
) -> torch.Tensor:
    """The same as one pack, or as several."""
    total = torch.zeros(())
    for pack in packs_of(samples, IMAGE, tokens_per_pack=tokens_per_pack, share=share):
        shown = torch.cat([pixels(name) for name in pack.images]).to(model.dtype) if pack.images else None
        out = pack_forward(model, **pack_tensors(pack), pixel_values=shown)
        assert out.log_probs is not None
        total = total - out.log_probs.sum()
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros(1) if g is None else g for name, g in zip(names, found, strict=True)}


def assert_equal(
    samples: list[dict[str, Any]], dtype: torch.dtype, tolerance: float, shortcuts: bool = True, **how: Any
) -> None:
    """Loss and every gradient of packs against those of the separate samples, relative to the length of each."""
    model = learner(dtype)
    expected = separate(model, samples)
    wanted = gradients(model, expected)
    if shortcuts:
        stop_tower(model)
        prune_last_layer(model.model.language_model)
    with looking_at(model.model.language_model):
        loss = packed(model, samples, **how)
        found = gradients(model, loss)
    assert abs(loss - expected) <= tolerance * expected
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1_000_000), st.booleans(), st.booleans(), st.sampled_from([None, 60, 150]))
def test_packs_equal_their_samples(seed: int, share: bool, shortcuts: bool, tokens_per_pack: int | None) -> None:
    assert_equal(a_mixture(seed), torch.float32, 1e-5, shortcuts, share=share, tokens_per_pack=tokens_per_pack)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_but_rounding_lies_between_them(seed: int) -> None:
    # transformers' rotary angles and norms stay in fp32.
    assert_equal(a_mixture(seed), torch.float64, 1e-6, tokens_per_pack=150)


def test_the_order_of_samples_changes_nothing() -> None:
    model, samples = learner(), a_mixture(3)
    turned = samples[::-1]
    with looking_at(model.model.language_model), torch.no_grad():
        torch.testing.assert_close(packed(model, samples), packed(model, turned), rtol=1e-5, atol=1e-5)


def test_sharing_saves_the_tokens_that_are_shared() -> None:
    prefix = [1, *[IMAGE] * IMAGE_TOKENS, 7]
    rng = random.Random(0)
    samples = [a_sample(rng, n, ("a",), prefix, False) for n in range(3)]
    shared, alone = lay_out(samples, IMAGE), lay_out(samples, IMAGE, share=False)
    assert len(alone.input_ids) - len(shared.input_ids) >= 2 * (len(prefix) - 1)
    assert shared.images == alone.images == ("a",)
    assert len(shared.groups) == 1 and len(alone.groups) == 3
