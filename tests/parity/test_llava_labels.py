"""Ids and learned tokens equal those of LLaVA's own preprocessing, for every case that was run on the original code.

Those cases and Llama's tokenizer may not be copied, and are read from `../shared`. `plainly` computes the same a second
time, with sentencepiece itself and by counting: it is held against the original's cases there, and against our encoder
with a tokenizer that is trained here, so that a clone alone tests the labels too.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from qllava.conversation import IMAGE_TOKEN, TEMPLATES
from qllava.data.encode import IGNORE_INDEX, Encoder
from qllava.data.formats import read_examples
from qllava.image_layout import ImageLayout
from tests.sentencepiece_models import legacy_tokenizer, train_sentencepiece

TOKENS_PER_IMAGE = 5
IMAGE, BOS, EOS = -200, 1, 2
OF_LLAVA = ["vicuna_v1", "plain", "llama_2"]
Turns = list[dict[str, str]]


def talk(*said: str, first: str = "human") -> Turns:
    """Turns of a conversation in LLaVA's format."""
    sides = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": sides[n % 2], "value": text} for n, text in enumerate(said)]


CONVERSATIONS = {
    "an image": talk("<image>\nWhat stands by the river?", "A red bus, parked."),
    "several rounds": talk(
        "<image>\nHow many dogs are there?", "Two.", "What do they do?", "One sleeps; the other eats a shoe.",
        "Is it night?\nAnswer with one word.", "No",
    ),
    "no image": talk("Name an even number.", "48", "And an odd one?", "7"),
    "the answering side begins": talk("Hello!", "<image>\nWhich colour has the door?", "Green.", first="gpt"),
    "numbers, letters and words of no vocabulary": talk(
        "<image>\nWhich?\nA. 12.50\nB. 1,250\nAnswer with the option's letter.", "B: naïve café, 日本"
    ),
}  # fmt: skip


def plainly(model: SentencePieceProcessor, template: str, turns: Turns) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation: the rounds one after the other, text between control tokens cut by itself.

    What is learned is what comes behind as many tokens as the question alone has.
    """
    system = TEMPLATES[template].system
    turns = turns[turns[0]["from"] == "gpt" :]
    rounds = [(turns[n]["value"], turns[n + 1]["value"]) for n in range(0, len(turns), 2)]

    def cut(text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(IMAGE_TOKEN)):
            ids += ([IMAGE] if number else []) + (model.encode(part) if part else [])
        return ids

    ids, labels = list[int](), list[int]()
    for number, (question, answer) in enumerate(rounds):
        if template == "plain":
            asked, said, end = IMAGE_TOKEN, f"{answer}\n", []
        elif template == "vicuna_v1":
            asked, said, end = f"USER: {question} ASSISTANT:", f" {answer}", [EOS]
            asked = asked if number else f"{system} {asked}"
        else:
            asked = question if number else f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
            asked, said, end = f"[INST] {asked} [/INST]", f" {answer} ", [EOS]
        begin = [BOS] if template == "llama_2" or number == 0 else []
        whole, before = begin + cut(asked + said) + end, len(begin + cut(asked))
        ids += whole
        labels += [IGNORE_INDEX] * before + whole[before:]
    return ids, labels


def encoded(
    template: str, conversations: dict[str, Turns], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, tuple[list[int], list[int]]]:
    """Ids and labels as our encoder gives them, each image as the one id that LLaVA gives it."""
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    rows = [
        {"id": name, "conversations": turns} | ({"image": "a.png"} if IMAGE_TOKEN in str(turns) else {})
        for name, turns in conversations.items()
    ]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    encoder = Encoder(tokenizer, TEMPLATES[template], image_id, ImageLayout(1, TOKENS_PER_IMAGE))
    samples = encoder.encode_all(read_examples(folder / "train.json"))
    assert [sample.id for sample in samples] == list(conversations)
    found = {}
    for sample in samples:
        ids, labels = [], []
        pairs = zip(sample.input_ids, sample.labels, strict=True)
        for is_image, run in groupby(pairs, lambda pair: pair[0] == image_id):
            tokens = list(run)
            if is_image:
                assert tokens == [(image_id, IGNORE_INDEX)] * TOKENS_PER_IMAGE
                tokens = [(IMAGE, IGNORE_INDEX)]
            ids += [id for id, _ in tokens]
            labels += [label for _, label in tokens]
        found[sample.id] = ids, labels
    return found


def of_llava(template: str, shared_data: Path) -> dict[str, Any]:
    """The cases that were run on the original code."""
    cases: dict[str, Any] = json.loads((shared_data / "llava_labels.json").read_text(encoding="utf-8"))[template]
    assert cases
    return cases


@pytest.mark.parametrize("template", OF_LLAVA)
def test_ids_and_labels(
    template: str, shared_data: Path, llama_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cases = of_llava(template, shared_data)
    conversations = {name: case["conversation"] for name, case in cases.items()}
    found = encoded(template, conversations, llama_tokenizer, tmp_path)
    assert found == {name: (case["input_ids"], case["labels"]) for name, case in cases.items()}


@pytest.mark.parametrize("template", OF_LLAVA)
def test_the_plain_method_gives_what_llava_gives(template: str, shared_data: Path) -> None:
    model = SentencePieceProcessor(model_file=str(shared_data / "llama_tokenizer.model"))
    for name, case in of_llava(template, shared_data).items():
        assert plainly(model, template, case["conversation"]) == (case["input_ids"], case["labels"]), name


class TestWithATokenizerTrainedHere:
    """What a clone can run without Llama's tokenizer."""

    @pytest.fixture(scope="class")
    def both(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedTokenizerBase, SentencePieceProcessor]:
        """The tokenizer as our code uses it, and sentencepiece's own."""
        folder = train_sentencepiece(tmp_path_factory.mktemp("labels"))
        return legacy_tokenizer(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    @pytest.mark.parametrize("template", OF_LLAVA)
    def test_ids_and_labels(
        self, template: str, both: tuple[PreTrainedTokenizerBase, SentencePieceProcessor], tmp_path: Path
    ) -> None:
        captions = {name: turns for name, turns in CONVERSATIONS.items() if len(turns) == 2 and "<image>" in str(turns)}
        cases = captions if template == "plain" else CONVERSATIONS
        found = encoded(template, cases, both[0], tmp_path)
        assert found == {name: plainly(both[1], template, turns) for name, turns in cases.items()}

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        template=st.sampled_from(["vicuna_v1", "llama_2"]),
        said=st.lists(
            st.lists(st.sampled_from(["bus", "a", "12", "é", "USER", "7.", "\n", "on", "日本", "[INST"]), min_size=1),
            min_size=2,
            max_size=6,
        ),
    )
    def test_whatever_is_said(
        self,
        both: tuple[PreTrainedTokenizerBase, SentencePieceProcessor],
        tmp_path: Path,
        template: str,
        said: list[list[str]],
    ) -> None:
        texts = [" ".join(words).strip() or "x" for words in said[: len(said) // 2 * 2]]
        turns = talk(*texts)
        assert encoded(template, {"x": turns}, both[0], tmp_path) == {"x": plainly(both[1], template, turns)}


def test_template_words_in_an_answer_are_learned(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """LLaVA finds answers by the template's words, and masks such a sample whole. Spans do not search."""
    answer = "He wrote ASSISTANT: and USER: on the board."
    turns = talk("What did he write?", answer)
    _, labels = encoded("vicuna_v1", {"1": turns}, sentencepiece_tokenizer, tmp_path)["1"]
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert sentencepiece_tokenizer.decode(learned) == f"{answer}</s>"
