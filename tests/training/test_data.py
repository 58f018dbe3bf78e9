"""The data of a run: files, mixtures and their shares, what is refused before anything is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qllava.config import InputError
from qllava.conversation import CHATML, IMAGE_TOKEN
from qllava.data.check import Checked, check
from qllava.data.encode import Encoder
from qllava.data.formats import read_examples
from qllava.models.assemble import assemble
from qllava.training import data
from qllava.training.data import Part, Prepared, chosen, parts_of, prepare
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_parts, make_tiny_records, make_tiny_tokenizer
from tests.tiny_runs import Tiny, settings, write_records


def encoder(**more: Any) -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), IMAGE_LAYOUT, **more)


def questions(path: Path, name: str, count: int) -> Part:
    rows = [{"id": f"{name}-{n}", "question": f"{name} {n}?", "answer": f"{n}"} for n in range(count)]
    return Part(write_records(path / f"{name}.json", rows), None)


def ids(prepared: Prepared) -> Counter[str]:
    return Counter(row["id"].partition("-")[0] for row in prepared.dataset)


def test_rows_are_the_samples_of_the_encoder(tmp_path: Path) -> None:
    path = make_tiny_records(tmp_path)
    prepared, held_out = prepare([Part(path, None)], encoder(), seed=0)
    samples = encoder().encode_all(read_examples(path))
    assert held_out is None
    assert [row["input_ids"] for row in prepared.dataset] == [s.input_ids for s in samples]
    assert [row["labels"] for row in prepared.dataset] == [s.labels for s in samples]
    assert [row["image_files"] for row in prepared.dataset] == [[str(p) for p in s.images] for s in samples]
    assert prepared.lengths.tolist() == [len(s.input_ids) for s in samples]
    assert prepared.learned == sum(label != -100 for s in samples for label in s.labels)


def test_dataset_num_proc_says_how_many_processes_encode_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_tiny_records(tmp_path)
    parts = Tiny(*make_tiny_parts(tmp_path), rows, tmp_path / "no", tmp_path / "run")
    asked: list[int | None] = []

    def counted(*given: Any, workers: int | None, **more: Any) -> Checked:
        asked.append(workers)
        return check(*given, workers=workers, **more)

    monkeypatch.setattr(data, "check", counted)
    for number in (3, None):
        chosen = settings(parts, tmp_path / "run", dataset_num_proc=number)
        data.prepare_for(chosen, assemble(parts.recipe()), CHATML, [Part(rows, None)], [Part(rows, None)])
    assert asked == [3, 3, None, None]


class TestMixtures:
    def test_a_setting_names_a_file_or_a_list(self) -> None:
        folder = Path("pictures")
        assert parts_of("a.json", folder, "train_file") == [Part(Path("a.json"), folder)]
        given = ["a.json", {"path": "b.json", "repeat": 2, "image_folder": "own"}]
        assert parts_of(given, folder, "train_file") == [
            Part(Path("a.json"), folder),
            Part(Path("b.json"), Path("own"), 2.0),
        ]
        weighted = parts_of([{"path": "a", "weight": 1}, {"path": "b", "weight": 3}], None, "train_file")
        assert [part.weight for part in weighted] == [1, 3]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (3, "The setting train_file is 3. Give a file, or a list of {path, repeat or weight}."),
            ([], "The setting train_file is []. Give a file, or a list of {path, repeat or weight}."),
            (
                [{}],
                "The setting train_file, file 1: give a file, or {path: FILE} with image_folder, repeat, weight.",
            ),
            (
                ["a", {"path": "b", "wieght": 2}],
                "The setting train_file, file 2 has the unknown key 'wieght'. Known keys: path, image_folder, repeat, "
                "weight.",
            ),
            ([{"path": "b", "repeat": 0}], "The setting train_file, file 1: repeat is 0. Give a number above 0."),
            ([{"path": "b", "weight": True}], "The setting train_file, file 1: weight is True. Give a number above 0."),
            (
                [{"path": "b", "weight": 1, "repeat": 1}],
                "The setting train_file, file 1 has both repeat and weight. Keep one of them.",
            ),
            (
                [{"path": "b", "weight": 1}, "c"],
                "The setting train_file has a weight for some files only. Give a weight for every file, or for none.",
            ),
            ([{"path": "b", "image_folder": 2}], "The setting train_file, file 1: image_folder is 2. Give a folder."),
        ],
    )
    def test_a_list_that_makes_no_sense(self, given: Any, message: str) -> None:
        with pytest.raises(InputError) as error:
            parts_of(given, None, "train_file")
        assert str(error.value) == message

    def test_repeats_are_whole_copies_and_a_drawn_share(self) -> None:
        rows = chosen([4, 10], [2.0, 0.5], seed=0)
        assert rows[:8].tolist() == [0, 1, 2, 3] * 2
        assert len(rows) == 13 and len(set(rows[8:])) == 5 and all(4 <= row < 14 for row in rows[8:])
        assert np.array_equal(rows, chosen([4, 10], [2.0, 0.5], seed=0))
        assert not np.array_equal(rows, chosen([4, 10], [2.0, 0.5], seed=1))

    def test_weights_hold_and_leave_no_row_out(self, tmp_path: Path) -> None:
        small, large = questions(tmp_path, "small", 10), questions(tmp_path, "large", 30)
        parts = [Part(small.path, None, weight=1.0), Part(large.path, None, weight=1.0)]
        prepared, _ = prepare(parts, encoder(), seed=0)
        assert ids(prepared) == {"small": 30, "large": 30}
        assert len({row["id"] for row in prepared.dataset}) == 40
        assert len(prepared.lengths) == 60

    def test_every_part_has_its_own_repeat(self, tmp_path: Path) -> None:
        parts = [questions(tmp_path, "a", 4), Part(questions(tmp_path, "b", 6).path, None, repeat=1.5)]
        prepared, _ = prepare(parts, encoder(), seed=0)
        assert ids(prepared) == {"a": 4, "b": 9}


class TestBefore:
    def test_all_errors_are_shown_and_one_sentence_raised(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = [{"id": f"r{n}", "question": "a", "answer": ""} for n in range(5)]
        with pytest.raises(InputError) as error:
            prepare([Part(write_records(tmp_path / "bad.json", bad), None)], encoder(), seed=0)
        assert str(error.value) == (
            "bad.json, example 1, id r0: turn 2 is an empty answer; write it or drop the example. There are 4 more "
            "such problems; `qllava check` lists them all."
        )
        shown = capsys.readouterr().err
        assert "error: empty (5)" in shown and "id r2" in shown and "... and 2 more" in shown

    def test_rows_that_a_policy_drops_are_counted_and_the_run_goes_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        long = {"id": "long", "question": "a", "answer": "word " * 60}
        rows = [long, {"id": "short", "question": "a", "answer": "b"}]
        parts = [Part(write_records(tmp_path / "t.json", rows), None)]
        prepared, _ = prepare(parts, encoder(max_length=40, too_long="drop"), seed=0)
        assert (prepared.count("dropped"), prepared.count("trimmed"), len(prepared.dataset)) == (1, 0, 1)
        assert "warning: dropped (1)" in capsys.readouterr().out
        with pytest.raises(InputError, match="No sample is left to train on: all 1 are longer than max_length"):
            prepare(
                [Part(write_records(tmp_path / "u.json", [long]), None)],
                encoder(max_length=40, too_long="drop"),
                seed=0,
            )

    def test_a_leak_is_said_and_the_check_can_be_skipped_loudly(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        part = questions(tmp_path, "a", 3)
        prepare([part], encoder(), seed=0, evaluation=[part])
        assert "warning: in the evaluation (3)" in capsys.readouterr().out
        prepare([part], encoder(), seed=0, evaluation=[part], skip_check=True)
        out = capsys.readouterr().out
        assert "in the evaluation" not in out
        assert (
            "The data is NOT CHECKED (skip_check). An unreadable image will end the run when its batch is loaded."
            in out
        )

    def test_an_image_that_cannot_be_read_is_found_before_the_run_unless_skipped(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"no image")
        rows = [{"id": "x", "image": "a.png", "question": "a", "answer": "b"}]
        part = Part(write_records(tmp_path / "t.json", rows), None)
        with pytest.raises(InputError, match="t.json, example 1, id x: .*a.png: this is not an image that can be read"):
            prepare([part], encoder(), seed=0)
        assert len(prepare([part], encoder(), seed=0, skip_check=True)[0].dataset) == 1
