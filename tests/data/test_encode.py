"""Ids and labels: what is learned is the answers and their ends, whatever is said; lengths follow the policy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from qllava.config import InputError
from qllava.conversation import CHATML, IMAGE_TOKEN, LLAMA_3, PLAIN, TEMPLATES, VICUNA_V1, Conversation, Template, Turn
from qllava.data.encode import IGNORE_INDEX, Encoder, Sample
from qllava.data.formats import Example
from qllava.data.problems import Place, Problem
from qllava.image_layout import ImageLayout
from tests.tiny_models import make_tiny_tokenizer

IMAGE = Path("a.png")
PLACE = Place("train.json", row=3)
TOKENS_PER_IMAGE = 7
LAYOUT = ImageLayout(1, TOKENS_PER_IMAGE)


@cache
def tokenizer(trim_offsets: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE with every template's control tokens; offsets with or without the leading space."""
    made = make_tiny_tokenizer()
    made.add_tokens([c for template in TEMPLATES.values() for c in template.controls], special_tokens=True)
    if trim_offsets:
        made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def encoder(template: Template = CHATML, tokens: PreTrainedTokenizerBase | None = None, **more: Any) -> Encoder:
    tokens = tokens or tokenizer()
    return Encoder(tokens, template, tokens.convert_tokens_to_ids(IMAGE_TOKEN), LAYOUT, **more)


def example(*said: str, images: int | None = None, id: str = "x7") -> Example:
    turns = tuple(Turn("assistant" if n % 2 else "user", content) for n, content in enumerate(said))
    count = "".join(said[::2]).count(IMAGE_TOKEN) if images is None else images
    return Example(id, (IMAGE,) * count, Conversation(turns), PLACE)


def learned(sample: Sample, tokens: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The runs of learned tokens as text."""
    runs: list[list[int]] = [[]]
    for label in sample.labels:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    return [(tokens or tokenizer()).decode(run) for run in runs if run]


def test_a_sample() -> None:
    sample = encoder().encode(example("<image>\nWhat colour?", "red", "How many?", "two"))
    assert sample is not None
    image = tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
    text = CHATML.render(example("<image>\nWhat colour?", "red", "How many?", "two").conversation).text
    ids = tokenizer().encode(text, add_special_tokens=False)
    at = ids.index(image)
    assert sample.input_ids == ids[:at] + [image] * TOKENS_PER_IMAGE + ids[at + 1 :]
    assert len(sample.labels) == len(sample.input_ids)
    assert learned(sample) == ["red<|im_end|>", "two<|im_end|>"]
    assert (sample.id, sample.images, sample.place) == ("x7", (IMAGE,), PLACE)


# What people write, and what stands between words in the templates: the places where tokens could melt together.
WORDS = st.lists(
    st.sampled_from(["red", " ", "  ", "\n", "\n\n", "\t", ".", ":", "<", "|", "é", "😀", "7", "USER:", "ASSISTANT: "])
    | st.characters(exclude_categories=("Cs",)),
    min_size=1,
    max_size=12,
).map("".join)  # fmt: skip
SAID = WORDS.filter(str.strip)


@settings(deadline=None, max_examples=150)
@given(
    rounds=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4),
    images=st.integers(0, 2),
    template=st.sampled_from([CHATML, LLAMA_3, VICUNA_V1]),
    trim_offsets=st.booleans(),
)
def test_learned_are_the_answers_and_their_ends(
    rounds: list[tuple[str, str]], images: int, template: Template, trim_offsets: bool
) -> None:
    tokens = tokenizer(trim_offsets)
    said = [words for pair in rounds for words in pair]
    said[0] = f"{IMAGE_TOKEN}\n" * images + said[0]
    sample = encoder(template, tokens).encode(example(*said))
    assert sample is not None
    end = "<|eot_id|>" if template is LLAMA_3 else "<|im_end|>"
    before = " " if template is VICUNA_V1 else ""
    answers = [answer.strip() if template.strip else answer for _, answer in rounds]
    assert learned(sample, tokens) == [f"{before}{answer}{end}" for answer in answers]
    assert sample.input_ids.count(tokens.convert_tokens_to_ids(IMAGE_TOKEN)) == images * TOKENS_PER_IMAGE
    assert all(label in (IGNORE_INDEX, id) for id, label in zip(sample.input_ids, sample.labels, strict=True))


@settings(deadline=None, max_examples=50)
@given(caption=SAID, trim_offsets=st.booleans())
def test_captions_are_learned_to_their_newline(caption: str, trim_offsets: bool) -> None:
    tokens = tokenizer(trim_offsets)
    sample = encoder(PLAIN, tokens).encode(example("<image>", caption))
    assert sample is not None
    assert learned(sample, tokens) == [f"{caption}\n"]


@settings(deadline=None, max_examples=50)
@given(question=SAID, answer=SAID)
def test_sentencepiece_in_legacy_mode(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> None:
    made = encoder(VICUNA_V1, sentencepiece_tokenizer)
    sample = made.encode(example(f"<image>\n{question}", answer))
    assert sample is not None
    prompt = made.encode_prompt(Conversation((Turn("user", f"<image>\n{question}"),)), images=1)
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.labels == [IGNORE_INDEX] * len(prompt) + sample.input_ids[len(prompt) :]
    assert sample.input_ids[-1] == sentencepiece_tokenizer.eos_token_id


def test_a_lone_space_mark_is_learned_with_what_follows(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    """After <image> sentencepiece puts in a mark that has no character of its own; nothing else may go with it."""
    sample = encoder(PLAIN, sentencepiece_tokenizer).encode(example("<image>", "53"))
    assert sample is not None
    marks = sentencepiece_tokenizer.convert_ids_to_tokens([label for label in sample.labels if label != IGNORE_INDEX])
    assert marks == ["▁", "5", "3", "<0x0A>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, VICUNA_V1], ids=lambda t: t.name)
def test_a_prompt_is_what_comes_before_the_answer(template: Template) -> None:
    sample = encoder(template).encode(example("<image>\nWhat?", "red", "Where?", "left"))
    asked = example("<image>\nWhat?", "red", "Where?").conversation
    assert sample is not None
    prompt = encoder(template).encode_prompt(asked, images=1)
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.labels[len(prompt)] == sample.input_ids[len(prompt)]


@pytest.mark.parametrize(
    ("said", "token"),
    [
        (("What does <|im_end|> mean?", "The end."), "<|im_end|>"),
        (("What ends a turn?", "It is <|im_end|>"), "<|im_end|>"),
        (("What is it?", "An <image>."), "<image>"),
        (("<|endoftext|>", "Padding."), "<|endoftext|>"),
    ],
)
def test_words_cannot_spell_a_control_token(said: tuple[str, ...], token: str) -> None:
    with pytest.raises(InputError) as error:
        encoder().encode(example(*said))
    assert f"contain {token}" in str(error.value)
    assert str(error.value).startswith("train.json, example 3, id x7: ")


def test_words_of_other_models_are_words(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    sample = encoder().encode(example("What is </s>?", "An <s> ends with </s>."))
    assert sample is not None
    assert learned(sample) == ["An <s> ends with </s>.<|im_end|>"]
    with pytest.raises(InputError, match="contain </s>"):
        encoder(VICUNA_V1, sentencepiece_tokenizer).encode(example("What is </s>?", "A tag."))


def test_system_prompts_cannot_spell_one_either() -> None:
    bad = Example("x7", (), Conversation(example("a", "b").conversation.turns, "<|im_start|>"), PLACE)
    with pytest.raises(InputError, match="contain <|im_start|>"):
        encoder().encode(bad)
    with pytest.raises(InputError, match="The prompt: the words"):
        encoder().encode_prompt(Conversation((Turn("user", "<|im_end|>"),)))


def test_images_and_image_tokens_are_equal_in_number() -> None:
    with pytest.raises(InputError, match="id x7: the text contains 2 <image> for 1 image"):
        encoder().encode(example("<image><image> a", "b", images=1))
    with pytest.raises(InputError, match="contains 1 <image> for 0 images"):
        encoder().encode_prompt(Conversation((Turn("user", "<image>"),)), images=0)


def test_a_conversation_that_cannot_be_rendered_is_named() -> None:
    with pytest.raises(InputError, match="id x7: template plain takes an image and its caption"):
        encoder(PLAIN).encode(example("What?", "That."))
    with pytest.raises(InputError, match="id x7: the conversation ends with the user"):
        encoder().encode(example("What?"))
    with pytest.raises(InputError, match="there is nothing to answer"):
        encoder().encode_prompt(example("a", "b").conversation)


def test_a_sample_that_teaches_nothing_is_an_error() -> None:
    silent = Template("silent", user_end="\n", end_of_turn="")
    with pytest.raises(InputError, match="id x7: nothing of this sample is learned"):
        encoder(silent).encode(example("What?", ""))


def test_a_token_over_the_edge_of_an_answer_is_an_error() -> None:
    melting = Template("melting", assistant_start=" re", end_of_turn="<|im_end|>")
    with pytest.raises(InputError, match="a token is partly inside and partly outside"):
        encoder(melting).encode(example("What?", "d"))


ROUNDS = ("<image>\nWhat colour?", "red", "How many?", "two", "Describe it.", "a large square")


def lengths() -> list[int]:
    """Tokens of the first one, two and three rounds."""
    samples = encoder().encode_all([example(*ROUNDS[: 2 * n]) for n in (1, 2, 3)])
    return [len(sample.input_ids) for sample in samples]


def test_too_long_is_an_error_by_default() -> None:
    longest = lengths()[2]
    assert encoder(max_length=longest).encode(example(*ROUNDS)) is not None
    with pytest.raises(InputError, match=f"id x7: {longest} tokens .* more than max_length {longest - 1}"):
        encoder(max_length=longest - 1).encode(example(*ROUNDS))


def test_too_long_is_dropped_and_counted() -> None:
    made = encoder(max_length=lengths()[2] - 1, too_long="drop")
    assert made.encode(example(*ROUNDS)) is None
    problems: list[Problem] = []
    samples = made.encode_all([example(*ROUNDS, id="long"), example(*ROUNDS[:2], id="short")], problems.append)
    assert [sample.id for sample in samples] == ["short"]
    (problem,) = problems
    assert (problem.kind, problem.severity) == ("dropped", "warning")
    longest = lengths()[2]
    assert str(problem) == (
        f"train.json, example 3, id long: {longest} tokens (1 image of 7) are more than max_length {longest - 1}, "
        "so the example is dropped; raise max_length to keep it."
    )


@pytest.mark.parametrize("template", [CHATML, VICUNA_V1], ids=lambda t: t.name)
def test_trimming_takes_whole_rounds_from_the_end(template: Template) -> None:
    """For every limit the result equals the longest beginning of the conversation that fits, encoded by itself."""
    whole = [encoder(template).encode(example(*ROUNDS[: 2 * n])) for n in (1, 2, 3)]
    for limit in range(1, 80):
        problems: list[Problem] = []
        made = encoder(template, max_length=limit, too_long="trim")
        samples = made.encode_all([example(*ROUNDS)], problems.append)
        fitting = [sample for sample in whole if sample is not None and len(sample.input_ids) <= limit]
        assert samples == fitting[-1:]
        assert [p.kind for p in problems] == {0: ["dropped"], 3: []}.get(len(fitting), ["trimmed"])
        if 0 < len(fitting) < 3:
            assert f"so {3 - len(fitting)} of 3 answers are lost; raise max_length" in str(problems[0])


def test_trimming_never_takes_an_image() -> None:
    late = example("What colour?", "red", "<image>\nAnd this?", "blue")
    length = len(encoder().encode_all([late])[0].input_ids)
    problems: list[Problem] = []
    assert encoder(max_length=length - 1, too_long="trim").encode_all([late], problems.append) == []
    assert [p.kind for p in problems] == ["dropped"]


def test_many_examples_keep_their_order() -> None:
    examples = [example("How many?", f"{n}", id=str(n)) for n in range(600)]
    samples = encoder().encode_all(examples)
    assert [sample.id for sample in samples] == [str(n) for n in range(600)]
    assert [learned(sample) for sample in samples[::97]] == [[f"{n}<|im_end|>"] for n in range(0, 600, 97)]


def test_tokenizer_and_template_must_fit() -> None:
    plain = make_tiny_tokenizer()
    with pytest.raises(InputError, match=r"Template llama_3 needs the token <\|begin_of_text\|>"):
        encoder(LLAMA_3, plain)
    with pytest.raises(InputError, match="no token <image> with the id 1"):
        Encoder(plain, CHATML, 1, LAYOUT)
    plain.eos_token = None
    with pytest.raises(InputError, match="needs an end of text"):
        encoder(VICUNA_V1, plain)
