"""Noun phrases of captions: the simple rule by examples and properties, and the way through spaCy."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllava.config import InputError
from qllava.synthesis import phrases
from qllava.synthesis.phrases import FUNCTION, NOUNS, VERBS, chunker, simple_phrases, spacy_phrase


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A man in a red jacket is riding his horse along the beach.", ["man", "red jacket", "horse", "beach"]),
        ("Two dogs and 3 cats, sitting on the sofa", ["dogs", "cats", "sofa"]),
        ("the living room of a building with a high ceiling", ["living room", "building", "high ceiling"]),
        ("a long-haired girl on a bunk-bed", ["girl", "bunk-bed"]),
        ("the family quickly walked through a crowded street", ["family", "street"]),
        ("A man's t-shirt, a man\u2019s hat, a man 's tie", ["man's t-shirt", "man's hat", "man", "tie"]),
        ("CAFE\u0301 table; CAF\u00c9 table", ["caf\u00e9 table", "caf\u00e9 table"]),
        ("<PERSON> at the 5th avenue_sign", ["person", "5th avenue", "sign"]),
        ("king ring bed red fly", ["king ring bed red fly"]),
        ("it is there", []),
        ("", []),
        (" ?! 12 ", []),
    ],
)
def test_the_simple_rule(caption: str, found: list[str]) -> None:
    assert simple_phrases(caption) == found


def test_no_word_stands_in_two_lists() -> None:
    assert not FUNCTION & VERBS and not FUNCTION & NOUNS and not VERBS & NOUNS
    assert all(len(word) >= 5 and word.endswith(("ing", "ed", "ly")) for word in NOUNS), "others need no exception"
    assert not any(len(word) >= 5 and word.endswith(("ing", "ed")) for word in VERBS), "the ending says it already"


@given(st.text())
def test_phrases_of_any_text_are_words_in_lower_case(text: str) -> None:
    for phrase in simple_phrases(text):
        phrase.encode()
        assert phrase and phrase == phrase.strip() and "  " not in phrase
        assert not set(phrase.split()) & (FUNCTION | VERBS)
        assert all(word[0].isalnum() for word in phrase.split())


@given(st.lists(st.text(alphabet="ab,. ", max_size=12), max_size=6))
def test_captions_and_phrases_go_in_step(captions: list[str]) -> None:
    assert list(chunker("simple").phrases(captions)) == [simple_phrases(caption) for caption in captions]


# spaCy, played by a stand-in that is there on every machine


@dataclass
class Word:
    """As much of a spaCy token as is looked at."""

    text: str
    pos_: str = "NOUN"

    @property
    def lower_(self) -> str:
        return self.text.lower()

    @property
    def is_space(self) -> bool:
        return not self.text.strip()


@pytest.mark.parametrize(
    ("chunk", "phrase"),
    [
        ([Word("The", "DET"), Word("Red", "ADJ"), Word("bus")], "red bus"),
        ([Word("his", "PRON"), Word("horse")], "horse"),
        ([Word("all", "DET"), Word("the", "DET"), Word("man"), Word("'s", "PART"), Word("hats")], "man 's hats"),
        ([Word("\n", "SPACE"), Word("a", "DET"), Word("cat"), Word(" ", "SPACE")], "cat"),
        ([Word("it", "PRON")], ""),
        ([Word("two", "NUM"), Word("dogs")], "two dogs"),
    ],
)
def test_determiners_come_off_spacys_chunks(chunk: Any, phrase: str) -> None:
    assert spacy_phrase(chunk) == phrase


class Pipeline:
    """Finds one chunk per sentence: all of its words."""

    def pipe(self, texts: Iterable[str], batch_size: int) -> Iterator[types.SimpleNamespace]:
        for text in texts:
            sentences = [sentence.split() for sentence in text.split(".") if sentence.strip()]
            chunks = [[Word(word, "DET" if word == "a" else "NOUN") for word in words] for words in sentences]
            yield types.SimpleNamespace(noun_chunks=chunks)


@pytest.fixture
def spacy_stand_in(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A spaCy and its model, installed as far as Python can see."""
    module = types.ModuleType("spacy")
    module.load = lambda name, exclude: Pipeline()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", module)
    monkeypatch.setattr(phrases, "version", {"spacy": "3.8.1", phrases.SPACY_MODEL: "3.8.0"}.__getitem__)
    return module


def test_spacy_is_taken_where_it_is_installed(spacy_stand_in: types.ModuleType) -> None:
    found = chunker()
    assert found.name == "spacy" and "spaCy 3.8.1" in found.about and "3.8.0" in found.about
    assert list(found.phrases(["a dog. a", "", "Big bus"])) == [["dog"], [], ["big bus"]]
    assert chunker("simple").name == "simple", "unless the other one is asked for"


def test_a_model_that_does_not_load_is_an_input_error(spacy_stand_in: types.ModuleType) -> None:
    def broken(name: str, exclude: list[str]) -> None:
        raise ValueError("[E167] made for another version.\nPlease")

    spacy_stand_in.load = broken  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"made for another version\. Please"):
        list(chunker("spacy").phrases(["a dog"]))


@pytest.mark.parametrize("missing", ["spacy", phrases.SPACY_MODEL])
def test_without_one_of_both_the_simple_rule_is_taken_and_a_wish_refused(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == missing:
            raise PackageNotFoundError(name)
        return "3.8.0"

    monkeypatch.setattr(phrases, "version", version)
    assert chunker().name == "simple"
    with pytest.raises(InputError, match="--concepts simple"):
        chunker("spacy")


def test_spacy_itself() -> None:
    pytest.importorskip("spacy", reason="spaCy is not installed")
    pytest.importorskip(phrases.SPACY_MODEL, reason="spaCy's model is not installed")
    found = chunker()
    assert found.name == "spacy"
    (first, second) = found.phrases(["A man in a red jacket is riding his horse along the beach.", "It is there."])
    assert first == ["man", "red jacket", "horse", "beach"]
    assert second == []
