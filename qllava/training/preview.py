"""`qllava check` and `qllava inspect`: examine data before a run, without loading the model's weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qllava.config import NANO, InputError
from qllava.conversation import PLAIN, TEMPLATES
from qllava.data import inspect
from qllava.data.check import check
from qllava.data.encode import Encoder
from qllava.data.formats import ImageFolder, folder_of, no_records, to_example
from qllava.data.records import read_records
from qllava.data.verdict import Verdict
from qllava.models.reading import Reader, read_model, read_parts, read_tokenizer
from qllava.page import write_page
from qllava.training.data import Part, parts_of
from qllava.training.settings import Settings, parse


@dataclass(frozen=True)
class Source:
    """Files, and how a model reads them."""

    parts: Sequence[Part]
    """The files."""
    reader: Reader
    """Tokenizer, template and image tokens of the model."""
    max_length: int = 2048
    """Maximum tokens of a sample, as in the recipes."""
    too_long: str = "error"
    """What happens to longer samples, as in the recipes."""

    def encoder(self) -> Encoder:
        """Return the encoder that makes samples of the examples."""
        reader = self.reader
        return Encoder(
            reader.tokenizer,
            reader.template,
            reader.image_token_id,
            reader.image,
            self.max_length,
            self.too_long,  # type: ignore[arg-type]
            reader.positions,
        )


def reader_of(model: str, tokenizer: Path | None, template: str | None) -> Reader:
    """Return the reader of the named model, or of a tokenizer alone; with another template if one is given."""
    reader = read_tokenizer(tokenizer) if tokenizer is not None else read_model(model)
    return replace(reader, template=TEMPLATES[template]) if template else reader


def check_sources(sources: Sequence[Source], evaluation: Sequence[Source] = ()) -> Verdict:
    """Check all files, and compare their examples with each other and with the held-out ones."""

    def checked(some: Sequence[Source]) -> list[Any]:
        return [check(p.path, p.image_folder, s.encoder()) for s in some for p in s.parts]

    return Verdict.over(checked(sources), checked(evaluation))


def sources_of_recipe(config: str) -> tuple[list[Source], list[Source]]:
    """Return the training files of a recipe, captions included, and its held-out files."""
    settings = parse(["--config", config], output_dir="unused", nano={}, elsewhere=True)
    reader = _reader_of_recipe(settings)
    data, folder = settings.data, settings.data.image_folder
    images = Path(folder) if folder else None
    length, too_long = settings.train.max_length or 1 << 30, data.too_long
    if data.train_file is None:
        raise InputError(f"The configuration {config} has no train_file, so no data can be checked. Add train_file.")
    sources = [Source(parts_of(data.train_file, images, "train_file"), reader, length, too_long)]
    if data.pretrain_file:
        captions = replace(reader, template=PLAIN)
        sources.append(Source(parts_of(data.pretrain_file, images, "pretrain_file"), captions, length, too_long))
    held_out = parts_of(data.eval_file, images, "eval_file") if data.eval_file else []
    return sources, [Source(held_out, reader, length, too_long)] if held_out else []


def _reader_of_recipe(settings: Settings) -> Reader:
    model = settings.model
    if model.language_model and model.vision_tower:
        reader = read_parts(model.language_model, model.vision_tower, image_aspect=model.image_aspect)  # type: ignore[arg-type]
    else:
        reader = read_model(model.model_name_or_path or NANO)
    return replace(reader, template=TEMPLATES[model.template]) if model.template else reader


def inspect_examples(
    source: Source,
    *,
    count: int | None,
    page: Path | None = None,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Show the first `count` examples of a file (None: all): on a page, as JSON objects, or in the terminal."""
    encoder = source.encoder()
    (part,) = source.parts
    folder = ImageFolder(part.image_folder or folder_of(part.path))
    examples = (to_example(record, place, folder) for place, record in islice(read_records(part.path), count))
    shown = (inspect.show(example, encoder, source.reader.image_processor) for example in examples)
    kept = (one for one in shown if one is not None)
    if write is not None:
        for one in kept:
            write(inspect.as_json(one))
        return
    first = next(kept, None)
    if first is None:
        raise no_records(part.path)
    if page is None:
        for one in chain([first], kept):
            print(inspect.terminal(one, colour=sys.stdout.isatty()) + "\n" + "-" * shutil.get_terminal_size().columns)
        return
    exhibits = [first, *kept]
    about = [("data", str(part.path)), ("template", encoder.template.name)]
    about.append(("tokens per image", str(encoder.image.tokens)))
    try:
        write_page(page, inspect.html(exhibits, title=f"Samples of {part.path.name}", about=about))
    except OSError as error:
        raise InputError(f"{page} cannot be written ({error.strerror}). Give another file.") from error
    print(f"Wrote {page} with {len(exhibits)} samples. Open the page in a browser.")
