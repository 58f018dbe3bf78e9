"""Contexts from JSONL and from COCO's two files; what is wrong is said all at once, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qllava.config import InputError
from qllava.data.contexts import Box, Context, read_contexts

ROW = {"id": "1", "image": "1.jpg", "captions": ["A cat."], "boxes": [{"category": "cat", "bbox": [0, 0.25, 0.5, 1]}]}


def jsonl(folder: Path, *rows: Any) -> Path:
    """A file with these examples, a line each."""
    path = folder / "contexts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def coco(folder: Path, instances: dict[str, Any] | None = None, **captions: Any) -> Path:
    """A pair of files in COCO's form: one image of 200 x 100 with a cat, a crowd, and a box without area."""
    said = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "A cat.\n"}],
    }
    boxes = [
        {"image_id": 7, "category_id": 3, "bbox": [20, 10, 100, 90.5], "iscrowd": 0, "segmentation": [[1, 2, 3]]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"image_id": 7, "category_id": 1, "bbox": [5, 5, 10, 0], "iscrowd": 0},
        {"image_id": 8, "category_id": 1, "bbox": [5, 5, 10, 10], "iscrowd": 0},
    ]
    marked = {"annotations": boxes, "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "person"}]}
    (folder / "captions_few.json").write_text(json.dumps(said | captions), encoding="utf-8")
    (folder / "instances_few.json").write_text(json.dumps(marked | (instances or {})), encoding="utf-8")
    return folder


class TestRows:
    def test_all_fields(self, tmp_path: Path) -> None:
        (context,) = read_contexts(jsonl(tmp_path, ROW))
        assert context == Context("1", "1.jpg", ("A cat.",), (Box("cat", (0.0, 0.25, 0.5, 1.0)),))
        assert not context.complete

    def test_the_other_key_a_missing_id_and_complete(self, tmp_path: Path) -> None:
        row = {"image": "a/1.jpg", "captions": ["A cat."], "instances": [], "complete": True}
        assert read_contexts(jsonl(tmp_path, row)) == [Context("a/1", "a/1.jpg", ("A cat.",), (), True)]

    def test_a_list_is_read_too(self, tmp_path: Path) -> None:
        path = tmp_path / "contexts.json"
        path.write_text(json.dumps([ROW, ROW | {"id": 2}]), encoding="utf-8")
        assert [one.id for one in read_contexts(path)] == ["1", "2"]

    def test_a_crowd_is_no_box(self, tmp_path: Path) -> None:
        boxes = [{"category": "cat", "bbox": [0, 0, 1, 1], "iscrowd": 0}]
        boxes += [{"category": name, "bbox": [0, 0, 1, 1], "iscrowd": 1} for name in ("person", "cat", "person")]
        (context,) = read_contexts(jsonl(tmp_path, ROW | {"boxes": boxes}))
        assert context.boxes == (Box("cat", (0.0, 0.0, 1.0, 1.0)),) and context.crowds == ("cat", "person")

    def test_what_is_rounded_is_cut(self, tmp_path: Path) -> None:
        row = ROW | {"boxes": [{"category": "cat", "bbox": [-0.001, 0, 1.001, 1]}]}
        assert read_contexts(jsonl(tmp_path, row))[0].boxes[0].bbox == (0.0, 0.0, 1.0, 1.0)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"captions": []}, "captions must be"),
            ({"captions": ["A cat.", " "]}, "captions must be"),
            ({"captions": None}, "captions must be"),
            ({"image": ""}, "image must be"),
            ({"image": "."}, "image must be the name of a file; see"),
            ({"image": "photos/.."}, "image must be the name of a file; see"),
            ({"image": "photos/"}, "image must be the name of a file; see"),
            ({"image": "a\0.png"}, "image must be the name of a file; see"),
            ({"image": "/", "id": None}, "line 2: image must be the name of a file; see"),
            ({"image": "a \ud83d.jpg"}, r"'a \\ud83d.jpg' contains half a character"),
            ({"captions": ["A cat.", "\ud83d cat"]}, "contains half a character"),
            ({"boxes": [{"category": "cat\ude00", "bbox": [0, 0, 1, 1]}]}, "contains half a character"),
            ({"id": True}, "id must be"),
            ({"id": ""}, "id must be"),
            ({"boxes": None}, "boxes must be a list"),
            ({"instances": []}, "two names"),
            ({"complete": "yes"}, "complete must be"),
            ({"boxes": [{"category": "", "bbox": [0, 0, 1, 1]}]}, "box 1 needs a category"),
            ({"boxes": ["cat"]}, "box 1 needs a category"),
            ({"boxes": [{"category": "cat", "bbox": [0, 0, 1, 1], "iscrowd": "no"}]}, "iscrowd must be 0 or 1"),
            ({"boxes": [{"category": "cat", "bbox": [0, 0, 1]}]}, "four numbers"),
            ({"boxes": [{"category": "cat", "bbox": [0, 0, 1, True]}]}, "four numbers"),
            ({"boxes": [{"category": "cat", "bbox": [0, 0, 1.1, 1]}]}, "outside of 0..1"),
            ({"boxes": [{"category": "cat", "bbox": [0, 0, float("nan"), 1]}]}, "outside of 0..1"),
            ({"boxes": [{"category": "cat", "bbox": [0.5, 0, 0.5, 1]}]}, "no area"),
            (
                {"boxes": [{"category": "cat", "bbox": [0.5, 0, 0.6, 1]}, {"category": "dog", "bbox": [1, 0, 0, 1]}]},
                "dog",
            ),
        ],
    )
    def test_what_is_wrong_names_line_and_id(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said) as error:
            read_contexts(jsonl(tmp_path, ROW | {"id": "0"}, ROW | change))
        assert str(error.value).startswith("contexts.jsonl, line 2")
        if "id" not in change:
            assert "line 2, id 1:" in str(error.value)

    def test_everything_is_said_at_once(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, ROW, ROW, ROW | {"id": "2", "captions": [], "boxes": [{}]}, [])
        path.write_text(path.read_text(encoding="utf-8") + "\n{", encoding="utf-8")
        with pytest.raises(InputError) as error:
            read_contexts(path)
        double, two, no_row, no_json = str(error.value).split("\n")
        assert "line 2, id 1" in double and "same id" in double
        assert "captions" in two and "category" in two
        assert "line 4" in no_row and "line 5" in no_json

    def test_many_problems_are_counted(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="And 10 more"):
            read_contexts(jsonl(tmp_path, *[ROW | {"id": str(n), "captions": []} for n in range(30)]))

    def test_an_empty_and_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no images"):
            read_contexts(jsonl(tmp_path))
        with pytest.raises(InputError, match="check its name"):
            read_contexts(tmp_path / "absent.jsonl")

    def test_the_forty_of_the_bench(self, coco_contexts: Path) -> None:
        contexts = read_contexts(coco_contexts)
        assert len(contexts) == 40
        assert all(len(one.captions) == 5 for one in contexts)
        assert sum(not one.boxes for one in contexts) == 1


class TestCoco:
    def test_crowds_are_told_boxes_without_area_left_out_and_corners_are_shares(self, tmp_path: Path) -> None:
        expected = Context("7", "7.jpg", ("A cat.",), (Box("cat", (0.1, 0.1, 0.6, 1.0)),), crowds=("person",))
        coco(tmp_path)
        for source in (tmp_path, tmp_path / "captions_few.json", tmp_path / "instances_few.json"):
            assert read_contexts(source) == [expected]

    def test_a_box_that_leaves_the_image(self, tmp_path: Path) -> None:
        box = {"image_id": 7, "category_id": 3, "bbox": [20, 10, 190, 10], "iscrowd": 0}
        with pytest.raises(InputError, match=r"captions_few.json, id 7: box 1 \(cat\) reaches outside"):
            read_contexts(coco(tmp_path, {"annotations": [box]}))

    def test_entries_that_cannot_be_read_are_all_named(self, tmp_path: Path) -> None:
        boxes = [{"image_id": 7, "category_id": 9, "bbox": [0, 0, 1, 1]}, {"image_id": 7, "category_id": 3}, "box"]
        with pytest.raises(InputError) as error:
            read_contexts(coco(tmp_path, {"annotations": boxes}, annotations=[{"caption": "A cat."}]))
        lines = str(error.value).split("\n")
        assert [line.partition(" cannot")[0].rpartition(": ")[2] for line in lines[:4]] == [
            "annotation 1",
            "annotation 1",
            "annotation 2",
            "annotation 3",
        ]
        assert "captions must be" in lines[4]

    def test_half_a_pair_two_pairs_and_another_file(self, tmp_path: Path) -> None:
        coco(tmp_path)
        (tmp_path / "captions_more.json").write_text("{}", encoding="utf-8")
        with pytest.raises(InputError, match="found 2 of them"):
            read_contexts(tmp_path)
        with pytest.raises(InputError, match=r"instances_more.json is missing"):
            read_contexts(tmp_path / "captions_more.json")
        (tmp_path / "instances_more.json").write_text("[", encoding="utf-8")
        with pytest.raises(InputError, match="expected COCO's lists"):
            read_contexts(tmp_path / "captions_more.json")


def test_as_text() -> None:
    context = Context("7", "7.jpg", ("A cat.", "It sleeps."), (Box("cat", (0.1, 0.25, 1 / 3, 1.0)),))
    assert context.text == "A cat.\nIt sleeps.\n\ncat: [0.100, 0.250, 0.333, 1.000]"
    assert Context("8", "8.jpg", ("A cat.",), ()).text == "A cat."
