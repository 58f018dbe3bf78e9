"""What is shown is what the model gets: text, learned tokens, images; and nothing in it does anything."""

from __future__ import annotations

import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.clip import CLIPImageProcessor

import qllava.nano
from qllava.config import InputError
from qllava.conversation import (
    CHATML,
    IMAGE_TOKEN,
    LLAMA_2,
    LLAMA_3,
    PLAIN,
    TEMPLATES,
    VICUNA_V1,
    Conversation,
    Template,
    Turn,
)
from qllava.data import inspect
from qllava.data.encode import IGNORE_INDEX, Encoder, Sample
from qllava.data.formats import Example
from qllava.data.inspect import IMAGE_INDEX, Piece, Shown, as_json, html, show, terminal
from qllava.data.problems import Place
from tests.test_page import Reader
from tests.tiny_models import (
    IMAGE_LAYOUT,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    make_image,
    make_tiny_processor,
    make_tiny_tokenizer,
)

PLACE = Place("train.json", row=3)
SCRIPT = "<script>alert('x')</script> & \"quoted\""


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    made = make_tiny_tokenizer()
    made.add_tokens([c for template in TEMPLATES.values() for c in template.controls], special_tokens=True)
    return made


@cache
def nano_tokenizer() -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(Path(qllava.nano.__path__[0], "weights", "llama"))
    made.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return made  # type: ignore[no-any-return]


def encoder(template: Template = CHATML, tokens: PreTrainedTokenizerBase | None = None, **more: Any) -> Encoder:
    tokens = tokens or tokenizer()
    return Encoder(tokens, template, tokens.convert_tokens_to_ids(IMAGE_TOKEN), IMAGE_LAYOUT, **more)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "bus.png"
    make_image("red", (64, 32)).save(path)
    return path


def example(*said: str, images: tuple[Path, ...] = (), id: str = "x7") -> Example:
    turns = tuple(Turn("assistant" if n % 2 else "user", content) for n, content in enumerate(said))
    return Example(id, images, Conversation(turns), PLACE)


def shown(*said: str, images: tuple[Path, ...] = (), **more: Any) -> Shown:
    one = show(example(*said, images=images), encoder(**more), None)
    assert one is not None
    return one


def made(*pieces: Piece) -> Shown:
    """A sample of given pieces, whatever a tokenizer would make of them."""
    ids = [id for piece in pieces for id in piece.ids]
    labels = [id if piece.learned else IGNORE_INDEX for piece in pieces for id in piece.ids]
    return Shown(Sample("x7", ids, labels, (), (), PLACE), pieces, ())


def read(text: str, id: int = 5) -> Piece:
    return Piece(text, (id,), False)


def learned(text: str, id: int = 6) -> Piece:
    return Piece(text, (id,), True)


IMAGE = Piece(IMAGE_TOKEN, (9,) * 16, False, 16)


def runs(one: Shown) -> list[str]:
    """The learned runs as text."""
    by_learned = groupby(one.pieces, key=lambda piece: piece.learned)
    return ["".join(piece.text for piece in run) for learned, run in by_learned if learned]


def check(one: Shown) -> None:
    """What holds for every sample: no token is lost, and the marks are those of the labels."""
    assert [id for piece in one.pieces for id in piece.ids] == one.sample.input_ids
    marks = [piece.learned for piece in one.pieces for _ in piece.ids]
    assert marks == [label != IGNORE_INDEX for label in one.sample.labels]
    assert all(piece.images in (0, len(piece.ids)) for piece in one.pieces)


# Where bytes, words and marks of tokenizers meet: characters of one to four bytes, joined ones, the replacement
# character itself, marks of a sentencepiece, and everything else that Unicode holds.
ODD = [
    "red",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "€",
    "😀",
    "👩\u200d👧",
    "\ufffd",
    "\u2581",
    "\u0120",
    "<0xE2>",
    "\x1b[31m",
    "אב",
]
WORDS = st.lists(st.sampled_from(ODD) | st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
SAID = WORDS.map("".join).filter(str.strip)


@settings(deadline=None, max_examples=120)
@given(
    rounds=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3),
    template=st.sampled_from([CHATML, LLAMA_3, VICUNA_V1, LLAMA_2]),
    nano=st.booleans(),
)
def test_the_pieces_are_the_text(rounds: list[tuple[str, str]], template: Template, nano: bool) -> None:
    made = encoder(template, nano_tokenizer() if nano and template is CHATML else tokenizer())
    row = example(*(words for pair in rounds for words in pair))
    one = show(row, made, None)
    assert one is not None
    check(one)
    bos, eos = made.tokenizer.bos_token or "", made.tokenizer.eos_token or ""
    assert "".join(piece.text for piece in one.pieces) == template.render(row.conversation, bos=bos, eos=eos).text
    end = "<|eot_id|>" if template is LLAMA_3 else "<|im_end|>"
    end = f" {end}" if template is LLAMA_2 else end
    before = "" if template.strip else " "
    answers = [answer.strip() if template.strip else answer for _, answer in rounds]
    assert runs(one) == [f"{before}{answer}{end}" for answer in answers]


@settings(deadline=None, max_examples=40)
@given(caption=SAID)
def test_captions(caption: str, image: Path) -> None:
    one = shown("<image>", caption, images=(image,), template=PLAIN)
    check(one)
    assert runs(one) == [f"{caption}\n"]
    assert "".join(piece.text for piece in one.pieces) == f"{IMAGE_TOKEN}{caption}\n"


@settings(deadline=None, max_examples=60)
@given(question=SAID, answer=SAID)
def test_sentencepiece_with_the_spaces_that_it_puts_in(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> None:
    # The tokenizer's own space mark is a space to it.
    question, answer = (words.replace("\u2581", "_") for words in (question, answer))
    made = encoder(VICUNA_V1, sentencepiece_tokenizer)
    row = example(question, answer, question, answer)
    one = show(row, made, None)
    assert one is not None
    check(one)
    text = VICUNA_V1.render(row.conversation).text
    # In legacy mode it begins every text behind a control token with a space.
    assert "".join(piece.text for piece in one.pieces) == re.sub("(<s>|</s>)(?=.)", r"\1 ", text, flags=re.DOTALL)
    assert runs(one) == [f" {answer}</s>"] * 2


@pytest.mark.parametrize("word", ["é", "€", "😀", "\ufffd", "😀😀", "a\ufffdb"])
def test_a_character_of_several_tokens_is_one_piece(
    word: str, request: pytest.FixtureRequest, sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    for made in (encoder(), encoder(CHATML, nano_tokenizer()), encoder(VICUNA_V1, sentencepiece_tokenizer)):
        one = show(example(word, word), made, None)
        assert one is not None
        assert sum(piece.text.count("\ufffd") for piece in one.pieces) == 2 * word.count("\ufffd")
        own = [piece for piece in one.pieces if piece.text.strip() and piece.text.strip() in word]
        assert {piece.text.strip() for piece in own} == set(word)
    assert any(len(piece.ids) > 1 for piece in shown("€", "€").pieces), "the tiny tokenizer has bytes only"


def test_a_character_that_is_learned_by_half_is_shown_so() -> None:
    """No template makes such labels; if some mistake did, it must be seen here."""
    ids = tokenizer().encode("€", add_special_tokens=False)
    assert len(ids) > 1
    sample = Sample("x7", ids, [IGNORE_INDEX, *ids[1:]], (), (), PLACE)
    assert [piece.learned for piece in inspect._pieces(sample, encoder())] == [False, True]


def test_each_image_is_one_piece(image: Path) -> None:
    one = shown("<image>\n<image><image>Alike?", "yes", images=(image,) * 3)
    check(one)
    images = [piece for piece in one.pieces if piece.images]
    id = tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
    assert images == [Piece(IMAGE_TOKEN, (id,) * IMAGE_TOKENS, False, IMAGE_TOKENS)] * 3
    assert len(one.images) == 3 and one.images[0].size == (64, 32), "without a processor, as it was opened"


def test_what_the_tokenizer_changes_is_seen() -> None:
    made = make_tiny_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    one = show(example("What?", "A Red BUS."), encoder(CHATML, made), None)
    assert one is not None
    assert runs(one) == ["a red bus.<|im_end|>"]


def test_images_are_shown_as_the_processor_made_them(image: Path) -> None:
    processor = make_tiny_processor().image_processor
    one = show(example("<image>\nWhat?", "A bus.", images=(image,)), encoder(), processor)
    assert one is not None
    (seen,) = one.images
    assert seen.size == (IMAGE_SIZE, IMAGE_SIZE)
    padding = tuple(int(255 * mean) for mean in processor.image_mean)
    corners = [seen.getpixel((1, 1)), seen.getpixel((IMAGE_SIZE - 2, IMAGE_SIZE - 2))]
    assert corners == [padding, padding], "the wide image has the padding above and below it"
    assert seen.getpixel((IMAGE_SIZE - 4, IMAGE_SIZE // 2)) == (255, 0, 0)


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False, "do_normalize": False}, {}])
def test_what_the_processor_does_to_colours_is_undone(change: dict[str, bool], tmp_path: Path) -> None:
    size = {"height": 24, "width": 24}
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=size, **change)
    noise = Image.effect_noise((24, 24), 60).convert("RGB")
    noise.save(tmp_path / "noise.png")
    one = show(example("<image>\nWhat?", "Noise.", images=(tmp_path / "noise.png",)), encoder(), processor)
    assert one is not None
    assert one.images[0].tobytes() == noise.tobytes()


def test_an_image_that_cannot_be_read_is_said_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^train.json, example 3, id x7: .*bad.png"):
        show(example("<image>\nWhat?", "A bus.", images=(tmp_path / "bad.png",)), encoder(), None)


def test_what_the_length_policy_drops_is_not_shown() -> None:
    assert show(example("What?", "red " * 50), encoder(max_length=20, too_long="drop"), None) is None


def test_what_the_length_policy_cuts_is_not_shown() -> None:
    one = shown("What?", "red", "What?", "green " * 50, max_length=40, too_long="trim")
    check(one)
    assert runs(one) == ["red<|im_end|>"]


def test_json_folds_each_image_into_one_number(image: Path) -> None:
    one = shown("<image><image>\nWhat é?", "A € bus.", images=(image, image))
    out = as_json(one)
    assert list(out) == ["id", "input_ids", "labels"] and out["id"] == "x7"
    image_id = tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
    text = CHATML.render(example("<image><image>\nWhat é?", "A € bus.").conversation).text
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert out["input_ids"] == [IMAGE_INDEX if id == image_id else id for id in ids]
    learned = tokenizer().encode("A € bus.<|im_end|>", add_special_tokens=False)
    newline = tokenizer().encode("\n", add_special_tokens=False)
    before = len(ids) - len(learned) - len(newline)
    assert out["labels"] == [IGNORE_INDEX] * before + learned + [IGNORE_INDEX] * len(newline)


def test_a_plain_terminal() -> None:
    pieces = [IMAGE, read("\n"), read("Wh"), read("ich"), read(" one?"), learned(" a"), learned(" bus"), read("USER:")]
    assert terminal(made(*pieces), colour=False).splitlines() == [
        "train.json, example 3, id x7: 23 tokens, 2 learned (in ⟦ ⟧), no image",
        "<image ×16>·↵",
        "Wh·ich· one?⟦ a· bus⟧USER:",
    ]


def test_an_image_in_the_terminal(image: Path) -> None:
    lines = terminal(shown("<image>\nWhat?", "red", images=(image,)), colour=False).splitlines()
    assert lines[0].endswith("learned (in ⟦ ⟧), bus.png 64×32")
    assert "<image ×16>·↵" in lines


def test_lines_end_where_the_text_ends_them() -> None:
    inside = made(read("list:\n"), learned("1."), learned("\n\n"), learned("2."), learned("\n"), read("USER"))
    assert terminal(inside, colour=False).splitlines()[1:] == ["list:↵", "⟦1.·↵↵", "2.·↵⟧", "USER"]
    assert terminal(made(learned("a\n")), colour=False).endswith("⟦a↵⟧")


def test_a_terminal_with_colours() -> None:
    out = terminal(made(IMAGE, read("\n"), read("Which?"), learned(" a"), learned(" bus"), read("\n")), colour=True)
    assert out.splitlines() == [
        "\x1b[1mtrain.json, example 3, id x7: 21 tokens, 2 learned (green), no image\x1b[0m",
        "\x1b[7m<image ×16>\x1b[0m\x1b[0;4m↵\x1b[0m",
        "\x1b[0mWhich?\x1b[0m\x1b[1;30;42;4m a\x1b[0m\x1b[1;30;42m bus\x1b[0m\x1b[0;4m↵\x1b[0m",
    ]


CONTROLS = "a\x1b[2J\x07\r\x00\x9b31m\u202e\u2028b"


@pytest.mark.parametrize("colour", [True, False])
def test_no_control_character_reaches_the_terminal(colour: bool, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2Jbus.png"
    make_image("red").save(path)
    row = Example(f"x\x1b[2J\n{CONTROLS}", (path,), example(f"<image>\n{CONTROLS}", CONTROLS).conversation, PLACE)
    one = show(row, encoder(), None)
    assert one is not None
    out = re.sub(r"\x1b\[(0|1|7|1;30;42)?(;?4)?m", "", terminal(one, colour=colour))
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert r"\x1b" in out and r"\x9b" in out and r"\u202e" in out and r"\u2028" in out
    assert len(out.splitlines()) == len(out.split("\n"))


def test_the_page_explains_itself_and_marks_by_more_than_colour(image: Path) -> None:
    pieces = (IMAGE, read("\n"), read("What?", 7), learned(" a", 11), learned(" <b>", 12), learned("€", 13))
    page = html([made(*pieces), shown("<image>\nWhat?", "a", images=(image,))], title="Nano", about=[("Of", "a.json")])
    reader = Reader(page)
    assert reader.open == []
    boxes = re.findall(r'<(b|span) class="token([^"]*)" title="id ([^"]*)">([^<]*)</', page)
    assert boxes[:6] == [
        ("span", " image", "9", "&lt;image ×16&gt;"),
        ("span", "", "5", "↵"),
        ("span", "", "7", "What?"),
        ("b", " learned", "11, learned", " a"),
        ("b", " learned", "12, learned", " &lt;b&gt;"),
        ("b", " learned", "13, learned", "€"),
    ]
    words = " ".join(reader.words)
    for expected in (
        "How to read this",
        "train.json, example 3, id x7",
        "Learned:",
        "a.json",
        "bus.png, 64×32",
        "21 tokens: 3 learned",
        "16 for 1 image",
    ):
        assert expected in words
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == ["bus.png"]


def test_a_page_without_samples() -> None:
    page = html([], title="None", about=[])
    assert "no samples to show" in page and Reader(page).open == []


def test_no_text_becomes_markup() -> None:
    row = Example(SCRIPT, (), example(f"{SCRIPT}\n{CONTROLS}", SCRIPT).conversation, PLACE)
    one = show(row, encoder(), None)
    assert one is not None
    page = html([one], title=SCRIPT, about=[(SCRIPT, SCRIPT)])
    reader = Reader(page)
    assert "script" not in {tag for tag, _ in reader.tags} and reader.open == []
    boxes = re.search(r'<article.*?<div class="tokens">(.*?)</div>', page, re.DOTALL)
    assert boxes is not None
    text = "".join(Reader(boxes.group(1)).words)
    assert text.count(SCRIPT) == 2
    assert all(c.isprintable() for c in text)


@settings(deadline=None, max_examples=40)
@given(question=SAID, answer=SAID, id=st.text())
def test_any_text_keeps_page_and_terminal_whole(question: str, answer: str, id: str) -> None:
    row = Example(id, (), example(question, answer).conversation, PLACE)
    one = show(row, encoder(), None)
    assert one is not None
    assert Reader(html([one], title="any", about=[])).open == []
    assert all(c.isprintable() or c == "\n" for c in terminal(one, colour=False))
