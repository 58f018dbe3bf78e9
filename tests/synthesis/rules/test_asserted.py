"""What a caption says is there: by the rules, and by the checker's own reading, which must come to the same end."""

from __future__ import annotations

import pytest

from qllava.data.contexts import Context
from qllava.synthesis.rules.asserted import asserted, denied, lacks_article
from qllava.synthesis.rules.nouns import spelling
from qllava.synthesis.rules.view import View
from tests.synthesis.rules.reading import asserts


def said_by(*captions: str) -> list[str]:
    """What two of these captions agree on."""
    return View(Context("1", "1.jpg", captions, ())).agreed_things()


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("A man waiting for a train.", "train"),
        ("A man without a shirt.", "shirt"),
        ("There is not a car in the street.", "car"),
        ("A boy eats a hot dog.", "dog"),
        ("A man wearing a toothbrush as a moustache.", "moustache"),
        ("A toothbrush like a mustache.", "moustache"),
        ("A toy train on a table.", "train"),
        ("People at a train station.", "train"),
        ("A teddy bear on a bed.", "bear"),
        ("A fire hydrant on a street.", "fire"),
        ("A picture of a horse on a wall.", "horse"),
        ("A drawing of a cat.", "cat"),
        ("A street with no cars.", "car"),
        ("A woman looking for a dog.", "dog"),
        ("A man about to catch a frisbee.", "frisbee"),
        ("A dog or a cat on a bed.", "cat"),
        ("A kite shaped like a bird.", "bird"),
        ("A statue of a man.", "man"),
        ("A wooden horse in a room.", "horse"),
        ("A tree lined street.", "tree"),
        ("A piece of a car.", "car"),
        ("A man going to a beach.", "beach"),
        ("A man is on a bus stop bench.", "bus"),
        ("A house with its roof missing.", "roof"),
        ("A dog's bowl on a floor.", "dog"),
        ("A man who could be on a boat.", "boat"),
        ("A cat seen in a mirror.", "cat"),
        ("A man dressed as a cow.", "cow"),
        ("A sign for a restaurant.", "restaurant"),
        ("A man who wants a bicycle.", "bicycle"),
        ("A horse drawn carriage.", "horse"),
        ("A dog house in a yard.", "dog"),
        ("A man instead of a woman.", "woman"),
        ("A view from a bridge.", "bridge"),
        ("A sign that says stop for a bus.", "bus"),
        ("A cow skull on a wall.", "cow"),
        ("A birthday cake in the shape of a truck.", "truck"),
        ("A boy imagines a boat.", "boat"),
        ("A car parked where a tree stood.", "tree"),
        ("A bus converted into a house.", "house"),
        ("A man folds a napkin into a swan.", "swan"),
        ("A boy wants to ride a horse.", "horse"),
        ("A computer mouse on a desk.", "mouse"),
        ("A cat sleeps next to a stuffed bear.", "bear"),
        ("A poster of a woman on a wall.", "woman"),
        ("A cake decorated with a picture of a car.", "car"),
        ("The number of a bus.", "bus"),
        ("A dog is chasing a imaginary cat.", "cat"),
        ("A photo of a kitchen.", "kitchen"),
        ("A train is nowhere to be seen.", "train"),
        ("The bench is missing.", "bench"),
        ("An area used for a market.", "market"),
        ("A room lacking a window.", "window"),
        ("A place to park a boat.", "boat"),
        ("A mural of an elephant on a wall.", "elephant"),
        ("A cup with a horse logo.", "horse"),
        ("A man holds a bat shaped balloon.", "balloon"),
        ("She looks as if on a boat.", "boat"),
        ("A chocolate cow on a plate.", "cow"),
        ("A gummy bear on a plate.", "bear"),
        ("A horse statue in a park.", "horse"),
        ("A cat face on a cup.", "cat"),
        ("A cat sitting in a bathroom sink.", "bathroom"),
    ],
)
def test_not_asserted(caption: str, noun: str) -> None:
    """Negation, purpose, comparison, compounds, parts, and things that show other things."""
    assert noun not in asserted(caption)
    assert not asserts(caption, noun), "the checker is to see it too"
    assert noun not in said_by(caption, caption)


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("A man riding a horse on a beach.", "horse"),
        ("A man riding a horse on a beach.", "beach"),
        ("There are two dogs on the grass.", "dog"),
        ("A street sign in front of some trees.", "street sign"),
        ("A street sign in front of some trees.", "tree"),
        ("A cat and a dog sleeping on a bed.", "dog"),
        ("A cat and a dog sleeping on a bed.", "bed"),
        ("A woman is holding an umbrella.", "umbrella"),
        ("A bowl full of fruit.", "bowl"),
        ("A red bus parked next to a building.", "building"),
        ("A large window and a door.", "door"),
        ("A group of men near a fence.", "man"),
        ("A news paper on a table.", "newspaper"),
    ],
)
def test_asserted(caption: str, noun: str) -> None:
    assert noun in asserted(caption)
    assert asserts(caption, noun)


@pytest.mark.parametrize(
    ("captions", "agreed"),
    [
        (("A moustache on a man.", "A man with a mustache."), ["man", "moustache"]),
        (("A man with a moustache.", "A dog on a bed."), []),
        (("Trees near a lake.", "A lake and some trees."), ["lake", "trees"]),
        (("A tree near a lake.", "Trees by a lake."), ["lake", "tree"]),
        (("A cat on a sofa.", "A cat on a couch."), ["cat", "couch"]),
        (("A bathroom with a sink.", "A sink in a room.", "A bathroom with a door.", "A room."), ["bathroom", "sink"]),
        (("A room with a sink.", "A sink in a room.", "A room with no sink."), ["room"]),
        (("A plate full of food.", "A plate full of eggs."), ["plate"]),
        (("A man in sunglasses.", "A man wearing sunglasses."), ["man", "sunglasses"]),
    ],
)
def test_two_captions_agree_whatever_the_spelling(captions: tuple[str, ...], agreed: list[str]) -> None:
    assert said_by(*captions) == agreed


def test_the_plural_is_told_from_the_singular() -> None:
    assert asserted("Two dogs and a hot dog on plates.") == {"dog": True, "hot dog": False, "plate": True}
    assert asserted("A dog next to two dogs.") == {"dog": False}


def test_denied() -> None:
    assert denied("A bathroom with no walls and a door") == {"wall", "door"}
    assert denied("A room with the door missing.") == {"room", "door"}
    assert denied("A dog on a bed.") == set()


def test_every_entry_of_the_table_is_its_own_name() -> None:
    assert spelling("skate board") == ("skateboard", False) and spelling("woods") == ("forest", False)
    assert spelling("bookshelves") == ("bookshelf", True) and spelling("bug") is None


@pytest.mark.parametrize(
    ("caption", "lacks"),
    [
        ("Street clock on quiet street with trees.", True),
        ("A woman in turquoise shirt.", True),
        ("An apple sunglasses books and a cup.", True),
        ("A room with a sink, toilet, and a shower.", False),
        ("A man on skis in the snow.", False),
        ("Two dogs on the woman's bed.", False),
    ],
)
def test_articles_that_are_missing(caption: str, lacks: bool) -> None:
    assert lacks_article(caption) == lacks
