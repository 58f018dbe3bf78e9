r"""Example -> Sample: one tokenization, labels from spans, every image token in its place.

    text      USER: <image>\nWhat is it? ASSISTANT: A bus.</s>
    tokens    USER : _ <image> _ \n What is it ? ASS ... : _A _bus . </s>
    ids       ...    <image> x tokens_per_image    ...
    labels    -100   -100 ...                      ...      _A _bus . </s>

A token is learned exactly when its characters lie in a span of `Rendered`; no prefix is tokenized a second time, no
lengths are subtracted. Only the template's own strings become control tokens: one that a user's text spells is
an error, because it would end a turn, or stand for a picture that is not there.
Labels are not shifted; the loss shifts them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qllava.config import InputError
from qllava.conversation import EOS, IMAGE_TOKEN, Conversation, Rendered, Template
from qllava.data.formats import Example

IGNORE_INDEX = -100

_TEXTS_PER_CALL = 256  # the tokenizer works on a batch in parallel, and offsets of all of them lie in memory at once


@dataclass(frozen=True)
class Sample:
    """An example as the model takes it.

    id: of the example.
    input_ids: with `tokens_per_image` image tokens for each picture.
    labels: as long as input_ids; what is not learned is IGNORE_INDEX. Not shifted.
    images: the pictures in the order of their tokens.
    source: where the example stands, for messages.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    images: tuple[Path, ...]
    source: str


@dataclass(frozen=True)
class Encoded:
    """A whole data set.

    samples: in the order of the examples.
    dropped: ids of the examples that were too long and left out.
    trimmed: ids of the examples that lost turns at their end.
    """

    samples: list[Sample]
    dropped: tuple[str, ...]
    trimmed: tuple[str, ...]


class _Tokens(NamedTuple):
    """A tokenized text: ids, and the characters [start, end) of each; starts and ends never decrease."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Encoder:
    """Turns examples into samples for one model.

    tokenizer: a fast one (it must tell offsets).
    template: the strings around the turns.
    image_token_id: the id of `<image>`.
    tokens_per_image: how many image tokens a picture takes.
    max_length: the most tokens of a sample, image tokens counted.
    too_long: a longer one is an error; or it is dropped; or it loses whole turns at its end, never a picture and
        never a part of an answer, and is dropped where that does not suffice.

    Raises InputError when tokenizer and template do not fit together.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    image_token_id: int
    tokens_per_image: int
    max_length: int = 2048
    too_long: Literal["error", "drop", "trim"] = "error"

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise InputError("The tokenizer tells no offsets (it is a slow one); load it with AutoTokenizer.")
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
        """Ids that only the template may write."""
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        vocabulary = self.tokenizer.get_vocab()
        return frozenset({*special, *(vocabulary[control] for control in self.template.controls), self.image_token_id})

    def encode(self, example: Example) -> Sample | None:
        """One sample; None when the policy drops it. Raises InputError like `encode_all`."""
        samples = self.encode_all([example]).samples
        return samples[0] if samples else None

    def encode_all(self, examples: Sequence[Example], *, progress: bool = False) -> Encoded:
        """All samples of a data set, in order. They lie in memory at once: call it per part of a very large one.

        Raises InputError, with source and id, for an example that is too long under the policy `error`, spells a
        control token, does not suit the template, has other pictures than `<image>`, or teaches nothing.
        """
        samples: list[Sample] = []
        dropped: list[str] = []
        trimmed: list[str] = []
        with tqdm(total=len(examples), desc="Tokenizing", unit=" rows", disable=not progress) as bar:
            for example, rendered, tokens in self._tokenized(examples):
                self._check_words(rendered, tokens, _where(example))
                end = self._end(example, rendered, tokens)
                if end is None:
                    dropped.append(example.id)
                else:
                    if end < len(tokens.ids):
                        trimmed.append(example.id)
                    samples.append(self._sample(example, rendered, tokens, end))
                bar.update()
        return Encoded(samples, tuple(dropped), tuple(trimmed))

    def encode_prompt(self, conversation: Conversation, *, images: int | None = None) -> list[int]:
        """The ids up to where the answer begins, image tokens expanded.

        images: the number of pictures, where it shall be compared with the number of `<image>`.
        Raises InputError when they differ, the words spell a control token, or the last turn is not the user's.
        """
        try:
            rendered = self._render(conversation, generation_prompt=True)
        except ValueError as error:
            raise InputError(f"The prompt cannot be written: {error}.") from error
        (tokens,) = self._tokens([rendered.text])
        self._check_words(rendered, tokens, "The prompt")
        if images is not None and tokens.ids.count(self.image_token_id) != images:
            raise InputError(
                f"The prompt holds {tokens.ids.count(self.image_token_id)} {IMAGE_TOKEN} for {images} "
                "pictures; make them equal."
            )
        return self._expand(tokens.ids, tokens.ids)

    def _render(self, conversation: Conversation, *, generation_prompt: bool = False) -> Rendered:
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        return self.template.render(conversation, generation_prompt=generation_prompt, bos=bos, eos=eos)

    def _tokenized(self, examples: Sequence[Example]) -> Iterator[tuple[Example, Rendered, _Tokens]]:
        for start in range(0, len(examples), _TEXTS_PER_CALL):
            batch = examples[start : start + _TEXTS_PER_CALL]
            texts = []
            for example in batch:
                try:
                    texts.append(self._render(example.conversation))
                except ValueError as error:
                    raise InputError(f"{_where(example)}: {error}.") from error
            yield from zip(batch, texts, self._tokens([rendered.text for rendered in texts]), strict=True)

    def _tokens(self, texts: list[str]) -> list[_Tokens]:
        """The one tokenization. Begin of text stands in the text already; verbose would warn about long ones."""
        out = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return [
            _Tokens(ids, [start for start, _ in offsets], [end for _, end in offsets])
            for ids, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def _check_words(self, rendered: Rendered, tokens: _Tokens, where: str) -> None:
        """Refuse control tokens that come from what was said; `<image>` may stand in a question."""
        for start, end in rendered.contents:
            here = tokens.ids[bisect_right(tokens.ends, start) : bisect_left(tokens.starts, end)]
            for id in self._controls.intersection(here):
                in_answer = any(first <= start < last for first, last in rendered.spans)
                if in_answer or id != self.image_token_id:
                    token = self.tokenizer.convert_ids_to_tokens(id)
                    raise InputError(
                        f"{where}: the words {rendered.text[start:end][:40]!r} ... contain {token}, "
                        "which is a control token of this model; spell it differently or drop the row."
                    )

    def _end(self, example: Example, rendered: Rendered, tokens: _Tokens) -> int | None:
        """How many tokens (before expansion) are kept; None when the example is dropped."""
        pictures = tokens.ids.count(self.image_token_id)
        if pictures != len(example.images):
            raise InputError(
                f"{_where(example)}: the text holds {pictures} {IMAGE_TOKEN} for {len(example.images)} "
                "pictures; make them equal."
            )
        spare = self.max_length - pictures * (self.tokens_per_image - 1)
        if len(tokens.ids) <= spare:
            return len(tokens.ids)
        if self.too_long == "error":
            length = len(tokens.ids) - spare + self.max_length
            raise InputError(
                f"{_where(example)}: {length} tokens ({pictures} pictures of {self.tokens_per_image}) are "
                f"more than max_length {self.max_length}; raise max_length, or set too_long to drop or trim."
            )
        if self.too_long == "trim":
            # A control token or a newline ends every round, so the text is never cut inside a token.
            for _, end in reversed(rendered.spans[:-1]):
                kept = bisect_left(tokens.starts, end + len(self.template.after_turn))
                if self.image_token_id in tokens.ids[kept:]:
                    break
                if kept <= spare:
                    return kept
        return None

    def _sample(self, example: Example, rendered: Rendered, tokens: _Tokens, end: int) -> Sample:
        ids = tokens.ids[:end]
        labels = [IGNORE_INDEX] * end
        for start, stop in rendered.spans:
            # A token that a tokenizer puts in front (sentencepiece's lone space mark) is empty: it belongs to what
            # follows, so it is the start that decides.
            first, last = bisect_left(tokens.starts, start), bisect_left(tokens.starts, stop)
            if last > end:
                break
            if (first and tokens.ends[first - 1] > start) or (last and tokens.ends[last - 1] > stop):
                raise InputError(
                    f"{_where(example)}: a token reaches over the edge of the answer "
                    f"{rendered.text[start:stop][:40]!r} ...; take white space off its ends."
                )
            labels[first:last] = ids[first:last]
        if all(label == IGNORE_INDEX for label in labels):
            raise InputError(f"{_where(example)}: nothing of this sample is learned; give it an answer.")
        return Sample(example.id, self._expand(ids, ids), self._expand(labels, ids), example.images, example.source)

    def _expand(self, values: list[int], ids: list[int]) -> list[int]:
        """Repeat the value at each image token `tokens_per_image` times."""
        out: list[int] = []
        start = 0
        for _ in range(ids.count(self.image_token_id)):
            at = ids.index(self.image_token_id, start)
            out += values[start:at]
            out += values[at : at + 1] * self.tokens_per_image
            start = at + 1
        return out + values[start:]


def _where(example: Example) -> str:
    return f"{example.source}, id {example.id}"
