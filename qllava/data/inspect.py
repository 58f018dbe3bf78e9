"""Display of samples as the model gets them: every token, learned ones marked, and images after the image processor.

The display is decoded from the ids and labels of a `Sample`, from which batches are made, and not from the text of the
example. So it shows a space that a tokenizer inserts, or a capital letter that it does not keep.

    shown = show(example, encoder, image_processor)
    print(terminal(shown, colour=sys.stdout.isatty()))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from qllava import page
from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN
from qllava.data.encode import IGNORE_INDEX, Encoder, Sample
from qllava.data.formats import Example
from qllava.data.images import open_image
from qllava.page import Html

IMAGE_INDEX = -200  # an image in `as_json`: LLaVA's own number for it

_BROKEN = "\ufffd"  # decoded text of a part of a character
_RETURN = "\u21b5"


@dataclass(frozen=True)
class Piece:
    """A token, or the tokens of one character or of one image."""

    text: str
    """Decoded text; `<image>` for an image."""
    ids: tuple[int, ...]
    """Ids of the tokens."""
    learned: bool
    """Whether the tokens are learned."""
    images: int = 0
    """Number of image tokens; 0 for text."""


@dataclass(frozen=True)
class Shown:
    """A sample in the form in which it is displayed."""

    sample: Sample
    """The sample as it goes into a batch."""
    pieces: tuple[Piece, ...]
    """All tokens of the sample in order."""
    images: tuple[Image.Image, ...]
    """Images in the order of their tokens, padded, cropped and resized as the model sees them."""


def show(example: Example, encoder: Encoder, image_processor: BaseImageProcessor | None) -> Shown | None:
    """Encode an example and decode it again.

    Args:
        example: The example.
        encoder: Encoder of the model.
        image_processor: Image processor of the model; None shows images as they were opened.

    Returns:
        The sample to display; None if the length policy drops the example.

    Raises:
        InputError: The encoder refuses the example, or an image cannot be read; the message names place and id.
    """
    sample = encoder.encode(example)
    if sample is None:
        return None
    try:
        images = [open_image(path) for path in sample.images]
    except InputError as error:
        raise InputError(f"{sample.place}, id {sample.id}: {error}") from error
    if image_processor is not None and images:
        values = image_processor(images=images, return_tensors="pt")["pixel_values"]
        images = [_restored(value, image_processor) for value in values]
    return Shown(sample, tuple(_pieces(sample, encoder)), tuple(images))


def _restored(values: torch.Tensor, processor: Any) -> Image.Image:
    """Return an image from its pixel values (3, H, W), with the processor's changes to the colours undone."""
    values = values.float()
    if processor.do_normalize:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))
        values = values * std + mean
    if processor.do_rescale:
        values = values / processor.rescale_factor
    return Image.fromarray(values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _pieces(sample: Sample, encoder: Encoder) -> Iterator[Piece]:
    """Yield all tokens of a sample in order; those of one character or one image are one piece."""
    ids, labels, image = sample.input_ids, sample.labels, encoder.image_token_id
    image_tokens = iter(sample.image_tokens)
    at = 0
    while at < len(ids):
        learned = labels[at] != IGNORE_INDEX
        if ids[at] == image:
            tokens = next(image_tokens)
            end = at + tokens
            yield Piece(IMAGE_TOKEN, tuple(ids[at:end]), learned, tokens)
            at = end
            continue
        end = at + 1
        text = _read(encoder.tokenizer, image, ids[at:end])
        # Parts of a character decode as U+FFFD; a token that begins a new character does not.
        while text.endswith(_BROKEN) and end < len(ids) and (labels[end] != IGNORE_INDEX) == learned:
            if not _read(encoder.tokenizer, image, ids[end : end + 1]).startswith(_BROKEN):
                break
            end += 1
            text = _read(encoder.tokenizer, image, ids[at:end])
        yield Piece(text, tuple(ids[at:end]), learned)
        at = end


def _read(tokenizer: PreTrainedTokenizerBase, before: int, ids: list[int]) -> str:
    """Decode tokens as in the middle of a text: at its start, sentencepiece would remove their leading space."""
    alone, both = (
        str(tokenizer.decode(all, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for all in ([before], [before, *ids])
    )
    return both[len(alone) :]


def terminal(shown: Shown, *, colour: bool) -> str:
    """Return a sample as text: a head line, and the tokens, with control characters escaped.

    Args:
        shown: The sample to display.
        colour: True for ANSI codes: learned tokens are green, and every second token is underlined to show where
            tokens begin. False for plain text: learned tokens are in double brackets, and a dot separates tokens.
    """
    sample = shown.sample
    how = "green" if colour else "in \u27e6 \u27e7"
    seen = ", ".join(f"{path.name} {_size(image)}" for path, image in zip(sample.images, shown.images, strict=True))
    head = _visible(
        f"{sample.place}, id {sample.id}: {_count(len(sample.input_ids), 'token')}, "
        f"{_learned(shown):,} learned ({how}), {seen or 'no image'}"
    )
    if colour:
        return f"\x1b[1m{head}\x1b[0m\n{_coloured(shown.pieces)}"
    return f"{head}\n{_plain(shown.pieces)}"


def _coloured(pieces: Sequence[Piece]) -> str:
    out = []
    for number, piece in enumerate(pieces):
        codes = ["7"] if piece.images else ["1", "30", "42"] if piece.learned else ["0"]
        codes += ["4"] if number % 2 else []
        out.append(f"\x1b[{';'.join(codes)}m{_mark(piece)}\x1b[0m{_end_of_line(piece)}")
    return "".join(out).rstrip("\n")


def _plain(pieces: Sequence[Piece]) -> str:
    out = []
    for learned, run in groupby(pieces, key=lambda piece: piece.learned):
        text = "\u00b7".join(_mark(piece) + _end_of_line(piece) for piece in run).replace("\n\u00b7", "\n")
        if learned:
            words = text.removesuffix("\n")
            text = f"\u27e6{words}\u27e7{text[len(words) :]}"
        out.append(text)
    return "".join(out).rstrip("\n")


def as_json(shown: Shown) -> dict[str, Any]:
    """Return `id`, and `input_ids` and `labels` of equal length, in which an image is one IMAGE_INDEX, not learned."""
    input_ids: list[int] = []
    labels: list[int] = []
    for piece in shown.pieces:
        ids = [IMAGE_INDEX] if piece.images else list(piece.ids)
        input_ids += ids
        labels += ids if piece.learned else [IGNORE_INDEX] * len(ids)
    return {"id": shown.sample.id, "input_ids": input_ids, "labels": labels}


def html(shown: Sequence[Shown], *, title: str, about: Sequence[tuple[str, str]]) -> str:
    """Return an HTML page that shows samples and explains the display.

    Args:
        shown: Samples to display.
        title: Title of the page.
        about: Origin of the samples, as pairs of label and value.
    """
    tokens = sum(len(one.sample.input_ids) for one in shown)
    learned = sum(map(_learned, shown))
    figures = [("Samples", f"{len(shown):,}"), ("Tokens", f"{tokens:,}"), ("Learned tokens", f"{learned:,}")]
    figures += [("Learned share", page.percent(learned / tokens))] if tokens else []
    lead = "Training samples exactly as the model gets them: the images, every token, and which tokens it learns."
    origin = [(Html('<span class="muted">{}</span>').format(label), value) for label, value in about]
    samples = [_exhibit(one) for one in shown] or [page.paragraph("There are no samples to show.", muted=True)]
    sections = [
        _explanation(next((piece.images for one in shown for piece in one.pieces if piece.images), 576)),
        page.section("What is shown here", page.tiles(figures), page.legend(origin)),
        page.section("Samples", *samples),
    ]
    return page.page(title, lead, sections, footer="Written by qllava inspect.")


def _explanation(tokens_per_image: int) -> Html:
    """Return the section that explains tokens and labels to readers who do not know them."""
    learned, read = Piece(" bus", (), True), Piece(" What", (), False)
    marks = [
        (_boxes([learned]), "Learned: the model is trained to write this token, given everything before it."),
        (_boxes([read]), "Read only: the model sees this token, and is not trained to write it."),
        (
            _boxes([Piece(IMAGE_TOKEN, (), False, tokens_per_image)]),
            "An image, and the number of tokens that it takes.",
        ),
        (
            _boxes([Piece("\n", (), False)]),
            "The end of a line. Other invisible characters are shown as escapes, such as \\x1b.",
        ),
    ]
    return page.section(
        "How to read this",
        page.paragraph(
            "A language model reads tokens: words, parts of words, characters. Each box is a token; a space before "
            "a word is often part of it. Only a character that takes several tokens, and an image, which takes many, "
            "are drawn as one box. The model knows each token by a number: point at a box, or open the list below a "
            "sample, to see it."
        ),
        page.paragraph(
            "In training the model guesses each token from those before it, and is corrected where a token is "
            "learned. The answers and the token that ends them are learned, so that the model learns what to say and "
            "when to stop. Questions, images and the text around them are only read: being corrected there would "
            "teach the model to ask."
        ),
        page.legend(marks),
    )


def _exhibit(shown: Shown) -> Html:
    sample = shown.sample
    named = list(zip(sample.images, shown.images, strict=True))
    exhibits = [
        (page.image(image, _visible(path.name)), _visible(f"{path.name}, {_size(image)}")) for path, image in named
    ]
    image_tokens = sum(piece.images for piece in shown.pieces)
    numbers = f"{_count(len(sample.input_ids), 'token')}: {_learned(shown):,} learned"
    numbers += f", {image_tokens:,} for {_count(len(named), 'image')}" if image_tokens else ", no image"
    rows: list[tuple[str | float, ...]] = []
    at = 0
    for piece in shown.pieces:
        ids = f"{piece.images} \u00d7 {piece.ids[0]}" if piece.images else " ".join(map(str, piece.ids))
        rows.append((at, _mark(piece).replace(" ", "\u2423"), ids, "learned" if piece.learned else ""))
        at += len(piece.ids)
    table = page.details("Every token with its number", page.table(("Position", "Token", "Id", ""), rows))
    title = _visible(f"{sample.place}, id {sample.id}")
    return page.exhibit(title, exhibits, page.paragraph(numbers, muted=True), _boxes(shown.pieces), table)


def _boxes(pieces: Sequence[Piece]) -> Html:
    """Return tokens in boxes; learned ones are also bold and underlined, for readers who cannot see the colour."""
    out = []
    form = Html('<{tag} class="token{kind}"{tip}>{text}</{tag}>{line}')
    for piece in pieces:
        tag, kind = ("b", " learned") if piece.learned else ("span", " image" if piece.images else "")
        number = str(piece.ids[0]) if piece.images and piece.ids else " ".join(map(str, piece.ids))
        tip = Html(' title="id {}{}"').format(number, ", learned" if piece.learned else "") if number else ""
        line = Html("<br>") if _end_of_line(piece) else ""
        out.append(form.format(tag=tag, kind=kind, tip=tip, text=_mark(piece), line=line))
    return Html('<div class="tokens">{}</div>').format(Html("").join(out))


def _mark(piece: Piece) -> str:
    return f"<image \u00d7{piece.images}>" if piece.images else _visible(piece.text)


def _end_of_line(piece: Piece) -> str:
    """Return a newline if the token ends a line, so that lines of the display are those of the text."""
    return "\n" if "\n" in piece.text else ""


def _visible(text: str) -> str:
    r"""Return a text with invisible characters made visible: a newline as a sign, ESC as \x1b, a joiner as \u200d."""
    return "".join(
        _RETURN if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _learned(shown: Shown) -> int:
    return sum(label != IGNORE_INDEX for label in shown.sample.labels)


def _size(image: Image.Image) -> str:
    return f"{image.width}\u00d7{image.height}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
