"""Vocabularies for GGUF: kinds, types, rules, and scores by which sentencepiece's way merges as the merges do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qllava.config import NANO_WEIGHTS, InputError
from qllava.conversation import TEMPLATES
from qllava.export.gguf_tokenizer import Vocabulary, adds_bos, read_vocabulary, write_vocabulary
from tests.tiny_models import make_tiny_tokenizer
from tests.tiny_runs import refusal

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("What colour is the circle?", "  two  spaces\n\nand lines\t", "Größe 12345 😀 ok", "USER: Where? ASSISTANT:")


def split(pattern: str) -> Any:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def byte_level(cut: Any, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = cut
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


def characters(cut: Any = None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A BPE over characters with byte fallback, as LLaMA 2 has it: `▁a`, `ab`, `▁ab`, in this order."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b")]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if cut is not None:
        core.pre_tokenizer = cut
    if normalizer is not None:
        core.normalizer = normalizer
    core.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def by_scores(text: str, vocabulary: Vocabulary) -> list[int]:
    """Sentencepiece's way, which is llama.cpp's: of all neighbours merge those whose piece scores highest."""
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    scores = vocabulary.scores
    assert scores is not None
    pieces = list((" " * vocabulary.space_prefix + text).replace(" ", "▁"))
    while True:
        found = [(scores[ids[p]], -i) for i in range(len(pieces) - 1) if (p := pieces[i] + pieces[i + 1]) in ids]
        if not found:
            break
        at = -max(found)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    out: list[int] = []
    for piece in pieces:
        out += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return out


class TestBytes:
    @pytest.mark.parametrize(
        ("cut", "ignore_merges", "rule"),
        [
            (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
            (
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                ),
                False,
                "smollm",
            ),
            (split(LLAMA_3), True, "llama-bpe"),
            (split(LLAMA_3), False, "smaug-bpe"),
            (split(LLAMA_3.replace("{1,3}", "")), False, "qwen2"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_the_rule_is_recognized(self, cut: Any, ignore_merges: bool, rule: str) -> None:
        tokenizer = byte_level(cut, ignore_merges=ignore_merges)
        found = read_vocabulary(tokenizer, len(tokenizer), "x")
        assert (found.model, found.pre, found.space_prefix, found.scores) == ("gpt2", rule, False, None)

    @pytest.mark.parametrize(
        "cut",
        [
            split(LLAMA_3.replace("{1,3}", "{1,2}")),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            pre_tokenizers.Whitespace(),
        ],
    )
    def test_another_rule_is_refused(self, cut: Any) -> None:
        tokenizer = byte_level(cut)
        with pytest.raises(InputError) as caught:
            read_vocabulary(tokenizer, len(tokenizer), "my model")
        assert "my model splits words" in refusal(caught.value)

    def test_a_normalizer_is_refused(self) -> None:
        tokenizer = byte_level(split(LLAMA_3))
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(InputError, match="splits words"):
            read_vocabulary(tokenizer, len(tokenizer), "x")

    def test_nano(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NANO_WEIGHTS / "llama" / "tokenizer.json"))
        found = read_vocabulary(tokenizer, len(tokenizer) + 2, "nano")
        assert found.pre == "smaug-bpe"
        vocab = tokenizer.get_vocab()
        assert [vocab[token] for token in found.tokens[:-2]] == list(range(len(tokenizer)))
        assert found.merges is not None and len(found.merges) == len(set(found.merges)) > 1000
        assert all(merge.count(" ") == 1 for merge in found.merges)
        kinds = dict(zip(found.tokens, found.types, strict=True))
        assert kinds["<|im_end|>"] == TokenType.CONTROL and kinds["a"] == TokenType.NORMAL
        assert found.types[-2:] == [TokenType.UNUSED] * 2

    def test_an_added_word_is_the_users(self) -> None:
        tokenizer = make_tiny_tokenizer()
        tokenizer.add_tokens(["hello"])
        found = read_vocabulary(tokenizer, len(tokenizer), "x")
        assert found.tokens[-1] == "hello" and found.types[-1] == TokenType.USER_DEFINED


class TestCharacters:
    @pytest.mark.parametrize(
        ("how", "prefix"),
        [
            ({"cut": metaspace("always")}, True),
            ({"cut": metaspace("first")}, False),
            ({"cut": metaspace("never")}, False),
            (
                {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
                True,
            ),
            ({"normalizer": normalizers.Replace(" ", "▁")}, False),
        ],
    )
    def test_spaces(self, how: dict[str, Any], prefix: bool) -> None:
        found = read_vocabulary(characters(**how), 265, "x")
        assert (found.model, found.pre, found.space_prefix, found.merges) == ("llama", "default", prefix, None)

    @pytest.mark.parametrize(
        "how", [{}, {"cut": pre_tokenizers.Metaspace(split=True)}, {"normalizer": normalizers.NFKC()}]
    )
    def test_another_way_with_spaces_is_refused(self, how: dict[str, Any]) -> None:
        with pytest.raises(InputError) as caught:
            read_vocabulary(characters(**how), 265, "my model")
        assert "spaces" in refusal(caught.value)

    def test_types_and_scores(self) -> None:
        found = read_vocabulary(characters(metaspace("always")), 267, "x")
        assert found.types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        assert found.types[3:259] == [TokenType.BYTE] * 256
        assert found.types[259:] == [TokenType.NORMAL] * 6 + [TokenType.UNUSED] * 2
        assert found.scores is not None
        assert found.scores[-5:-2] == [0.0, -1.0, -2.0] and found.scores[-1] < -1e5
        assert found.tokens[-2:] == ["[PAD265]", "[PAD266]"]

    def test_llama_2_is_cut_alike(self, sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer, image = sentencepiece_tokenizer, len(sentencepiece_tokenizer) - 1
        found = read_vocabulary(tokenizer, image + 64, "Vicuna")
        assert found.model == "llama" and found.space_prefix
        assert found.tokens[image] == "<image>" and found.types[image] == TokenType.CONTROL
        for text in (*TEXTS[:1], *TEXTS[2:], "\nWhat is it?", "x" * 40, "naïve café 日本語"):
            assert by_scores(text, found) == tokenizer.encode(text, add_special_tokens=False), text


class TestOtherKinds:
    def test_not_bpe(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        with pytest.raises(InputError, match="WordLevel"):
            read_vocabulary(tokenizer, 1, "x")

    def test_no_fast_form(self) -> None:
        with pytest.raises(InputError, match="no fast form"):
            read_vocabulary(object(), 1, "x")


class TestHeader:
    def written(self, path: Path, tokenizer: Any, ends: list[int], chat_template: str) -> dict[str, Any]:
        writer = GGUFWriter(path, "llama")
        vocabulary = read_vocabulary(tokenizer, len(tokenizer), "x")
        write_vocabulary(writer, vocabulary, tokenizer, ends, chat_template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return {name: field.contents() for name, field in GGUFReader(path).fields.items()}

    def test_special_tokens(self, tmp_path: Path) -> None:
        tokenizer = make_tiny_tokenizer()
        end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
        header = self.written(tmp_path / "x.gguf", tokenizer, [end, other], "{{ messages }}")
        assert header["tokenizer.ggml.eos_token_id"] == end and header["tokenizer.ggml.eot_token_id"] == other
        assert header["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
        assert "tokenizer.ggml.bos_token_id" not in header
        assert header["tokenizer.ggml.add_bos_token"] is False and header["tokenizer.ggml.add_eos_token"] is False
        assert header["tokenizer.chat_template"] == "{{ messages }}"
        assert header["tokenizer.ggml.model"] == "gpt2" and header["tokenizer.ggml.pre"] == "gpt-2"
        header = self.written(tmp_path / "y.gguf", tokenizer, [end], "")
        assert header["tokenizer.ggml.eot_token_id"] == end

    def test_the_begin_of_text_is_not_doubled(self) -> None:
        tokenizer = characters(metaspace("always"))
        assert not adds_bos(tokenizer, "")
        begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = begins
        assert tokenizer("a")["input_ids"][0] == 1
        assert adds_bos(tokenizer, "{{ messages }}")
        assert not adds_bos(tokenizer, "<s>{{ messages }}")
        assert not adds_bos(tokenizer, TEMPLATES["vicuna_v1"].chat_template())
