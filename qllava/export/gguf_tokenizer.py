"""Tokenizers in GGUF: two kinds, each with the settings by which llama.cpp splits a text as transformers does.

| kind | in tokenizer.json | in GGUF |
|---|---|---|
| `llama` | BPE over characters, bytes where it has none (LLaMA 2, Mistral) | a score per token, by its merge |
| `gpt2` | BPE over bytes (LLaMA 3, SmolLM, Qwen, nano) | the merges, and the name of a rule that cuts words |

Everything is read from the fast tokenizer, because transformers creates one even for a tokenizer.model alone. A
tokenizer that llama.cpp would implement differently is rejected.

V is the number of rows of the embedding. It may be larger than the tokenizer: the remaining rows are unused tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from qllava.config import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CONTRACTIONS + r"\p{N}{1,3}" + _REST
_QWEN_2 = _CONTRACTIONS + r"\p{N}" + _REST

# Steps that split words, and whether a word that is a token is used as a whole -> llama.cpp's name of the rule. Several
# of its names mean the same rule; these are the oldest.
_RULES = {
    (("bytes with words",), False): "gpt-2",
    (("single digits", "bytes with words"), False): "smollm",
    ((_LLAMA_3, "bytes"), True): "llama-bpe",
    ((_LLAMA_3, "bytes"), False): "smaug-bpe",
    ((_QWEN_2, "bytes"), False): "qwen2",
}

_SPACE = "\u2581"  # space in a sentencepiece vocabulary
_NEVER_MERGED = -1e6  # score of a token that no merge creates, below all others


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer in the form of a GGUF file."""

    model: str
    """Kind of the tokenizer: `llama` or `gpt2`."""
    pre: str
    """llama.cpp's name of the rule that splits words."""
    tokens: list[str]
    """Texts of the V tokens."""
    types: list[int]
    """`TokenType` of each of the V tokens."""
    scores: list[float] | None
    """Score of each of the V tokens, for `llama`."""
    merges: list[str] | None
    """Merges in order, for `gpt2`."""
    space_prefix: bool
    """Whether a space is put before a text and before the text after a control token."""


def read_vocabulary(tokenizer: Any, rows: int, name: str) -> Vocabulary:
    """Return the vocabulary of a transformers tokenizer.

    Args:
        tokenizer: Tokenizer of the model.
        rows: Number of rows of the model's embedding (V).
        name: Name of the model, for messages.

    Raises:
        InputError: llama.cpp would split texts differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"The tokenizer of {name} has no fast form (tokenizer.json), which the GGUF export needs.")
    written = json.loads(backend.to_str())
    core = written["model"]
    if core["type"] != "BPE":
        raise InputError(f"The tokenizer of {name} is of type {core['type']}; the GGUF export supports only BPE.")
    tokens, types = _tokens(written, rows, name)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in core["merges"]]
    if core["byte_fallback"]:
        for index, token in enumerate(tokens):
            if token == core["unk_token"] or (core["unk_token"] is None and token == "<unk>"):
                types[index] = TokenType.UNKNOWN
            elif len(token) == 6 and token.startswith("<0x") and types[index] == TokenType.NORMAL:
                types[index] = TokenType.BYTE
        prefix = _space_prefix(written, name)
        return Vocabulary("llama", "default", tokens, types, _scores(tokens, merges), None, prefix)
    joined = [" ".join(merge) for merge in merges]
    return Vocabulary("gpt2", _rule(written, name), tokens, types, None, joined, False)


def write_vocabulary(
    writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, ends: list[int], chat_template: str
) -> None:
    """Write a vocabulary with its special tokens and the chat template.

    Args:
        writer: Writer of the file.
        vocabulary: Vocabulary to write.
        tokenizer: Tokenizer of the model, for its special tokens.
        ends: Ids that end an answer, with or without the tokenizer's own end.
        chat_template: Chat template to write.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    own = tokenizer.eos_token_id
    turn = [id for id in ends if id != own]
    ids = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: own if own is not None else next(iter(ends), None),
        writer.add_eot_token_id: turn[0] if turn else own,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
    }
    for add, id in ids.items():
        if id is not None:
            add(id)
    writer.add_add_bos_token(adds_bos(tokenizer, chat_template))
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template)


def adds_bos(tokenizer: Any, chat_template: str) -> bool:
    """Return whether llama.cpp must put a begin-of-text token before a prompt, as the tokenizer does.

    It must not if the chat template writes the token, because some programs built on llama.cpp would then have two.
    """
    if tokenizer.bos_token is None or "bos_token" in chat_template or tokenizer.bos_token in chat_template:
        return False
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _tokens(written: dict[str, Any], rows: int, name: str) -> tuple[list[str], list[int]]:
    """Return the texts and types of the V tokens; ids without a token are of the type unused."""
    added = {entry["id"]: entry for entry in written["added_tokens"]}
    by_id = {id: token for token, id in written["model"]["vocab"].items()}
    by_id |= {id: entry["content"] for id, entry in added.items()}
    if max(by_id) >= rows:
        raise InputError(
            f"The tokenizer of {name} has {max(by_id) + 1} tokens and its embedding only {rows} rows; "
            "take both from the same model."
        )
    tokens: list[str] = []
    types: list[int] = []
    for id in range(rows):
        tokens.append(by_id.get(id, f"[PAD{id}]"))
        if id in added:
            types.append(TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if id in by_id else TokenType.UNUSED)
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score per token from the rank of its merge: sentencepiece merges the pair with the highest score."""
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    return [-float(rank[token]) if token in rank else _NEVER_MERGED for token in tokens]


def _space_prefix(written: dict[str, Any], name: str) -> bool:
    """Return whether a space is put before a text; raise InputError if the tokenizer's setting is unknown."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    normalizer, cut = written["normalizer"], written["pre_tokenizer"]
    if cut is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True
    if cut is None and normalizer == replace:
        return False
    metaspace = cut is not None and cut["type"] == "Metaspace" and not cut.get("split", True)
    if normalizer is None and metaspace and cut["replacement"] == _SPACE:
        # "first" puts a space before the first text only. Prompts begin with a control token, so none is put.
        return bool(cut["prepend_scheme"] == "always")
    raise InputError(f"The tokenizer of {name} handles spaces in a way that llama.cpp does not know.")


def _rule(written: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name of the rule that splits words."""
    cut = written["pre_tokenizer"] or {"type": "none"}
    steps = cut.get("pretokenizers", [cut])
    known = tuple(_step(step) for step in steps), bool(written["model"].get("ignore_merges"))
    normal = written["normalizer"] is None or written["normalizer"] == {"type": "NFC"}  # typed text is NFC already
    if not normal or known not in _RULES:
        raise InputError(
            f"The tokenizer of {name} splits words by an unsupported rule; the rules of GPT-2, SmolLM, LLaMA 3, Qwen 2 "
            "and nano are supported."
        )
    return _RULES[known]


def _step(step: dict[str, Any]) -> str:
    """Return a short name of one step of splitting; for a split by a regular expression, the expression."""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    if step["type"] == "Digits" and step["individual_digits"]:
        return "single digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes with words" if step.get("use_regex", True) else "bytes"
    return json.dumps(step)
