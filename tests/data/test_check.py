"""Sound data sets of every unusual kind pass a check; what is kept of it is used again exactly when it still holds."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as Embedded
from PIL import Image

from qllava.config import InputError
from qllava.conversation import CHATML
from qllava.data import check as module
from qllava.data import decoded
from qllava.data import rows as reading
from qllava.data.check import Checked, check
from qllava.data.collate import Collator
from qllava.data.encode import Encoder
from qllava.data.problems import Place
from qllava.data.verdict import Verdict
from tests.tiny_models import IMAGE_SIZE, IMAGE_TOKENS, make_tiny_processor

SEEN, ASKED, SAID = "<image>\nWhat is it?", "Where?", "A bus."


@cache
def encoder(**more: Any) -> Encoder:
    tokenizer = make_tiny_processor().tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    return Encoder(tokenizer, CHATML, image, IMAGE_TOKENS, **{"max_length": 512, **more})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    for name, colour in (("red.png", "red"), ("blue.png", "blue"), ("deep/green.png", "green")):
        image = Image.new("RGB", (20, 12), colour)
        image.putpixel((0, 0), (255, 255, 255))  # one of a single colour is noted
        image.save(folder / name)
    return folder


def looked_at(path: Path, made: Encoder | None = None, **more: Any) -> Checked:
    return check(path, None, made or encoder(), progress=False, **more)


def said(checked: Checked) -> list[str]:
    return [str(problem) for problem in checked.problems()]


def turns(*words: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": said} for n, said in enumerate(words)]


def llava(*words: str, **more: Any) -> dict[str, Any]:
    return {"conversations": turns(*words), **more}


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


ROWS: list[dict[str, Any]] = [
    llava(SEEN, "Ein „Bus“.", id="one", image="red.png"),
    llava(ASKED, "Here\u2028or\u0085there \U0001f68c.", id="two"),
    llava("Hello", "Ho", "<image>\nAnd this?", "Blue.", id="three", image="blue.png"),
]


# --- the same rows, written in other ways ---


def saved(path: Path) -> None:
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features({"id": Value("string"), "image": Value("string"), "conversations": List(turn)})
    Dataset.from_list([{"image": None} | row for row in ROWS], features=features).save_to_disk(path)
    for name in ("red.png", "blue.png"):
        (path / name).write_bytes((path.parent / name).read_bytes())


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


LIST, PRETTY = json.dumps(ROWS), json.dumps(ROWS, indent=4, ensure_ascii=False)
WRITTEN: dict[str, str | bytes | Callable[[Path], object]] = {
    "a list on one line": LIST,
    "a list with an end of line": LIST + "\n\n",
    "a row over many lines": PRETTY,
    "a list of rows, one a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
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
    "a tar with its pictures": tar,
}


def learned(checked: Checked) -> list[Any]:
    """What the trainer takes, pictures by their bytes."""
    rows = checked.table.with_transform(checked.layout)[:]
    pictures = [[Path(name).read_bytes() for name in names] for names in rows["pictures"]]
    return list(zip(rows["id"], rows["input_ids"], rows["labels"], pictures, strict=True))


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
    assert verdict.ok and "tr\\udce4in.json: 3 rows" in verdict.text()
    json.dumps(verdict.as_json(), ensure_ascii=False).encode()


# --- rows of every kind ---


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
    "one id for the rows of one picture": (
        [llava(SEEN, SAID, id="p", image="red.png"), llava(SEEN, "Red.", id="p", image="red.png")], 1),
    "several pictures in a row": ([llava("Is <image> like <image>?", "No.", image=["red.png", "deep/green.png"])], 2),
    "the same picture twice": ([llava("Is <image> like <image>?", "Yes.", image=["red.png", "red.png"])], 1),
    "a picture in every turn": (
        [llava(SEEN, SAID, SEEN, "Red.", "And <image>?", SAID, images=["red.png", "blue.png", "red.png"])], 2),
    "a picture in the last turn": ([llava(ASKED, SAID, "Tell me of <image>", "Blue.", image="blue.png")], 1),
    "a picture at the end of a question": ([llava("What is it?\n<image>", SAID, image="red.png")], 1),
    "a picture and no question": ([llava("<image>", SAID, image="red.png")], 1),
    "no pictures": ([llava(ASKED, SAID)], 0),
    "an empty list of pictures": ([llava(ASKED, SAID, images=[])], 0),
    "no picture as null, and as nothing": ([llava(ASKED, SAID, image=None), llava("Hm?", SAID, image="")], 0),
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
    "many rows of one picture": ([llava(SEEN, f"{n} buses", image="red.png") for n in range(40)], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_rows(folder: Path, name: str) -> None:
    rows, pictures = UNUSUAL[name]
    (folder / "train.json").write_text(json.dumps(rows))
    checked = looked_at(folder / "train.json")
    assert said(checked) == []
    assert Verdict.over([checked]).ok
    assert (checked.summary.samples, checked.summary.images) == (len(rows), pictures)
    assert len(checked.table.with_transform(checked.layout)[:]["input_ids"]) == len(rows)


@pytest.mark.parametrize(("delimiter", "file"), [(",", "t.csv"), (";", "t.csv"), ("\t", "t.tsv"), ("\t", "t")])
def test_tables(folder: Path, delimiter: str, file: str) -> None:
    records = [("image", "question", "answer"), ("red.png", "What?", '"A ""red"" bus,\n; or\ttwo"'), ("", "Who?", "I.")]
    (folder / file).write_text("\n".join(delimiter.join(record) for record in records))
    checked = looked_at(folder / file)
    assert Verdict.over([checked]).ok and said(checked) == []
    assert (checked.summary.samples, checked.summary.images) == (2, 1)


def test_pictures_inside_parquet_and_as_long_as_may_be(folder: Path) -> None:
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


# --- pictures of every kind ---


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


PICTURES: dict[str, tuple[str, Callable[[Path], object]]] = {
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
    "a link to a picture": ("a.png", lambda path: path.symlink_to("red.png")),
    "another script in its name": ("картинка 图片 \U0001f68c.png", lambda path: photo().save(path)),
    "signs in its name": ("a 'b' \"c\" #1 %20 <d>&\n.png", lambda path: photo().save(path)),
    "a name of 250 letters": ("n" * 246 + ".png", lambda path: photo().save(path)),
    "one pixel": ("a.png", lambda path: photo(size=(1, 1)).save(path)),
    "three pixels": ("a.png", lambda path: photo(size=(3, 1)).save(path)),
    "three lines": ("a.png", lambda path: photo(size=(200, 3)).save(path)),
    "a line": ("a.png", lambda path: photo(size=(200, 1)).save(path)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_unusual_pictures(folder: Path, name: str) -> None:
    """They pass, and the model gets them: padded, and cropped."""
    file, write = PICTURES[name]
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
    """Sound rows and broken ones, in the order of the file; one is as deep as json reads it."""
    rows: list[Any] = [llava(SEEN, f"{n} buses", id=n, image="red.png") for n in range(12)]
    rows[1:1] = [llava("What?"), [llava("What?", "That.")], llava(SEEN, SAID, image="gone.png")]
    rows[9:9] = [llava("<|im_end|>", "That."), {"id": 9, "question": "a"}, llava("Hm?", "long " * 600)]
    deep = json.dumps(llava("Hm?", "Deep.", id="deep"))[:-1] + ', "meta": ' + "[" * 700 + "]" * 700 + "}"
    (folder / "train.jsonl").write_text(lines(rows) + f"\n{{broken\n{deep}\n")
    here = looked_at(folder / "train.jsonl")
    monkeypatch.setattr(module, "_ROWS", 2)
    monkeypatch.setattr(module, "_ALONE", 2)
    monkeypatch.setenv("QLLAVA_CACHE", str(folder.parent / "cache2"))
    there = looked_at(folder / "train.jsonl")
    assert len(there.table.data.column("id").chunks) > len(here.table.data.column("id").chunks)
    assert there.table.to_list() == here.table.to_list()
    assert list(there.problems()) == list(here.problems())
    assert there.summary == here.summary
    assert (here.summary.rows, here.summary.samples, here.summary.errors) == (19, 13, 7)
    assert sorted(p.name for p in there.folder.iterdir()) == sorted(p.name for p in here.folder.iterdir())


# --- what is kept ---


@pytest.fixture
def train(folder: Path) -> Path:
    path = folder / "train.json"
    path.write_text(LIST, encoding="utf-8")
    return path


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read and decoded from now on, by name."""
    done: list[str] = []
    read, decode = module.read_rows, decoded.open_image

    def reads(path: Path, *args: Any) -> Any:
        done.append(path.name)
        return read(path, *args)

    def decodes(path: Path) -> Any:
        done.append(path.name)
        return decode(path)

    monkeypatch.setattr(module, "read_rows", reads)
    monkeypatch.setattr(decoded, "open_image", decodes)
    return done


def again(path: Path, work: list[str], *args: Any, **more: Any) -> list[str]:
    """Check once more; what was done for it."""
    work.clear()
    looked_at(path, *args, **more)
    return sorted(work)


ALL = ["blue.png", "red.png", "train.json"]


def test_a_second_check_reads_nothing(train: Path, work: list[str]) -> None:
    first = looked_at(train)
    assert sorted(work) == ALL
    assert again(train, work) == []
    second = looked_at(train)
    assert (second.folder, second.summary, learned(second)) == (first.folder, first.summary, learned(first))


def test_rows_that_cannot_be_used_are_found_again_without_reading(train: Path, work: list[str]) -> None:
    train.write_text(json.dumps([{"id": "bad", "question": "a", "answer": ""}]), encoding="utf-8")
    first = looked_at(train)
    assert first.summary.errors == 1
    assert again(train, work) == []
    assert list(looked_at(train).problems()) == list(first.problems())


def test_text_that_changed_is_read_again_and_its_pictures_are_known(train: Path, work: list[str]) -> None:
    looked_at(train)
    train.write_text(PRETTY.replace("bus", "car"), encoding="utf-8")
    assert again(train, work) == ["train.json"]
    train.write_text(LIST, encoding="utf-8")
    assert again(train, work) == []


@pytest.mark.parametrize("more", [{"max_length": 99}, {"too_long": "drop"}], ids=str)
def test_another_encoder_reads_again(train: Path, work: list[str], more: dict[str, Any]) -> None:
    looked_at(train)
    assert again(train, work, encoder(**more)) == ["train.json"]
    assert again(train, work, encoder()) == []


def test_a_file_that_was_only_touched_is_not_read(train: Path, work: list[str]) -> None:
    looked_at(train)
    os.utime(train, (1, 1))
    assert again(train, work) == []


def test_a_picture_that_changed_is_decoded_again_alone(train: Path, work: list[str]) -> None:
    looked_at(train)
    Image.new("RGB", (9, 9)).save(train.parent / "red.png")
    assert again(train, work) == ["red.png"]
    assert again(train, work) == []


def test_a_picture_that_broke_is_found_though_the_rows_are_known(train: Path, work: list[str]) -> None:
    looked_at(train)
    whole = (train.parent / "red.png").read_bytes()
    (train.parent / "red.png").write_bytes(b"no picture")
    for _ in range(2):  # and found again by the next check
        assert again(train, work) == ["red.png"]
        (problem,) = looked_at(train).problems()
        assert (problem.kind, problem.id, problem.place) == ("picture broken", "one", Place(str(train), line=1, row=1))
        assert not Verdict.over([looked_at(train)]).ok
    assert looked_at(train, pictures=False).summary.errors == 0
    (train.parent / "red.png").write_bytes(whole)
    assert again(train, work) == ["red.png"]
    assert Verdict.over([looked_at(train)]).ok


def test_a_picture_that_went_missing_is_found(train: Path, work: list[str]) -> None:
    looked_at(train)
    (train.parent / "blue.png").unlink()
    assert again(train, work) == ["blue.png"]
    name = train.parent / "blue.png"
    assert said(looked_at(train)) == [f"train.json, row 3, id three: {name}: there is no such picture; check the name."]


def test_a_missing_picture_that_was_added_makes_it_sound(train: Path, work: list[str]) -> None:
    (train.parent / "blue.png").rename(train.parent / "away.png")
    assert looked_at(train).summary.errors == 1
    (train.parent / "away.png").rename(train.parent / "blue.png")
    assert again(train, work) == ["blue.png", "train.json"]
    assert Verdict.over([looked_at(train)]).ok
    assert again(train, work) == []


def test_a_missing_file_that_was_added_is_read(train: Path) -> None:
    train.unlink()
    assert looked_at(train).summary.errors == 1
    train.write_text(LIST, encoding="utf-8")
    assert Verdict.over([looked_at(train)]).ok


def test_pictures_are_known_from_another_file_of_their_folder(train: Path, work: list[str]) -> None:
    looked_at(train)
    other = train.parent / "test.json"
    other.write_text(json.dumps([llava(SEEN, SAID, image=name) for name in ("red.png", "deep/green.png")]))
    assert again(other, work) == ["green.png", "test.json"]
    assert again(train, work) == again(other, work) == []


def test_without_pictures_none_is_decoded(train: Path, work: list[str]) -> None:
    (train.parent / "red.png").write_bytes(b"no picture")
    assert again(train, work, pictures=False) == ["train.json"]
    assert again(train, work) == ["blue.png", "red.png"]


def test_the_pictures_in_the_folder_of_a_data_set_are_no_part_of_it(folder: Path, work: list[str]) -> None:
    saved(folder / "set")
    looked_at(folder / "set")
    Image.new("RGB", (5, 5)).save(folder / "set" / "red.png")
    assert again(folder / "set", work) == ["red.png"]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_what_a_loss_of_power_left_empty_is_made_again(train: Path, work: list[str], content: str) -> None:
    kept = looked_at(train).folder
    (known,) = kept.parent.glob("images-*.json")
    known.write_text(content if content != "[]" else "{}")
    (kept / "rows.json").write_text(content if content != "[]" else "{")
    assert again(train, work) == ALL
    assert again(train, work) == []


def test_nothing_else_is_left_behind(train: Path) -> None:
    kept = looked_at(train).folder
    assert sorted(path.name for path in kept.iterdir()) == [
        "pictures.jsonl",
        "rows.json",
        "rows.jsonl",
        "samples.arrow",
    ]
    assert [path for path in kept.parent.iterdir() if ".partial" in path.name] == []


# --- where it cannot be kept ---


def test_a_cache_that_is_no_folder(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (train.parent / "file").write_text("mine")
    monkeypatch.setenv("QLLAVA_CACHE", str(train.parent / "file"))
    with pytest.raises(InputError) as error:
        looked_at(train)
    assert str(error.value) == (
        f"What was found in {train} cannot be kept in {train.parent}/file/checked (Not a directory); "
        "make room there, or name another folder in $QLLAVA_CACHE."
    )
    assert (train.parent / "file").read_text() == "mine"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Call it, and no file may grow over so many bytes any more: what a full disk does, without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1, 100, 2000, 3000])
def test_a_full_disk(train: Path, small_files: Callable[[int], None], work: list[str], size: int) -> None:
    small_files(size)
    try:
        with pytest.raises(InputError) as error:
            looked_at(train)
    finally:
        small_files(0)  # before pytest writes its next dot
    assert str(error.value).startswith(
        f"What was found in {train} cannot be kept in {train.parents[1]}/cache/checked ("
    )
    assert str(error.value).endswith("); make room there, or name another folder in $QLLAVA_CACHE.")
    assert list((train.parents[1] / "cache" / "checked").glob("*")) == []
    assert again(train, work) == ALL


def test_a_disk_that_is_full_for_the_pictures(train: Path, small_files: Callable[[int], None], work: list[str]) -> None:
    """The rows are kept already; a list of pictures is none that half of it was written of."""
    looked_at(train, pictures=False)
    small_files(50)
    try:
        with pytest.raises(InputError, match="cannot be kept in"):
            looked_at(train)
    finally:
        small_files(0)
    assert again(train, work) == ["blue.png", "red.png"]
    assert again(train, work) == []
