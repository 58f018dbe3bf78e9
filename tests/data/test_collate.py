"""Examples become tensors: padded on the right, images in the order of their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from qllava.config import InputError
from qllava.data.collate import Collator
from qllava.data.images import open_image
from tests.tiny_models import make_image

PAD = 9


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path, size in zip(paths, [(40, 40), (50, 20), (10, 30)], strict=True):
        make_image(path.stem, size).save(path)
    return [str(path) for path in paths]


def rows(*images: list[str]) -> list[dict[str, object]]:
    return [
        {"id": f"x{n}", "input_ids": list(range(1, 3 + n)), "labels": [-100, *range(2, 3 + n)], "image_files": names}
        for n, names in enumerate(images)
    ]


def collator(*, pad: bool = False) -> Collator:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return Collator(PAD, LlavaImageProcessor(do_pad=True, **sizes) if pad else CLIPImageProcessor(**sizes))


def test_padding_is_on_the_right_and_never_learned() -> None:
    batch = collator()(rows([], [], []))
    assert batch["input_ids"].tolist() == [[1, 2, PAD, PAD], [1, 2, 3, PAD], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 2, 3, -100], [-100, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert all(batch[key].dtype == torch.long for key in ("input_ids", "labels", "attention_mask"))
    assert len(batch["ids"]) == 3


def test_without_images_there_are_no_pixels() -> None:
    assert "pixel_values" not in collator()(rows([], []))


@pytest.mark.parametrize("pad", [False, True])
def test_pixels_are_in_the_order_of_the_rows(pad: bool, images: list[str]) -> None:
    red, green, blue = images
    made = collator(pad=pad)
    pixels = made(rows([blue], [], [red, green], [blue]))["pixel_values"]
    alone = [
        made.image_processor(images=open_image(Path(path)), return_tensors="pt")["pixel_values"][0]
        for path in (blue, red, green, blue)
    ]
    assert pixels.shape == (4, 3, 32, 32)
    assert torch.equal(pixels, torch.stack(alone))
    assert not torch.equal(pixels[0], pixels[1])


def test_a_broken_image_is_named_with_its_row(images: list[str]) -> None:
    Path(images[1]).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"id x1: .*green\.png: this is not an image"):
        collator()(rows([images[0]], [images[1]]))
