"""How many of a thing captions speak of: by the rules, and by the checker's own reading."""

from __future__ import annotations

import pytest

from qllava.synthesis.rules.mentions import disputed, in_pieces, speaks_against, wider_speaks_against
from tests.synthesis.rules.reading import allows


@pytest.mark.parametrize(
    ("caption", "noun", "found"),
    [
        ("Two snowboarders ride down a hill.", "person", 1),
        ("A crowd watches a game.", "person", 1),
        ("Cattle graze in a field.", "cow", 1),
        ("A man and a woman.", "person", 1),
        ("People on a street.", "person", 1),
        ("A cat looks at another cat.", "cat", 1),
        ("A herd of sheep.", "sheep", 1),
        ("Sheep graze on a hill.", "sheep", 1),
        ("Two sheep.", "sheep", 1),
        ("A group of people near a car.", "person", 2),
        ("Many birds in the sky.", "bird", 5),
        ("A box filled with donuts.", "donut", 4),
        ("Three doughnuts on a plate.", "donut", 4),
        ("A woman and two men.", "person", 2),
        ("A family eats dinner.", "person", 2),
        ("A team on a field.", "person", 1),
        ("Spectators watch.", "person", 1),
        ("Onlookers stand around.", "person", 1),
        ("The crowd cheers for a batter.", "person", 1),
        ("Kids play.", "person", 1),
        ("A couple walks.", "person", 1),
        ("They are playing a game.", "person", 1),
        ("Two horses and a dog.", "horse", 1),
        ("A flock of geese.", "bird", 1),
        ("Zebra are grazing.", "zebra", 1),
        ("Three giraffe drink.", "giraffe", 1),
        ("Several umbrellas on a beach.", "umbrella", 2),
        ("Tables and chairs.", "table", 1),
        ("A row of motorcycles.", "motorcycle", 2),
        ("A man with two dogs.", "dog", 1),
        ("Both cats sleep.", "cat", 1),
        ("A pair of scissors and two cups.", "cup", 1),
        ("One of the buses.", "bus", 1),
        ("Traffic on a street.", "car", 1),
        ("A man next to another man.", "person", 1),
        ("A group of snowmobilers.", "person", 1),
        ("Five firemen stand.", "person", 3),
        ("Lots of bananas.", "banana", 6),
        ("A bunch of bananas.", "banana", 1),
        ("A street lined with cars.", "car", 3),
        ("A dozen donuts.", "donut", 6),
        ("Twins in red.", "person", 1),
        ("A girl with her friends.", "person", 1),
        ("Cows and a man.", "cow", 1),
        ("Oxen pull a cart.", "cow", 1),
        ("A man and other people.", "person", 2),
        ("A woman holds her baby.", "person", 1),
        ("A man and his wife share a pizza.", "person", 1),
        ("A cat and its kitten.", "cat", 1),
        ("A cow stands by her calf.", "cow", 1),
        ("An elephant with its baby.", "elephant", 1),
        ("A man and woman walk down a street.", "person", 1),
        ("A bride and groom cut a cake.", "person", 1),
        ("A father and son surf.", "person", 1),
        ("A man watches a boy fly a kite.", "person", 1),
        ("A man helps a woman ride a horse.", "person", 1),
        ("The man and the woman sit.", "person", 1),
        ("A man talks to somebody.", "person", 1),
        ("A doctor and a patient.", "person", 1),
        ("A person pulls another.", "person", 1),
        ("A car passes another on a road.", "car", 1),
        ("One cat looks at the other.", "cat", 1),
    ],
)
def test_words_that_forbid_a_number(caption: str, noun: str, found: int) -> None:
    """Numbers, plurals, words for several, "another", and two in one sentence, whatever is between them."""
    assert speaks_against(["A scene.", caption], noun, found)
    assert not allows([caption], noun, found), "the checker is to see it too"


@pytest.mark.parametrize(
    ("caption", "noun", "found"),
    [
        ("A man with two dogs.", "person", 1),
        ("Two cats.", "cat", 2),
        ("A cat and a dog.", "cat", 1),
        ("A dog sleeping on a dog bed.", "dog", 1),
        ("A group of people near a car.", "car", 1),
        ("A woman and two men.", "person", 3),
        ("A couple of donuts.", "donut", 2),
        ("One pizza is larger than two other pizzas.", "pizza", 3),
        ("A teddy bear and two cups.", "teddy bear", 1),
        ("A boy and girl. The boy has a hat.", "person", 2),
        ("Flowers and papers on a table near a man.", "person", 1),
        ("A bus stop and a bus.", "bus", 1),
        ("A man in a hat. The man has a bag.", "person", 1),
        ("A man with his dog.", "dog", 1),
        ("A man and his dog walk.", "person", 1),
        ("A cat bed with a cat.", "cat", 1),
        ("A cell phone and jewels near each other.", "cell phone", 1),
        ("Two zebras near one another.", "zebra", 2),
        ("A cup on another table.", "cup", 1),
        ("A pair of skis near a man.", "person", 1),
        ("A sheep in a field.", "sheep", 1),
        ("A group of four giraffes.", "giraffe", 4),
        ("A red car.", "car", 1),
        ("A man holds three kites.", "person", 1),
        ("A man on skis.", "person", 1),
        ("A man in a team shirt.", "person", 1),
        ("Two slices of cake and a cat.", "cat", 1),
    ],
)
def test_words_that_do_not(caption: str, noun: str, found: int) -> None:
    assert not speaks_against([caption], noun, found)
    assert allows([caption], noun, found)


def test_a_wider_word_counts_all_that_it_stands_above() -> None:
    assert wider_speaks_against(["Two men and animals."], {"cow": 1, "person": 2}) == {"cow"}
    assert wider_speaks_against(["Two animals."], {"cow": 1, "dog": 1}) == set()
    assert wider_speaks_against(["A cart with lots of luggage."], {"suitcase": 2, "handbag": 1}) == {
        "suitcase",
        "handbag",
    }


def test_pieces() -> None:
    assert in_pieces(["Two slices of pizza."], "pizza") and in_pieces(["A pizza with three pieces left."], "pizza")
    assert not in_pieces(["A man cuts a cake into pieces."], "person")
    assert not in_pieces(["Two pizzas."], "pizza")


def test_captions_that_say_different_numbers() -> None:
    assert disputed("Two men stand.", ["Three men stand."], "person")
    assert not disputed("Two men stand.", ["Three people stand.", "Two men."], "person")
    assert not disputed("One pizza is larger than two others.", ["Three pizzas."], "pizza")
