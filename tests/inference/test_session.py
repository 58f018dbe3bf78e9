"""A conversation that goes on: what the model reads, asking again, stopping; draws that can be repeated; images."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from qllava.config import InputError
from qllava.conversation import Conversation
from qllava.inference import Chat, Session, Settings, about, keep_image, label, limits
from qllava.inference.generate import SeededSampling
from qllava.inference.kept_images import LONGEST
from tests.tiny_models import make_image, make_tiny_llava, make_tiny_model, make_tiny_processor

SHORT = Settings(max_new_tokens=8)


@pytest.fixture(scope="module")
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Conversation, list[Path]]]:
    """What reaches the model, which then says a word."""
    seen: list[tuple[Conversation, list[Path]]] = []

    def reply(_: Chat, conversation: Conversation, images: list[Path], **__: Any) -> Iterator[str]:
        seen.append((conversation, images))
        yield "Red"
        yield "."

    monkeypatch.setattr(Chat, "reply", reply)
    return seen


def test_what_was_answered_is_read_again_and_what_was_not_is_left_out(
    chat: Chat, asked: list[tuple[Conversation, list[Path]]], tmp_path: Path
) -> None:
    session = Session()
    session.ask("What?", [tmp_path / "a.png"])
    assert list(session.answer(chat, SHORT)) == ["Red", "Red."]
    session.ask("Lost").trouble = "The image is none"
    session.ask("And now?", [tmp_path / "b.png"])
    list(session.answer(chat, Settings(system="Be brief.")))
    conversation, images = asked[-1]
    assert [turn.content for turn in conversation.turns] == ["<image>\nWhat?", "Red.", "<image>\nAnd now?"]
    assert conversation.system == "Be brief." and images == [tmp_path / "a.png", tmp_path / "b.png"]


def test_asking_again_forgets_what_came_after(chat: Chat, asked: list[Any]) -> None:
    session = Session()
    for question in ("One?", "Two?", "Three?"):
        session.ask(question)
        list(session.answer(chat, SHORT))
    session.ask_again(1, "Two, rather?")
    list(session.answer(chat, SHORT))
    assert [exchange.question for exchange in session.exchanges] == ["One?", "Two, rather?"]
    assert [turn.content for turn in asked[-1][0].turns] == ["One?", "Red.", "Two, rather?"]
    with pytest.raises(InputError, match="Ask a question first"):
        Session().ask_again()


def test_stop_ends_the_thread_even_if_nobody_reads_on(chat: Chat) -> None:
    session = Session()
    session.ask("Talk")
    pieces = session.answer(chat, Settings(max_new_tokens=400))
    next(pieces)
    session.stop()
    (worker,) = [thread for thread in threading.enumerate() if thread.name == "qllava-generate"] or [None]
    if worker is not None:  # a tiny model may be done already
        worker.join(5)
        assert not worker.is_alive()
    list(pieces)
    assert session.exchanges[0].stop.is_set() and session.exchanges[0].over


def test_a_seed_repeats_a_draw_whatever_else_is_drawn(chat: Chat) -> None:
    def draw(seed: int) -> str:
        session = Session()
        session.ask("What?")
        return list(session.answer(chat, Settings(temperature=1.0, max_new_tokens=16, seed=seed)))[-1]

    first = draw(5)
    torch.rand(7)
    assert draw(5) == first
    assert len({draw(seed) for seed in range(6)}) > 1


def test_seeded_sampling_draws_from_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = SeededSampling(temperature=0.5, seed=0)
    rows = sampling(torch.zeros(20_000, 1, dtype=torch.long), logits.expand(20_000, -1))
    shares = torch.bincount(rows.argmax(-1), minlength=4) / 20_000
    assert torch.allclose(shares, torch.softmax(logits[0] / 0.5, -1), atol=0.01)


def test_a_kept_image_is_upright_pixels_under_their_hash(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "a camera that says where it was"
    make_image("red", (40, 20)).save(tmp_path / "in.jpg", exif=turned)
    kept = keep_image(tmp_path / "in.jpg", tmp_path, "in.jpg")
    assert kept.stem == hashlib.sha256(kept.read_bytes()).hexdigest()
    with Image.open(kept) as image:
        assert image.size == (20, 40) and not image.getexif() and image.mode == "RGB"
    Image.new("RGB", (5000, 1000)).save(tmp_path / "wide.png")
    with Image.open(keep_image(tmp_path / "wide.png", tmp_path, "wide.png")) as image:
        assert image.size == (LONGEST, round(LONGEST / 5))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_kept_image_is_its_pixels_in_srgb_and_nothing_else(tmp_path: Path, form: str) -> None:
    """A colour profile, EXIF and text may hold anything, a place or a name; the profile's colours are applied."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.index(b"rXYZ", 128)
    place = int.from_bytes(profile[at + 4 : at + 8], "big")  # of the red primary: X, Y, Z behind 8 bytes
    profile[place + 8 : place + 20] = profile[place + 12 : place + 20] + profile[place + 8 : place + 12]
    exif, text = Image.Exif(), PngInfo()
    exif[0x010F] = "the secret"
    text.add_text("Comment", "the secret")
    more = {"pnginfo": text} if form == "PNG" else {}
    original = Image.new("RGB", (40, 20), (200, 30, 60))
    original.save(tmp_path / "in", form, icc_profile=bytes(profile) + b"the secret", exif=exif, **more)
    kept = keep_image(tmp_path / "in", tmp_path, "in")
    content = kept.read_bytes()
    chunks, at = [], 8
    while at < len(content):
        chunks.append(content[at + 4 : at + 8])
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    with Image.open(kept) as image:
        change = [abs(a - b) for a, b in zip(image.getpixel((5, 5)), (200, 30, 60), strict=True)]
    assert max(change) > 20, "the colours are those of the profile"
    original.save(tmp_path / "damaged", form, icc_profile=b"the secret" * 50)
    with Image.open(keep_image(tmp_path / "damaged", tmp_path, "in")) as image:
        assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), (200, 30, 60), strict=True)) < 6


@pytest.mark.parametrize("name", ["letter.png", "script.png"])
def test_what_is_no_image_of_a_known_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(InputError, match=rf"^{name} is not an image") as error:
        keep_image(tmp_path / name, tmp_path, name)
    assert str(tmp_path) not in str(error.value)


def test_a_card_names_no_path(tmp_path: Path) -> None:
    folder = make_tiny_llava(tmp_path / "mine")
    (folder / "merge.json").write_text(
        json.dumps({"base_model": "llava", "run": "r", "template": "chatml", "kl_per_token": 1e-6, "verified": True,
                    "results": {"stage2": 0.953}})
    )  # fmt: skip
    chat = Chat(make_tiny_model(make_tiny_processor()), make_tiny_processor(), str(folder))
    facts = about(chat)
    assert label(chat) == "mine" == facts["Model"]
    assert facts["Base"] == "llava, with the adapter of r merged" and "verified" in facts["Merge"]
    assert facts["Held-out questions"] == "95.3 % correct" and facts["Template"] == "chatml"
    assert str(tmp_path) not in str(facts)
    (folder / "merge.json").write_text("{half")
    assert "Base" not in about(chat)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("results.json", {"stage2": 0.9, "unseen_pairs": 0.8}, True),
        ("merge.json", {"results": {"unseen_pairs": 0.8}}, True),
        ("results.json", {"eval_loss": 1.0}, False),
        ("merge.json", {"results": None}, False),
        ("merge.json", {"results": {"eval_exact_match": 0.5}}, False),
    ],
)
def test_what_a_run_on_nano_s_own_examples_can_be_asked(tmp_path: Path, file: str, content: Any, said: bool) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    chat = Chat(make_tiny_model(make_tiny_processor()), make_tiny_processor(), str(tmp_path))
    assert limits(chat).startswith("This model knows drawn shapes only") == said == bool(limits(chat))
