"""Examples before a question: which ones, in which order, and never one that tells the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation, Turn
from qllava.data.formats import Example, read_examples
from qllava.data.problems import Place
from qllava.evaluation.shots import Shots, Words, embed_images, last_question, with_shots
from qllava.evaluation.vqa import evaluate, evaluate_file
from qllava.inference import load
from tests.tiny_models import make_image, make_tiny_llava

TEXTS = ["What colour is the dog?", "How many dogs are there?", "What is the colour of the cat?", "Is it a dog, a dog?"]


def row(question: str, answer: str, image: str | None = None) -> Example:
    images = (Path(image),) if image else ()
    turns = (Turn("user", IMAGE_TOKEN + "\n" + question if image else question), Turn("assistant", answer))
    return Example(question, images, Conversation(turns), Place("pool.json", row=1), "kind")


POOL = [row(text, str(number)) for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("asked", ["What colour is the cat?", "dog dog dog", "elephants only", ""])
def test_similarity_of_texts_is_scikit_learns(asked: str) -> None:
    theirs = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, smooth_idf=False)
    wanted = (theirs.fit_transform(TEXTS) @ theirs.transform([asked]).T).toarray()[:, 0]
    assert Words(TEXTS).similarity(asked) == pytest.approx(wanted)


def test_the_nearest_question_stands_last() -> None:
    (asked,) = with_shots([row("What colour is the cow?", "black")], Shots(2, POOL, "text"))
    said = [turn.content for turn in asked.conversation.turns]
    assert said == [TEXTS[2], "2", TEXTS[0], "0", "What colour is the cow?", "black"]
    assert (asked.id, asked.type) == ("What colour is the cow?", "kind")


def test_examples_at_random_follow_the_seed() -> None:
    pool = [row(f"q{number}?", str(number)) for number in range(50)]
    questions = [row(f"asked {number}?", "x") for number in range(20)]

    def chosen(seed: int) -> list[list[str]]:
        shots = Shots(3, pool, "random", seed)
        return [[turn.content for turn in one.conversation.turns[1:-2:2]] for one in with_shots(questions, shots)]

    assert chosen(1) == chosen(1) != chosen(2)
    assert all(len(set(one)) == 3 for one in chosen(1))
    assert len({answer for one in chosen(1) for answer in one}) > 25  # another draw for each question


def test_no_example_tells_the_answer(tmp_path: Path) -> None:
    pool = [row("What?", "a", "1.png"), row("What?", "b", "2.png"), row("Which?", "c", "1.png"), row("Who?", "d")]
    for choose in ("random", "text"):
        found = with_shots([row("What?", "a", "1.png")], Shots(2, pool, choose))  # type: ignore[arg-type]
        assert Path("1.png") not in found[0].images[:-1]
        assert found[0].images[-1] == Path("1.png")
        only = with_shots([row("Who?", "d")], Shots(3, pool, choose))[0]  # type: ignore[arg-type]
        assert "d" not in [turn.content for turn in only.conversation.turns[:-1]]
    with pytest.raises(InputError, match="pool has 2 examples for this question .*expected 3"):
        with_shots([row("What?", "a", "1.png")], Shots(3, pool))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A data file and a pool over images of two kinds; the tiny tower sees which is like which."""
    (tmp_path / "model").mkdir()
    make_tiny_llava(tmp_path / "model")
    for name, colour in {"r1": "red", "r2": (250, 5, 0), "b1": "blue", "b2": (0, 5, 250)}.items():
        make_image(colour).save(tmp_path / f"{name}.png")
    asked = [{"question": "What?", "image": f"{name}1.png", "answer": name} for name in "rb"]
    pool = [{"question": "What?", "image": f"{name}2.png", "answer": name} for name in "rb"]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "pool.json").write_text(json.dumps(pool))
    return tmp_path


def test_examples_with_similar_images(images: Path) -> None:
    chat = load(str(images / "model"))
    vectors = embed_images(chat, [images / f"{name}.png" for name in ("r1", "r2", "b1", "b2")])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)
    near = vectors @ vectors.T
    assert near[0, 1] > near[0, 2] and near[2, 3] > near[2, 0]
    asked, pool = (read_examples(images / name) for name in ("asked.json", "pool.json"))
    found = with_shots(asked, Shots(1, pool, "picture"), chat)
    assert [one.conversation.turns[1].content for one in found] == ["r", "b"]
    assert [len(one.images) for one in found] == [2, 2]
    with pytest.raises(InputError, match=r"no image to choose by"):
        with_shots(asked, Shots(1, [*pool, row("?", "x")], "picture"), chat)


@pytest.mark.parametrize("choose", ["random", "text", "picture"])
def test_batched_equals_single(images: Path, choose: Any) -> None:
    chat = load(str(images / "model"))
    asked, pool = (read_examples(images / name) for name in ("asked.json", "pool.json"))
    prompts = with_shots([*asked, *asked[:1]], Shots(1, pool, choose), chat)
    assert evaluate(chat, prompts, batch_size=3).answers == evaluate(chat, prompts, batch_size=1).answers


def test_the_file_of_answers_shows_the_question_alone(images: Path) -> None:
    out, html = images / "out.jsonl", images / "page.html"
    model = str(images / "model")
    evaluate_file(model, images / "asked.json", out=out, html=html, shots=2, pool=images / "pool.json")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(one["images"]) for one in rows] == [1, 1]
    assert [one["question"] for one in rows] == ["What?", "What?"]
    assert "2 examples before each question, drawn at random" in html.read_text()


def test_the_last_question_of_several() -> None:
    turns = (Turn("user", "<image>\nA?"), Turn("assistant", "a"), Turn("user", "B?"), Turn("assistant", "b"))
    assert last_question(Example("1", (Path("x.png"),), Conversation(turns), Place("f"))) == "B?"


def test_images_are_looked_at_in_halves_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = load(str(make_tiny_llava(tmp_path / "model")))
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        make_image(path.stem).save(path)
    expected, tower = embed_images(chat, paths), type(chat.model.model.vision_tower)
    plain, most, sizes = tower.forward, 1, []

    def forward(self: Any, pixels: torch.Tensor, **rest: Any) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, pixels, **rest)

    monkeypatch.setattr(tower, "forward", forward)
    np.testing.assert_allclose(embed_images(chat, paths), expected, atol=1e-6)
    assert sizes == [3, 1, 1, 1]
    most = 0
    with pytest.raises(InputError, match=r"There is not enough memory to compute features of the image .*red\.png"):
        embed_images(chat, paths)
