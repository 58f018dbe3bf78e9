"""How a model reads is known without its weights, and is the same as with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.conversation import CHATML, VICUNA_V1
from qllava.image_layout import ImageLayout
from qllava.models.assemble import assemble
from qllava.models.reading import Reader, read_model, read_parts, read_tokenizer
from tests.sentencepiece_models import train_sentencepiece
from tests.tiny_models import IMAGE_LAYOUT
from tests.tiny_runs import Tiny


def same(one: Reader, tiny: Tiny) -> None:
    """The reader is that of the assembled model."""
    assembled = assemble(tiny.recipe())
    assert one.template == assembled.template == CHATML
    assert one.image == ImageLayout.of_config(assembled.model.config) == IMAGE_LAYOUT
    assert one.image_token_id == assembled.model.config.image_token_index
    assert one.tokenizer.get_vocab() == assembled.processor.tokenizer.get_vocab()
    assert one.image_processor is not None
    assert one.image_processor.to_dict() == assembled.processor.image_processor.to_dict()


def test_of_parts_and_of_a_run(tiny: Tiny) -> None:
    same(read_parts(str(tiny.language_model), str(tiny.tower)), tiny)
    same(read_model(str(tiny.stage2)), tiny)


def test_of_a_checkpoint_in_llava_hf_layout_without_its_weights(hf_layout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(hf_layout, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    reader = read_model(str(folder))
    assert (reader.template, reader.image) == (CHATML, IMAGE_LAYOUT)


def test_of_nano_before_any_run() -> None:
    reader = read_model("nano")
    assert (reader.template, reader.image.tokens) == (CHATML, 36)


def test_of_a_tokenizer_alone(tiny: Tiny) -> None:
    for path in (tiny.language_model, tiny.language_model / "tokenizer.json"):
        reader = read_tokenizer(path)
        assert (reader.template, reader.image.tokens, reader.image_processor) == (CHATML, 576, None)
        assert reader.tokenizer.encode("<image>", add_special_tokens=False) == [reader.image_token_id]


def test_of_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    assert read_tokenizer(train_sentencepiece(tmp_path) / "tokenizer.model").template == VICUNA_V1


def test_of_llamas_own(shared_data: Path) -> None:
    assert read_tokenizer(shared_data / "llama_tokenizer.model").template == VICUNA_V1


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a .*model: .*; give the folder of a LLaVA, or use --tokenizer"):
        read_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"The tokenizer .*tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="gone does not exist. Give the folder of a model or a hub name"):
        read_tokenizer(tmp_path / "gone")
