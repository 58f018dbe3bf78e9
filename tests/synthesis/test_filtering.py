"""`qllava filter` on files: what is read, what is written, what is refused, and that nothing is left half done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.command import measured
from benchmarks.filter_million import make, plainly, record
from qllava import cli
from qllava.config import InputError
from qllava.data.problems import Place
from qllava.synthesis import filtering
from qllava.synthesis.balance import Balance, Settings, as_text, balance_of, html
from qllava.synthesis.concepts import index_phrases
from qllava.synthesis.filtering import caption_of, filter_captions

PLACE = Place("captions.json", row=3)


def llava(caption: str, **more: Any) -> dict[str, Any]:
    return {**more, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]}


def write(path: Path, rows: list[Any], *, lines: bool = False) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


def run(captions: Path, out: Path, **more: Any) -> list[Any]:
    filter_captions(captions, out, concepts="simple", **more)
    assert [p.name for p in out.parent.glob(".*.partial")] == []
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert isinstance(rows, list)
    return rows


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_rows_come_out_as_they_stood_and_in_their_order(tmp_path: Path, lines: bool) -> None:
    rows = [
        llava("A dog.", id=7, image="7.jpg", extra={"b": [1.0, None, "\ud800"], "a": "caf\u00e9"}),
        {"image": "8.jpg", "caption": "the dog on a moon"},
        {"caption": ""},
        llava("a dog", id="x"),
        llava("a cat", id="y"),
    ]
    data = write(tmp_path / "captions.json", rows, lines=lines)
    before = data.read_bytes()
    left = run(data, tmp_path / "out.json")
    assert list(map(json.dumps, left)) == list(map(json.dumps, [rows[0], rows[1], rows[3]])), "keys in their order too"
    assert data.read_bytes() == before


def test_a_file_is_filtered_as_the_definition_says(tmp_path: Path) -> None:
    texts, truth = make(2000, 3000, 1.2)
    rows = [record(number, text) for number, text in enumerate(texts)]
    data = write(tmp_path / "captions.json", rows)
    left = run(data, tmp_path / "out.json", min_count=4, max_per_concept=20, seed=5)
    chosen = plainly(truth, 4, 20, 5)
    assert left == [one for number, one in enumerate(rows) if number in chosen]
    again = tmp_path / "again.json"
    run(data, again, min_count=4, max_per_concept=20, seed=5)
    assert again.read_bytes() == (tmp_path / "out.json").read_bytes()


def test_what_it_writes_is_read_again(tmp_path: Path) -> None:
    data = write(tmp_path / "captions.jsonl", [llava("a dog", id=str(n)) for n in range(9)], lines=True)
    first = run(data, tmp_path / "one.json", max_per_concept=5)
    assert len(first) == 5
    assert run(tmp_path / "one.json", tmp_path / "two.json", max_per_concept=5) == first


def test_nothing_kept_is_an_empty_list_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "captions.json", [llava("a dog"), llava("")])
    assert run(data, tmp_path / "out.json") == []
    assert cli.main(["filter", str(data), str(tmp_path / "out.json"), "--concepts", "simple"]) == 0
    assert "Nothing was kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("a dog", "an example must be a JSON object"),
        ({"id": "r3"}, "neither"),
        (llava("a dog", id="r3") | {"caption": "a dog"}, "both"),
        ({"id": "r3", "caption": 5}, "the caption is not text"),
        ({"id": "r3", "conversations": []}, "does not end with an answer"),
        ({"id": "r3", "conversations": "a dog"}, "does not end with an answer"),
        ({"id": "r3", "conversations": [{"from": "human", "value": "x"}]}, "does not end with an answer"),
        ({"id": "r3", "conversations": [{"from": "gpt"}]}, "the caption is not text"),
        ({"id": "r3", "caption": "half \udc80"}, "half of a character"),
        ({"id": "r3", "caption": "a dog", "image": Path("cache.jpg")}, "inside the data file"),
        ({"id": "r3", "caption": "a dog", "images": [Path("cache.jpg")]}, "inside the data file"),
    ],
)
def test_a_broken_row_is_named(broken: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        caption_of(broken, PLACE)
    message = str(error.value)
    assert message.startswith("captions.json, example 3" + (", id r3: " if isinstance(broken, dict) else ": "))
    assert said in message and message.endswith(".")


def test_a_broken_row_or_file_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("before")
    rows = [llava("a dog"), {"id": "bad"}]
    for content, said in (
        (json.dumps(rows), "example 2, id bad"),
        ("\n".join(map(json.dumps, rows)), "line 2, id bad"),
        (json.dumps(rows[0]) + "\n{half", "line 2: this is not valid JSON"),
        ("", "contains no examples"),
        ("[]", "contains no examples"),
    ):
        (tmp_path / "captions.json").write_text(content)
        with pytest.raises(InputError, match=said):
            filter_captions(tmp_path / "captions.json", out, concepts="simple")
        assert out.read_text() == "before"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.json", "out.json"]


def test_places_are_looked_at_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "captions.json", [llava("a dog")])
    (tmp_path / "link.json").symlink_to(data)
    monkeypatch.setattr(filtering, "read_records", lambda path: pytest.fail("the file was read"))
    for out, page, said in (
        (data, None, "also the file of captions"),
        (tmp_path / "link.json", None, "also the file of captions"),
        (tmp_path, None, "is a folder"),
        (tmp_path / "no" / "out.json", None, "does not exist"),
        (tmp_path / "out.json", tmp_path / "no" / "page.html", "does not exist"),
        (tmp_path / "out.json", tmp_path / "out.json", "two different files"),
    ):
        with pytest.raises(InputError, match=said):
            filter_captions(data, out, concepts="simple", page=page)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: the data file cannot be read"):
        filter_captions(tmp_path / "none.json", tmp_path / "out.json")


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "captions.json", [llava("a dog")] * 4)
    choose = filtering.select

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        write(data, [llava("a cat")] * 3)
        return choose(*args, **kwargs)

    monkeypatch.setattr(filtering, "select", meanwhile)
    with pytest.raises(InputError, match="changed while"):
        filter_captions(data, tmp_path / "out.json", concepts="simple")
    assert [p.name for p in tmp_path.iterdir()] == ["captions.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_half_written(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "captions.json", [llava("a dog")] * 4)

    def fail(row: Any) -> str:
        raise error

    monkeypatch.setattr(filtering.json, "dumps", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        filter_captions(data, tmp_path / "out.json", concepts="simple")
    assert [p.name for p in tmp_path.iterdir()] == ["captions.json"]


# Figures


def balanced(captions: list[list[str]], kept: list[bool], min_count: int = 3, most: int = 100) -> Balance:
    return balance_of(index_phrases(captions), np.array(kept), Settings("simple", "by rule", min_count, most, 0))


def test_figures_by_hand() -> None:
    figures = balanced([["a", "b"], ["a"], ["a", "c"], ["d"], []], [True, False, True, False, False], 2, 2)
    assert (figures.captions_before, figures.captions_after, figures.without_concept) == (5, 2, 2)
    assert (figures.concepts_before, figures.concepts_after, figures.concepts_counted) == (4, 3, 1)
    bands = [(b.least, b.most, b.concepts, b.before, b.after) for b in figures.bands]
    assert bands == [(1, 1, 3, 3, 2), (2, 2, 0, 0, 0), (3, 20, 1, 3, 2)]
    assert [(c.concept, c.before, c.after) for c in figures.most_cut] == [("a", 3, 2), ("d", 1, 0)]
    assert figures.ranks_before == ((1, 3), (2, 1), (3, 1), (4, 1))
    assert figures.ranks_after == ((1, 2), (2, 1), (3, 1))


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 100), (3, 100), (200, 10), (11, 10)])
def test_bands_cover_every_concept_once(least: int, most: int) -> None:
    captions = [[f"w{n}" for n in range(300) if number < n] for number in range(300)]
    figures = balanced(captions, [True] * 300, least, most)
    assert sum(band.concepts for band in figures.bands) == figures.concepts_before == 299
    assert sum(band.before for band in figures.bands) == sum(map(len, captions))
    edges = [(band.least, band.most) for band in figures.bands]
    assert edges[0][0] == 1 and all(a[1] + 1 == b[0] for a, b in zip(edges, edges[1:], strict=False))


def test_ties_of_the_most_cut_are_alphabetical() -> None:
    names = [f"w{n:02d}" for n in range(30)]
    figures = balanced([names[::-1]], [False])
    assert [cut.concept for cut in figures.most_cut] == names[:12]


def test_terminal_and_page_tell_what_happened(tmp_path: Path) -> None:
    figures = balanced(
        [["<b>dog</b>"]] * 4 + [["a concept with a very long name indeed"]], [True, True, False, False, False]
    )
    said = as_text(figures)
    assert "by rule" in said and "40.0 %" in said and "a concept with a ve..." in said
    shown = html(figures, "captions.json")
    assert "&lt;b&gt;dog&lt;/b&gt;" in shown and "<b>dog" not in shown
    assert "captions.json" in shown and "<polyline" in shown and "by rule" in shown
    assert "No finite values" in html(balanced([[]], [False]), "x")


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "captions.json", [llava("a dog", id=str(n)) for n in range(9)] + [llava("a red cat")])
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    line = ["filter", str(data), str(out), "--concepts", "simple", "--html", str(page), "--min-count", "1"]
    assert cli.main([*line, "--max-per-concept", "4", "--seed", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["captions_before"], told["captions_after"]) == (10, 5)
    settings = {"chunker": "simple", "min_count": 1, "max_per_concept": 4, "seed": 3}
    assert settings.items() <= told["settings"].items()
    assert len(json.loads(out.read_text())) == 5
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "Concepts by simple" in said and "captions" in said
    for wrong in (["--min-count", "0"], ["--max-per-concept", "0"], ["--seed", "x"], ["--concepts", "nltk"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*line, *wrong])
        assert stopped.value.code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_neither_torch_nor_the_order_of_hashes_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _ = make(3000, 500, 1.0)
    data = write(tmp_path / "captions.json", [record(number, text) for number, text in enumerate(texts)])
    told = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        took = measured(["filter", str(data), str(tmp_path / seed), "--concepts", "simple", "--json"])
        assert took.loaded == []
        told.append(took.stdout)
    assert told[0] == told[1]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
