"""Ids and learned tokens equal those of LLaVA's own preprocessing, for every case that was run on the original code."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase

from qllava.conversation import IMAGE_TOKEN, TEMPLATES
from qllava.data.encode import IGNORE_INDEX, Encoder
from qllava.data.formats import read_examples

TOKENS_PER_IMAGE = 5


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "llama_2"])
def test_ids_and_labels(
    template: str, shared_data: Path, llama_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cases = json.loads((shared_data / "llava_labels.json").read_text(encoding="utf-8"))[template]
    assert cases
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [
        {"id": name, "conversations": case["conversation"]}
        | ({"image": "a.png"} if IMAGE_TOKEN in str(case["conversation"]) else {})
        for name, case in cases.items()
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    image_id = llama_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    encoder = Encoder(llama_tokenizer, TEMPLATES[template], image_id, TOKENS_PER_IMAGE)
    samples = encoder.encode_all(read_examples(tmp_path / "train.json"))
    assert [sample.id for sample in samples] == list(cases)
    for sample in samples:
        ids, labels = [], []
        pairs = zip(sample.input_ids, sample.labels, strict=True)
        for is_image, run in groupby(pairs, lambda pair: pair[0] == image_id):
            tokens = list(run)
            if is_image:
                assert tokens == [(image_id, IGNORE_INDEX)] * TOKENS_PER_IMAGE
                tokens = [(-200, IGNORE_INDEX)]
            ids += [id for id, _ in tokens]
            labels += [label for _, label in tokens]
        assert ids == cases[sample.id]["input_ids"], sample.id
        assert labels == cases[sample.id]["labels"], sample.id


def test_template_words_in_an_answer_are_learned(llama_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """LLaVA finds answers by the template's words, and masks such a sample whole. Spans do not search."""
    answer = "He wrote ASSISTANT: and USER: on the board."
    turns = [{"from": "human", "value": "What did he write?"}, {"from": "gpt", "value": answer}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": turns}]), encoding="utf-8")
    encoder = Encoder(llama_tokenizer, TEMPLATES["vicuna_v1"], llama_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), 1)
    (sample,) = encoder.encode_all(read_examples(tmp_path / "train.json"))
    learned = [label for label in sample.labels if label != IGNORE_INDEX]
    assert llama_tokenizer.decode(learned) == f"{answer}</s>"
