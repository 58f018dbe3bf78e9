"""The tower's training: its model, what it is shown, and that the converted tower computes what open_clip's does."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from open_clip.coca_model import CoCa
from PIL import Image
from transformers import CLIPImageProcessor

from qllava.models.vision import convert_open_clip
from qllava.nano import tower
from qllava.nano.language import full_caption
from qllava.nano.scenes import COLOURS, SIZE, UNSEEN_PAIRS, nameless_colour, sample_scene


@pytest.fixture(scope="module")
def ids() -> dict[str, int]:
    return tower.vocabulary()


@pytest.fixture(scope="module")
def drawn(ids: dict[str, int]) -> tuple[np.ndarray, torch.Tensor]:
    images, captions = tower.draw(list(range(32)))
    return images, tower.tokens(captions, ids)


@pytest.fixture
def model(ids: dict[str, int]) -> CoCa:
    torch.manual_seed(0)
    return tower.build(len(ids) + 2)


def test_the_model_has_36_patches_and_a_million_parameters(model: CoCa, ids: dict[str, int]) -> None:
    visual = model.visual
    assert visual.conv1.weight.shape == (128, 3, 16, 16)
    assert visual.positional_embedding.shape == (1 + 36, 128)
    assert len(visual.transformer.resblocks) == 6
    assert 0.8e6 < sum(p.numel() for p in visual.parameters()) < 1.2e6
    assert model.text_decoder.text_projection.shape == (128, len(ids) + 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_vocabulary_covers_every_caption_even_of_unseen_pairs(ids: dict[str, int]) -> None:
    assert sorted(ids.values()) == list(range(2, len(ids) + 2))
    assert ids["<end>"] == max(ids.values())
    captions = [full_caption(sample_scene(random.Random(seed), "test", unseen=True)) for seed in range(1000)]
    said = " ".join(captions)
    assert all(f"{colour} {form}" in said for colour, form in UNSEEN_PAIRS)
    tokens = tower.tokens(captions, ids)
    back = {number: word for word, number in ids.items()}
    for caption, row in zip(captions, tokens.tolist(), strict=True):
        start, *line = row[: row.index(ids["<end>"])]
        assert start == 1
        assert " ".join(back[i] for i in line).replace(" ,", ",") == caption
        assert set(row[row.index(ids["<end>"]) + 1 :]) <= {0}


def test_the_longest_caption_has_room(ids: dict[str, int]) -> None:
    line = ", ".join(["a medium orange triangle at the bottom right"] * 5)
    row = tower.tokens([line], ids)[0]
    assert (row == ids["<end>"]).sum() == 1


def test_images_are_of_the_training_split_and_follow_from_their_seed() -> None:
    images, captions = tower.draw([3, 4])
    assert (images.shape, images.dtype) == ((2, SIZE, SIZE, 3), np.uint8)
    again, (caption,) = tower.draw([4])
    assert np.array_equal(images[1:], again) and captions[1] == caption
    said = " ".join(tower.draw(list(range(200)))[1])
    assert not [pair for pair in UNSEEN_PAIRS if " ".join(pair) in said]


def test_a_share_is_painted_in_colours_without_a_name_and_says_none() -> None:
    seeds = list(range(200))
    named, full = tower.draw(seeds)
    mixed, captions = tower.draw(seeds, 0.5)
    without = [k for k in seeds if captions[k] != full[k]]
    assert 70 < len(without) < 130
    for k in seeds:
        colours = [word for word in full[k].replace(",", "").split() if word in COLOURS]
        expected = [w for w in full[k].split() if w not in COLOURS] if k in without else full[k].split()
        # "a red ..." and "an orange ..." may leave another article behind.
        assert [w for w in captions[k].split() if w not in ("a", "an")] == [w for w in expected if w not in ("a", "an")]
        assert colours and np.array_equal(mixed[k], named[k]) == (k not in without)


def test_a_nameless_colour_is_far_from_every_named_one() -> None:
    rng = random.Random(0)
    drawn = [nameless_colour(rng) for _ in range(300)]
    assert len(set(drawn)) > 250
    nearest = min(sum((a - b) ** 2 for a, b in zip(one, c, strict=True)) for one in drawn for c in COLOURS.values())
    assert nearest > 80**2


def test_pixels_are_what_the_shipped_image_processor_gives(drawn: tuple[np.ndarray, torch.Tensor]) -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(tower.MEAN),
        image_std=list(tower.STD),
    )
    images = [Image.fromarray(p) for p in drawn[0][:4]]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower.pixels(drawn[0][:4]), expected, rtol=0, atol=1e-5)


def test_batches_show_every_image_before_one_comes_twice(drawn: tuple[np.ndarray, torch.Tensor]) -> None:
    text = torch.arange(32)[:, None]
    seen = [y for _, y in tower._batches(drawn[0], text, 12, 8, np.random.default_rng(0))]
    assert all(len(y) == 12 for y in seen)
    order = torch.cat(seen)[:, 0].tolist()
    assert sorted(order[:32]) == sorted(order[32:64]) == list(range(32))
    assert order[:32] != order[32:64]


def test_a_round_trains_and_the_converted_tower_computes_the_same(
    model: CoCa, drawn: tuple[np.ndarray, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tower.train_round(model, *drawn, tower.Round(32, 2, 1e-3, 0.0, 1.0), batch=16, seed=0, log=print)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"not trained: {still}"
    assert all(torch.isfinite(p).all() for p in model.parameters())

    model.eval()
    converted = convert_open_clip(model.visual).eval()
    pixels = tower.pixels(drawn[0][:4])
    with torch.no_grad():
        hidden = converted(pixels, output_hidden_states=True).hidden_states
        for layer in (-1, -2):
            out = model.visual.forward_intermediates(
                pixels, indices=[6 + layer], normalize_intermediates=False, output_fmt="NLC"
            )
            torch.testing.assert_close(hidden[layer][:, 1:], out["image_intermediates"][0], rtol=0, atol=1e-5)


def test_every_round_draws_scenes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[range, float, float]] = []
    trained: list[int] = []

    def draw_all(seeds: range, ids: dict[str, int], nameless: float, full: float) -> tuple[np.ndarray, torch.Tensor]:
        ranges.append((seeds, nameless, full))
        return np.zeros((1, SIZE, SIZE, 3), np.uint8), torch.zeros(1, tower.CONTEXT)

    monkeypatch.setattr(tower, "_draw_all", draw_all)
    monkeypatch.setattr(tower, "train_round", lambda *args, **_: trained.append(args[3].steps))
    model = tower.train((tower.Round(5, 2, 1e-3, 0.0, 1.0), tower.Round(7, 3, 1e-3, 0.5, 0.5)))
    assert ranges == [(range(5), 0.0, 1.0), (range(5, 12), 0.5, 0.5)]
    assert trained == [2, 3]
    assert not model.training


def test_drawing_in_parallel_keeps_the_order(ids: dict[str, int]) -> None:
    images, text = tower._draw_all(range(498, 1002), ids, 0.5, 0.5)
    for row, seed in ((0, 498), (499, 997), (500, 998), (503, 1001)):
        one, captions = tower.draw([seed], 0.5, 0.5)
        assert np.array_equal(images[row], one[0])
        assert torch.equal(text[row], tower.tokens(captions, ids)[0])
