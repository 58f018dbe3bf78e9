"""A small sentencepiece tokenizer with Llama 2's settings, trained in the test.

Llama's tokenizer may not be copied into this repository. Our code relies on its kind, not on its vocabulary: byte
fallback, single digits, a space before every text, and a legacy mode with a space after control tokens too.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from qllava.conversation import IMAGE_TOKEN, TEMPLATES

SIZE = 700
CONTEXTS = Path(__file__).resolve().parent / "cases" / "coco_contexts.jsonl"


def corpus() -> list[str]:
    """Return captions of COCO, the texts of all templates, and numbers."""
    contexts = map(json.loads, CONTEXTS.read_text(encoding="utf-8").splitlines())
    captions = [caption for context in contexts for caption in context["captions"]]
    templates = [template.system for template in TEMPLATES.values()] + ["USER: What is it? ASSISTANT: It is 12."] * 5
    return [*captions, *templates, *("0123456789" for _ in range(5))]


def train_sentencepiece(folder: Path) -> Path:
    """Train a tokenizer, write it as `tokenizer.model` to a folder, and return the folder."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder


def legacy_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder in legacy mode, as LLaVA trained with it, with `<image>` as an added token."""
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer
