r"""Encoding of examples into samples: one tokenization, labels from spans, every image token in its place.

    text      USER: <image>\nWhat is it? ASSISTANT: A bus.</s>
    tokens    USER : _ <image> _ \n What is it ? ASS ... : _A _bus . </s>
    ids       ...    <image> x its tokens          ...
    labels    -100   -100 ...                      ...      _A _bus . </s>

A token is learned exactly when its characters are in a span of `Rendered`; no prefix is tokenized a second time, no
lengths are subtracted. Only the template's own strings become control tokens: a control token spelled in a user's text
is an error, because it would end a turn, or mean an image that is missing. Labels are not shifted; the loss does that.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from qllava.config import InputError
from qllava.conversation import EOS, IMAGE_TOKEN, Conversation, Rendered, Template
from qllava.data.formats import Example, count_of
from qllava.data.problems import OnProblem, Place, Problem, RecordError, stop
from qllava.image_layout import ImageLayout

IGNORE_INDEX = -100

_TEXTS_PER_CALL = 256  # the tokenizer works on a batch in parallel, and offsets of all of them are in memory at once


@dataclass(frozen=True)
class Sample:
    """An encoded example."""

    id: str
    """Id of the example."""
    input_ids: list[int]
    """Token ids, with all image tokens of each image."""
    labels: list[int]
    """Labels, as many as input_ids and not shifted; IGNORE_INDEX for tokens that are not learned."""
    images: tuple[Path, ...]
    """Paths of the images in the order of their tokens."""
    image_tokens: tuple[int, ...]
    """Number of tokens of each image."""
    place: Place
    """Place of the example in its file, for messages."""


class _Tokens(NamedTuple):
    """Tokenized text: ids, and the characters [start, end) of each token; starts and ends never decrease."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Encoder:
    """Encoder of examples into samples for one model.

    Raises:
        InputError: Tokenizer and template do not fit together.
    """

    tokenizer: PreTrainedTokenizerBase
    """A fast tokenizer, because character offsets are needed."""
    template: Template
    """Strings around the turns."""
    image_token_id: int
    """Id of the `<image>` token."""
    image: ImageLayout
    """Tokens of an image."""
    max_length: int = 2048
    """Maximum number of tokens in a sample, including image tokens."""
    too_long: Literal["error", "drop", "trim"] = "error"
    """Policy for a longer sample: error; drop it; or trim whole turns at its end, never an image or a part of an
    answer, and drop it if that is not enough."""
    positions: int | None = None
    """Number of positions of the language model, which limits `max_length`; None if no model is known."""

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise InputError(
                "The tokenizer returns no character offsets because it is a slow one; load a fast one with "
                "AutoTokenizer."
            )
        vocabulary = self.tokenizer.get_vocab()
        if vocabulary.get(IMAGE_TOKEN) != self.image_token_id:
            raise InputError(
                f"The tokenizer has no token {IMAGE_TOKEN} with the id {self.image_token_id}; add it first."
            )
        for control in self.template.controls:
            if control not in vocabulary:
                raise InputError(
                    f"Template {self.template.name} needs the token {control}, which the tokenizer does "
                    "not have; choose the template that belongs to the language model."
                )
        if any(EOS in string for string in self.template.strings()) and self.tokenizer.eos_token is None:
            raise InputError(
                f"Template {self.template.name} needs an end of text, and the tokenizer has none; set its eos_token."
            )

    @cached_property
    def _controls(self) -> frozenset[int]:
        """Ids of tokens that only the template may produce."""
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        vocabulary = self.tokenizer.get_vocab()
        return frozenset({*special, *(vocabulary[control] for control in self.template.controls), self.image_token_id})

    def encode(self, example: Example) -> Sample | None:
        """Return the sample of one example, or None if the length policy drops it.

        Raises:
            RecordError: The example cannot be encoded (see `encode_all`).
        """
        samples = self.encode_all([example])
        return samples[0] if samples else None

    def encode_all(self, examples: Sequence[Example], on_problem: OnProblem = stop) -> list[Sample]:
        """Return the samples of examples, in order.

        An example is left out if it is too long, spells a control token, does not fit the template, has another number
        of images than of `<image>`, or has nothing to learn. All samples are in memory at once, so call this per part
        of a large data set.

        Args:
            examples: Examples to encode.
            on_problem: Called with the problem of each example that is left out or trimmed. The default raises a
                RecordError for errors, and ignores examples that the length policy drops or trims.
        """
        samples: list[Sample] = []
        for example, rendered, tokens in self._tokenized(examples, on_problem):
            try:
                self._check_words(rendered, tokens, example.problem)
                end = self._end(example, rendered, tokens, on_problem)
                if end is not None:
                    samples.append(self._sample(example, rendered, tokens, end))
            except RecordError as error:
                on_problem(error.problem)
        return samples

    def encode_prompt(self, conversation: Conversation, *, images: int | None = None) -> list[int]:
        """Return the ids up to the start of the answer, with image tokens expanded.

        Args:
            conversation: Conversation whose last turn is the user's.
            images: Number of images to compare with the number of `<image>`; None skips the comparison.

        Raises:
            InputError: These numbers differ, the text spells a control token, or the last turn is not the user's.
        """
        try:
            rendered = self._render(conversation, generation_prompt=True)
        except ValueError as error:
            raise InputError(f"The prompt cannot be written: {error}.") from error
        (tokens,) = self._tokens([rendered.text])
        self._check_words(rendered, tokens, lambda _, problem, hint: InputError(f"The prompt: {problem}; {hint}."))
        if images is not None and tokens.ids.count(self.image_token_id) != images:
            raise InputError(
                f"The prompt contains {tokens.ids.count(self.image_token_id)} {IMAGE_TOKEN} for {images} "
                "images; make them equal."
            )
        return self._expand(tokens.ids, tokens.ids)

    def _image_tokens(self, images: int) -> tuple[int, ...]:
        """Return the number of tokens of each of `images` images."""
        return (self.image.tokens,) * images

    def _render(self, conversation: Conversation, *, generation_prompt: bool = False) -> Rendered:
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        return self.template.render(conversation, generation_prompt=generation_prompt, bos=bos, eos=eos)

    def _tokenized(
        self, examples: Sequence[Example], on_problem: OnProblem
    ) -> Iterator[tuple[Example, Rendered, _Tokens]]:
        for first in range(0, len(examples), _TEXTS_PER_CALL):
            batch: list[Example] = []
            texts: list[Rendered] = []
            for example in examples[first : first + _TEXTS_PER_CALL]:
                try:
                    texts.append(self._render(example.conversation))
                    batch.append(example)
                except ValueError as error:
                    hint = "choose another template, or drop the example"
                    on_problem(example.problem("template", str(error), hint).problem)
            yield from zip(batch, texts, self._tokens([rendered.text for rendered in texts]), strict=True)

    def _tokens(self, texts: list[str]) -> list[_Tokens]:
        """Tokenize texts, which include the begin-of-text token; `verbose` would warn about long texts."""
        if not texts:
            return []
        out = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return [
            _Tokens(ids, [start for start, _ in offsets], [end for _, end in offsets])
            for ids, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def _check_words(self, rendered: Rendered, tokens: _Tokens, refuse: Callable[[str, str, str], InputError]) -> None:
        """Raise what `refuse` returns for control tokens in the text of turns; `<image>` may be in a question."""
        for start, end in rendered.contents:
            here = tokens.ids[bisect_right(tokens.ends, start) : bisect_left(tokens.starts, end)]
            for id in self._controls.intersection(here):
                in_answer = any(first <= start < last for first, last in rendered.spans)
                if in_answer or id != self.image_token_id:
                    token = self.tokenizer.convert_ids_to_tokens(id)
                    raise refuse(
                        "control token",
                        f"the words {rendered.text[start:end][:40]!r} ... contain {token}, which is a control token of "
                        "this model",
                        "spell it differently or drop the example",
                    )

    def _end(self, example: Example, rendered: Rendered, tokens: _Tokens, on_problem: OnProblem) -> int | None:
        """Return the number of tokens, before expansion, that are kept; None if the example is dropped."""
        images = tokens.ids.count(self.image_token_id)
        if images != len(example.images):
            problem = f"the text contains {images} {IMAGE_TOKEN} for {count_of(len(example.images))}"
            raise example.problem("images", problem, "make them equal")
        most, limit, hint = self._limit
        spare = most + images - sum(self._image_tokens(images))
        if len(tokens.ids) <= spare:
            return len(tokens.ids)
        length = len(tokens.ids) - spare + most
        too_long = f"{length} tokens ({count_of(images)} of {self.image.tokens}) are more than {limit}"
        if self.too_long == "error":
            raise example.problem("too long", too_long, f"{hint}, or set too_long to drop or trim")
        if self.too_long == "trim":
            # A control token or a newline ends every round, so the text is never cut inside a token.
            learned = _learned(example)
            for rounds in range(len(rendered.spans) - 1, 0, -1):
                if not any(learned[:rounds]):
                    break
                kept = bisect_left(tokens.starts, rendered.spans[rounds - 1][1] + len(self.template.after_turn))
                if self.image_token_id in tokens.ids[kept:]:
                    break
                if kept <= spare:
                    lost = f"{too_long}, so {len(rendered.spans) - rounds} of {len(rendered.spans)} answers are lost"
                    on_problem(replace(self._changed(example, lost), kind="trimmed"))
                    return kept
        on_problem(self._changed(example, f"{too_long}, so the example is dropped"))
        return None

    @property
    def _limit(self) -> tuple[int, str, str]:
        """Maximum number of tokens in a sample, the setting that limits it, and the hint for a longer sample."""
        if self.positions is not None and self.positions < self.max_length:
            return self.positions, f"the {self.positions} positions that the language model reads", "shorten it"
        return self.max_length, f"max_length {self.max_length}", "raise max_length"

    def _changed(self, example: Example, problem: str) -> Problem:
        return Problem("dropped", problem, f"{self._limit[2]} to keep it", example.place, example.id, "warning")

    def _sample(self, example: Example, rendered: Rendered, tokens: _Tokens, end: int) -> Sample:
        ids = tokens.ids[:end]
        labels = [IGNORE_INDEX] * end
        for (start, end_), learned in zip(rendered.spans, _learned(example), strict=True):
            if not learned:
                continue
            # A token that a tokenizer adds in front (sentencepiece's space mark) has no characters and belongs to the
            # token after it, so the start of the token decides.
            first, last = bisect_left(tokens.starts, start), bisect_left(tokens.starts, end_)
            if last > end:
                break
            if (first and tokens.ends[first - 1] > start) or (last and tokens.ends[last - 1] > end_):
                problem = (
                    f"a token is partly inside and partly outside of the answer {rendered.text[start:end_][:40]!r} ..."
                )
                raise example.problem("token edge", problem, "remove white space from its ends")
            labels[first:last] = ids[first:last]
        if all(label == IGNORE_INDEX for label in labels):
            raise example.problem("nothing learned", "nothing of this sample is learned", "give it an answer")
        image_tokens = self._image_tokens(len(example.images))
        expanded = self._expand(ids, ids), self._expand(labels, ids)
        return Sample(example.id, *expanded, example.images, image_tokens, example.place)

    def _expand(self, values: list[int], ids: list[int]) -> list[int]:
        """Repeat the value at each `<image>` as often as the image takes tokens."""
        out: list[int] = []
        start = 0
        for tokens in self._image_tokens(ids.count(self.image_token_id)):
            at = ids.index(self.image_token_id, start)
            out += values[start:at]
            out += values[at : at + 1] * tokens
            start = at + 1
        return out + values[start:]


def _learned(example: Example) -> list[bool]:
    """Return whether each answer is learned, in order."""
    return [turn.learned for turn in example.conversation.turns if turn.role == "assistant"]
