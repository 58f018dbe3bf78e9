"""Sound data sets of every unusual kind pass a check, in one piece and in many."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as Embedded
from PIL import Image

from qllava.data import check as module
from qllava.data import records as reading
from qllava.data.collate import Collator
from qllava.data.verdict import Verdict
from qllava.workers import pool
from tests.data.checking import (
    ASKED,
    LIST,
    PRETTY,
    ROWS,
    SAID,
    SEEN,
    encoder,
    images_in,
    learned,
    lines,
    llava,
    looked_at,
    said,
    saved,
    turns,
)
from tests.tiny_models import IMAGE_SIZE, make_tiny_processor


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    return images_in(tmp_path / "data")


# --- the same examples, written in other ways ---


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for row in ROWS:
            for suffix, data in ((".json", json.dumps(row).encode()),
                                 (".png", row.get("image") and (path.parent / row["image"]).read_bytes())):  # fmt: skip
                if data:
                    member = tarfile.TarInfo(row["id"] + suffix)
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"image": None} | row for row in ROWS]), path)


def linked(path: Path) -> None:
    (path.parent / "deep" / "real.json").write_text(json.dumps(ROWS), encoding="utf-8")
    path.symlink_to(Path("deep", "real.json"))


WRITTEN: dict[str, str | bytes | Callable[[Path], object]] = {
    "a list on one line": LIST,
    "a list with an end of line": LIST + "\n\n",
    "an example over many lines": PRETTY,
    "a list of examples, one a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
    "a list behind blank lines": "\n\n \t" + PRETTY,
    "a byte order mark": "\ufeff" + LIST,
    "Windows lines": PRETTY.replace("\n", "\r\n"),
    "a mark and Windows lines": "\ufeff" + lines(ROWS).replace("\n", "\r\n") + "\r\n",
    "JSONL": lines(ROWS),
    "JSONL with an end of line": lines(ROWS) + "\n",
    "JSONL with blank lines": "\n" + lines(ROWS).replace("\n", "\n\n  \n") + "\n\n",
    "JSONL with a mark": "\ufeff" + lines(ROWS),
    "JSONL in old Mac lines": lines(ROWS).replace("\n", "\r"),
    "JSONL of escapes alone": "\n".join(map(json.dumps, ROWS)),
    "JSONL with white space around": "\n".join(f"  {json.dumps(row)}\t" for row in ROWS),
    "other keys, and numbers that are none": lines(
        [row | {"score": float("nan"), "size": float("inf"), "meta": {"a": [None, {}]}} for row in ROWS]
    ),
    "keys in another order": lines([dict(reversed(row.items())) for row in ROWS]),
    "a key that is far down": lines([row | {"meta": json.loads("[" * 400 + "]" * 400)} for row in ROWS]),
    "a link to the file": linked,
    "Parquet": parquet,
    "a saved Hugging Face dataset": saved,
    "a tar with its images": tar,
}


@pytest.mark.parametrize("file", ["train.json", "train.jsonl", "train", "Küche 1.csv", "\U0001f68c.json"])
def test_a_file_is_known_by_what_it_holds(folder: Path, file: str) -> None:
    for text in (LIST, lines(ROWS)):
        (folder / file).write_text(text, encoding="utf-8")
        assert Verdict.over([looked_at(folder / file)]).ok


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_rows_written_in_another_way(folder: Path, name: str) -> None:
    (folder / "plain.jsonl").write_text(lines(ROWS), encoding="utf-8")
    expected = learned(looked_at(folder / "plain.jsonl"))
    content, path = WRITTEN[name], folder / "train.any"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    checked = looked_at(path)
    verdict = Verdict.over([checked])
    found = [problem for problem in verdict.problems() if problem.kind != "key not read"]
    assert verdict.ok and found == [] and "Ready:" in verdict.text()
    assert learned(checked) == expected and len(expected) == 3


def test_a_file_name_that_is_no_utf8(folder: Path) -> None:
    path = folder / os.fsdecode(b"tr\xe4in.json")
    try:
        path.write_text(LIST, encoding="utf-8")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    verdict = Verdict.over([looked_at(path)])
    assert verdict.ok and "tr\\udce4in.json: 3 examples" in verdict.text()
    json.dumps(verdict.as_json(), ensure_ascii=False).encode()


# --- examples of every kind ---


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


PART = {"type": "image"}
UNUSUAL: dict[str, tuple[Any, int]] = {
    "no ids": ([llava(ASKED, SAID), llava(ASKED, "Here.")], 0),
    "blank ids": ([llava(ASKED, SAID, id=""), llava(ASKED, "Here.", id=None)], 0),
    "numbers as ids": ([llava(ASKED, SAID, id=0), llava(ASKED, "Here.", id=-17)], 0),
    "an id of 4,000 digits": ([llava(ASKED, SAID, id=10**4000 - 1)], 0),
    "an id of many lines": ([llava(ASKED, SAID, id="a\nb\0c")], 0),
    "one id for the examples of one image": (
        [llava(SEEN, SAID, id="p", image="red.png"), llava(SEEN, "Red.", id="p", image="red.png")], 1),
    "several images in a row": ([llava("Is <image> like <image>?", "No.", image=["red.png", "deep/green.png"])], 2),
    "the same image twice": ([llava("Is <image> like <image>?", "Yes.", image=["red.png", "red.png"])], 1),
    "an image in every turn": (
        [llava(SEEN, SAID, SEEN, "Red.", "And <image>?", SAID, images=["red.png", "blue.png", "red.png"])], 2),
    "an image in the last turn": ([llava(ASKED, SAID, "Tell me of <image>", "Blue.", image="blue.png")], 1),
    "an image at the end of a question": ([llava("What is it?\n<image>", SAID, image="red.png")], 1),
    "an image and no question": ([llava("<image>", SAID, image="red.png")], 1),
    "no images": ([llava(ASKED, SAID)], 0),
    "an empty list of images": ([llava(ASKED, SAID, images=[])], 0),
    "no image as null, and as nothing": ([llava(ASKED, SAID, image=None), llava("Hm?", SAID, image="")], 0),
    "image beside an empty images": ([llava(SEEN, SAID, image="red.png", images=[])], 1),
    "a system prompt": ([{"conversations": [{"from": "system", "value": "Be brief."}, *turns(SEEN, SAID)],
                          "image": "red.png"}], 1),
    "an empty system prompt": ([{"conversations": [{"from": "system", "value": ""}, *turns(ASKED, SAID)]}], 0),
    "messages": ([{"messages": [message("user", SEEN), message("assistant", SAID)], "images": ["red.png"]}], 1),
    "messages with parts": ([{"messages": [message("system", [text("Be "), text("brief.")]),
                                           message("user", [text("What?"), PART, PART]),
                                           message("assistant", [text(SAID)])], "images": ["red.png", "blue.png"]}], 2),
    "ShareGPT with the roles of messages": (
        [{"conversations": [{"from": "user", "value": ASKED}, {"from": "assistant", "value": SAID}]}], 0),
    "messages beside null": (
        [{"conversations": None, "messages": [message("user", ASKED), message("assistant", SAID)]}], 0),
    "questions": ([{"question": "What?", "answer": "A bus.", "image": "red.png", "type": "what"},
                   {"question": "Is <image> red?", "answer": "Yes.", "image": "red.png"}], 1),
    "kinds side by side": ([llava(ASKED, SAID), {"question": "What?", "answer": "0"},
                            {"messages": [message("user", "0"), message("assistant", "Nought")]}], 0),
    "tokens of other models": ([llava("What is </s>?", "It ends <s>, as <|eot_id|> and [/INST] do.")], 0),
    "pieces of control tokens": ([llava("<|im_end", "|> < image> <Image> <|im_ end|>")], 0),
    "words of the template": ([llava("USER: a\nassistant\nb", "ASSISTANT: user\n\n")], 0),
    "characters that cannot be seen": ([llava("\u200b\u202ea\u0301", "\0\x1b[31m\ufeff\uffff\U0010ffff")], 0),
    "white space around an answer": ([llava(" \n What? ", "\t That.\n\n")], 0),
    "a long conversation": ([llava(*("a", "b") * 24)], 0),
    "a name with a path inside": ([llava(SEEN, SAID, image="./deep/../deep//green.png")], 1),
    "a sub folder": ([llava(SEEN, SAID, image="deep/green.png")], 1),
    "many examples of one image": ([llava(SEEN, f"{n} buses", image="red.png") for n in range(40)], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_rows(folder: Path, name: str) -> None:
    rows, images = UNUSUAL[name]
    (folder / "train.json").write_text(json.dumps(rows))
    checked = looked_at(folder / "train.json")
    assert said(checked) == []
    assert Verdict.over([checked]).ok
    assert (checked.summary.samples, checked.summary.images) == (len(rows), images)
    assert len(checked.table.with_transform(checked.layout)[:]["input_ids"]) == len(rows)


@pytest.mark.parametrize(("delimiter", "file"), [(",", "t.csv"), (";", "t.csv"), ("\t", "t.tsv"), ("\t", "t")])
def test_tables(folder: Path, delimiter: str, file: str) -> None:
    records = [("image", "question", "answer"), ("red.png", "What?", '"A ""red"" bus,\n; or\ttwo"'), ("", "Who?", "I.")]
    (folder / file).write_text("\n".join(delimiter.join(record) for record in records))
    checked = looked_at(folder / file)
    assert Verdict.over([checked]).ok and said(checked) == []
    assert (checked.summary.samples, checked.summary.images) == (2, 1)


def test_images_inside_parquet_and_as_long_as_may_be(folder: Path) -> None:
    features = Features({"image": Embedded(), "question": Value("string"), "answer": Value("string")})
    rows = [{"image": str(folder / name), "question": "What?", "answer": name} for name in ("red.png", "blue.png")]
    rows.append(rows[0] | {"answer": "Another one, and longer"})
    Dataset.from_list(rows, features=features).to_parquet(folder / "t.parquet")
    checked = looked_at(folder / "t.parquet")
    assert said(checked) == [] and (checked.summary.samples, checked.summary.images) == (3, 2)
    longest = checked.summary.tokens["max"]
    exact = looked_at(folder / "t.parquet", encoder(max_length=longest))
    assert said(exact) == [] and exact.summary.tokens["max"] == longest
    assert looked_at(folder / "t.parquet", encoder(max_length=longest - 1)).summary.errors == 1


# --- images of every kind ---


def photo(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert(mode)


def upside_down(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(path, exif=exif)


def moving(path: Path) -> None:
    photo("P").save(path, save_all=True, append_images=[Image.new("P", (24, 16), n) for n in range(3)])


def damaged_exif(path: Path) -> None:
    photo().save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\xff" * 30)


def elsewhere(path: Path) -> None:
    photo().save(path.parents[1] / "real.png")
    path.symlink_to(path.parents[1] / "real.png")


def transparent(path: Path) -> None:
    photo("P").save(path, transparency=bytes(range(256)))


IMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "turned by EXIF": ("a.jpg", upside_down),
    "EXIF that is damaged": ("a.jpg", damaged_exif),
    "CMYK": ("a.jpg", lambda path: photo("CMYK").save(path)),
    "greyscale": ("a.jpg", lambda path: photo("L").save(path)),
    "progressive": ("a.jpg", lambda path: photo(size=(90, 60)).save(path, progressive=True)),
    "a palette": ("a.png", lambda path: photo("P").save(path)),
    "a palette with transparency": ("a.png", transparent),
    "RGBA": ("a.png", lambda path: photo("RGBA").save(path)),
    "grey with alpha": ("a.png", lambda path: photo("LA").save(path)),
    "black and white": ("a.png", lambda path: photo("1").save(path)),
    "16 bit": ("a.png", lambda path: Image.frombytes("I;16", (24, 16), bytes(range(256)) * 3).save(path)),
    "floats": ("a.tiff", lambda path: photo("F").save(path)),
    "a GIF that moves": ("a.gif", moving),
    "a PNG that moves": ("a.png", moving),
    "a WebP": ("a.webp", lambda path: photo().save(path)),
    "a BMP": ("a.bmp", lambda path: photo().save(path)),
    "a PNG that is called JPEG": ("a.jpg", lambda path: photo().save(path, "PNG")),
    "no suffix": ("picture", lambda path: photo().save(path, "JPEG")),
    "capital letters": ("A.JPEG", lambda path: photo().save(path)),
    "a link to another folder": ("a.png", elsewhere),
    "a link to an image": ("a.png", lambda path: path.symlink_to("red.png")),
    "another script in its name": ("картинка 图片 \U0001f68c.png", lambda path: photo().save(path)),
    "signs in its name": ("a 'b' \"c\" #1 %20 <d>&\n.png", lambda path: photo().save(path)),
    "a name of 250 letters": ("n" * 246 + ".png", lambda path: photo().save(path)),
    "one pixel": ("a.png", lambda path: photo(size=(1, 1)).save(path)),
    "three pixels": ("a.png", lambda path: photo(size=(3, 1)).save(path)),
    "three lines": ("a.png", lambda path: photo(size=(200, 3)).save(path)),
    "a line": ("a.png", lambda path: photo(size=(200, 1)).save(path)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_unusual_images(folder: Path, name: str) -> None:
    """They pass, and the model gets them: padded, and cropped."""
    file, write = IMAGES[name]
    write(folder / file)
    (folder / "train.json").write_text(json.dumps([llava(SEEN, SAID, image=file)]))
    checked = looked_at(folder / "train.json")
    assert [problem.kind for problem in checked.problems()] == (["one colour"] if name == "one pixel" else [])
    assert Verdict.over([checked]).ok and checked.summary.images == 1
    for pad in (True, False):
        processor = make_tiny_processor().image_processor
        processor.do_pad = pad
        batch = Collator(0, processor)([checked.table.with_transform(checked.layout)[0]])
        assert batch["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["pixel_values"].isfinite().all()


# --- in pieces, and in processes ---


def test_a_file_larger_than_a_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "train.json"
    path.write_text(PRETTY, encoding="utf-8")
    expected = learned(looked_at(path))
    for size in (7, 64):
        monkeypatch.setattr(reading, "_PIECE", size)
        monkeypatch.setenv("QLLAVA_CACHE", str(folder.parent / f"cache{size}"))
        assert learned(looked_at(path)) == expected


def test_chunks_in_processes_give_what_they_give_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound examples and broken ones, in the order of the file; one is as deep as json reads it."""
    rows: list[Any] = [llava(SEEN, f"{n} buses", id=n, image="red.png") for n in range(12)]
    rows[1:1] = [llava("What?"), [llava("What?", "That.")], llava(SEEN, SAID, image="gone.png")]
    rows[9:9] = [llava("<|im_end|>", "That."), {"id": 9, "question": "a"}, llava("Hm?", "long " * 600)]
    deep = json.dumps(llava("Hm?", "Deep.", id="deep"))[:-1] + ', "meta": ' + "[" * 700 + "]" * 700 + "}"
    (folder / "train.jsonl").write_text(lines(rows) + f"\n{{broken\n{deep}\n")
    here = looked_at(folder / "train.jsonl")
    monkeypatch.setattr(module, "_ROWS", 2)
    monkeypatch.setattr(module, "_ALONE", 2)
    monkeypatch.setenv("QLLAVA_CACHE", str(folder.parent / "cache2"))
    started: list[int] = []
    monkeypatch.setattr(module, "pool", lambda n, **k: (started.append(n), pool(n, **k))[1])
    there = looked_at(folder / "train.jsonl", workers=2)
    assert started == [2]
    assert len(there.table.data.column("id").chunks) > len(here.table.data.column("id").chunks)
    assert there.table.to_list() == here.table.to_list()
    assert list(there.problems()) == list(here.problems())
    assert there.summary == here.summary
    assert (here.summary.rows, here.summary.samples, here.summary.errors) == (19, 13, 7)
    assert sorted(p.name for p in there.folder.iterdir()) == sorted(p.name for p in here.folder.iterdir())
    monkeypatch.setenv("QLLAVA_CACHE", str(folder.parent / "cache3"))
    alone = looked_at(folder / "train.jsonl", workers=1)
    assert started == [2] and alone.table.to_list() == here.table.to_list()
