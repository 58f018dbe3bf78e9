"""Fixtures for all tests: the cases from outside, which lie beside the clone and may be absent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from qllava.conversation import IMAGE_TOKEN


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of cases that nobody here made up (`../shared/data`)."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the reference cases in ../shared/data are not on this machine")
    return folder


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The Llama-2 tokenizer in legacy mode, as LLaVA trained with it, and `<image>` as one more token."""
    folder = tmp_path_factory.mktemp("llama_tokenizer")
    shutil.copy(shared_data / "llama_tokenizer.model", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer
