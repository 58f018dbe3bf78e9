"""Samples on disk: what is folded and unfolded again is the sample, and what the trainer takes is what was encoded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qllava.conversation import CHATML, IMAGE_TOKEN, Conversation, Turn
from qllava.data import check
from qllava.data.encode import IGNORE_INDEX, Encoder, Sample
from qllava.data.formats import Example
from qllava.data.problems import Place
from qllava.data.table import SCHEMA, Layout, batch_of, lists, open_table, writing
from qllava.image_layout import ImageLayout
from tests.tiny_models import make_tiny_tokenizer

IMAGE = 9


@cache
def encoder(tokens_per_image: int = 5) -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), ImageLayout(1, tokens_per_image))


def example(*said: str, id: str = "x7", names: tuple[str, ...] | None = None, row: int = 1) -> Example:
    turns = tuple(Turn("assistant" if n % 2 else "user", content) for n, content in enumerate(said))
    images = tuple(f"{n}.png" for n in range("".join(said).count(IMAGE_TOKEN))) if names is None else names
    return Example(id, tuple(map(Path, images)), Conversation(turns), Place("train.json", line=row + 1, row=row))


def layout(made: Encoder) -> Layout:
    return Layout(made.image_token_id)


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.integers(1, 5) | st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=20),
)
def test_unfolded_is_what_was_folded(pieces: list[int | tuple[int, bool]]) -> None:
    """A piece is an image of so many tokens, or a token and whether it is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        ids += [IMAGE] * piece if isinstance(piece, int) else [piece[0]]
        labels += [IGNORE_INDEX] * piece if isinstance(piece, int) else [piece[0] if piece[1] else IGNORE_INDEX]
    image_tokens = tuple(piece for piece in pieces if isinstance(piece, int))
    made = Layout(IMAGE)
    tokens, learned = made.fold(Sample("x7", ids, labels, (), image_tokens, Place("train.json", row=1)))
    assert len(tokens) == len(pieces)
    assert len(learned) % 2 == 0 and (np.diff(learned) > 0).all()
    assert made.unfold(tokens.tolist(), learned.tolist(), image_tokens) == (ids, labels)


def test_the_example_at_the_head_of_the_file() -> None:
    made = Layout(IMAGE)
    sample = Sample("x7", [10, *[IMAGE] * 4, 11, 12, 13], [-100] * 6 + [12, 13], (), (4,), Place("train.json"))
    tokens, learned = made.fold(sample)
    assert (tokens.tolist(), learned.tolist()) == ([10, IMAGE, 11, 12, 13], [3, 5])


def test_a_table_of_other_columns_is_of_another_version() -> None:
    """Tables are kept between runs under a name that depends on the version: an old one must not be read as a new."""
    columns = {
        5: "id tokens learned length learned_tokens image_files image_tokens file line row id_hash images_hash "
        "content_hash round_hashes"
    }
    assert SCHEMA.names == columns[check._VERSION].split()


WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=10).filter(
    lambda words: words.strip() and IMAGE_TOKEN not in words
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(st.tuples(st.integers(0, 3), WORDS, WORDS), min_size=1, max_size=4),
    tokens_per_image=st.integers(1, 7),
)
def test_what_the_trainer_takes_is_what_was_encoded(
    tmp_path: Path, rounds: list[tuple[int, str, str]], tokens_per_image: int
) -> None:
    said = [words for count, asked, answer in rounds for words in (IMAGE_TOKEN * count + asked, answer)]
    made = encoder(tokens_per_image)
    examples = [example(*said), example(*said[:2], id="short", row=2)]
    samples = made.encode_all(examples)
    with writing(tmp_path / "t.arrow") as writer:
        writer.write_batch(batch_of(examples, samples, layout(made)))
    table = open_table(tmp_path / "t.arrow")
    rows = table.with_transform(layout(made))[:]
    assert rows == {
        "id": [sample.id for sample in samples],
        "input_ids": [sample.input_ids for sample in samples],
        "labels": [sample.labels for sample in samples],
        "image_files": [[str(path) for path in sample.images] for sample in samples],
        "image_tokens": [[tokens_per_image] * len(sample.images) for sample in samples],
    }
    assert table["length"][:] == [len(sample.input_ids) for sample in samples]
    assert table["learned_tokens"][:] == [sum(label != IGNORE_INDEX for label in s.labels) for s in samples]
    assert list(zip(table["line"][:], table["row"][:], strict=True)) == [(2, 1), (3, 2)]


def test_rows_are_taken_in_any_order_from_the_disk(tmp_path: Path) -> None:
    made = encoder()
    examples = [example(f"{IMAGE_TOKEN}\nHow many?", str(n), id=f"{n}", row=n + 1) for n in range(30)]
    samples = made.encode_all(examples)
    path = tmp_path / "t.arrow"
    with writing(path) as writer:  # in pieces of unequal size, as chunks of which examples were left out
        for first, last in ((0, 1), (1, 1), (1, 20), (20, 30)):
            writer.write_batch(batch_of(examples[first:last], samples[first:last], layout(made)))
    table = open_table(path)
    assert table.cache_files == [{"filename": str(path)}]  # mapped, not read
    chosen = table.with_transform(layout(made)).select([29, 0, 17])
    assert [row["id"] for row in chosen] == ["29", "0", "17"]
    assert chosen[2]["input_ids"] == samples[17].input_ids
    assert [len(names) for names in lists(table, "image_files")] == [1] * 30


def test_no_rows_are_a_table_too(tmp_path: Path) -> None:
    for number in (0, 1):
        path = tmp_path / f"{number}.arrow"
        with writing(path) as writer:
            for _ in range(number):
                writer.write_batch(batch_of([], [], layout(encoder())))
        table = open_table(path)
        assert len(table) == 0 and list(lists(table, "image_files")) == []
        assert table.column_names == SCHEMA.names


class TestHashes:
    def row(self, one: Example) -> dict[str, object]:
        (sample,) = encoder().encode_all([one])
        batch: pa.RecordBatch = batch_of([one], [sample], layout(encoder()))
        row: dict[str, object] = batch.to_pylist()[0]
        return row

    BASE = example(f"{IMAGE_TOKEN}\nWhat?", "A bus.", "Where?", "Here.")

    @pytest.mark.parametrize(
        ("other", "same"),
        [
            (BASE, {"content_hash", "round_hashes", "images_hash", "id_hash"}),
            (example(f"What? {IMAGE_TOKEN}", "A bus.", "Where?", " Here. "),
             {"content_hash", "round_hashes", "images_hash", "id_hash"}),
            (example(f"{IMAGE_TOKEN}\nWhat?", "A bus.", "Where?", "Here.", id="y8"),
             {"content_hash", "round_hashes", "images_hash"}),
            (example(f"{IMAGE_TOKEN}\nWhat?", "A bus.", "Where?", "There."), {"images_hash", "id_hash"}),
            (example(f"{IMAGE_TOKEN}\nWhat?", "A bus.", "Where?", "Here.", names=("other.png",)), {"id_hash"}),
            (example("What?", "A bus.", "Where?", "Here."), {"id_hash"}),
            (example(f"{IMAGE_TOKEN}\nWhat?A bus.", "Where?", "Here.", "Yes."), {"images_hash", "id_hash"}),
        ],
    )  # fmt: skip
    def test_they_are_of_what_is_compared(self, other: Example, same: set[str]) -> None:
        first, second = self.row(self.BASE), self.row(other)
        names = {"content_hash", "round_hashes", "images_hash", "id_hash"}
        assert {name for name in names if first[name] == second[name]} == same

    def test_a_row_without_an_id_of_its_own_has_no_hash_of_one(self) -> None:
        assert self.row(example("a", "b", id="example 1"))["id_hash"] is None
        assert self.row(example("a", "b", id="example 2"))["id_hash"] is not None

    def test_one_answer_is_known_among_others(self) -> None:
        alone = self.row(example(f"{IMAGE_TOKEN}\nWhat?", "A bus."))["round_hashes"]
        among = self.row(self.BASE)["round_hashes"]
        assert isinstance(among, list) and isinstance(alone, list)
        assert alone == among[:1]
