"""How many of a thing captions speak of: what they say against a number of boxes.

    speaks_against(["Two snowboarders ride."], "person", found=1)    True: two are more than one
    speaks_against(["A crowd watches."], "person", found=1)          True: a word for several
    speaks_against(["A man and a woman."], "person", found=1)        True: together they are two
    in_pieces(["Two slices of pizza."], "pizza")                     True: what is marked may be a slice

Each caption gives the least number that it speaks of: its mentions added up, where a number, a plural, a word for
several ("a herd of") or "other" says how many one mention is. A number that is the only mention in its caption, in
the thing's own name, is exact. The reading has no grammar, and where it is unsure it reads more: then a number is not
known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qllava.synthesis.phrases import is_boundary
from qllava.synthesis.rules.nouns import COLLECTIVES, LIVING, OTHER_NAMES, SORTS, WIDER, spelling
from qllava.synthesis.words import is_counted, plural, read_number, several, word_set

_TOKEN = re.compile(r"[a-z]+(?:-[a-z]+)*|\d+|[^\w\s']")
_HUGE = 1000
_VAGUE = {
    word: least
    for least, words in (
        (2, "some multiple various different assorted these those all each every most set sets"),
        (3, "several few group groups herd herds flock flocks bunch row rows number variety assortment collection"),
        (3, "stack stacks pile piles bundle line array selection team pack family fleet"),
        (_HUGE, "many crowd crowds lots lot dozens hundreds thousands tons numerous countless plenty swarm sea mass"),
    )
    for word in several(words)
}
"""Words before a noun, and how many of it they mean at least; many of it cannot be counted."""
_FILLED = word_set("full filled loaded packed covered lined crowded stacked piled topped")
"""Words before "of", "with", "in" or "by": what something is full of has no number."""
_BREAKS = word_set(
    "and or on at near next to from behind under over while who that is are was were has have holding riding "
    "wearing looking sitting standing as for into through around above below inside outside"
)
_THIS_ONE = word_set("the this that same")
_ARTICLES = _THIS_ONE | word_set("a an his her its their my our your")
_ONE = word_set("a an one another single lone this that the")
_PIECES = word_set("piece pieces slice slices half halves part parts portion portions bit bits bite remains rest")
_HEADS = word_set(
    "bus car van room shirt uniform jersey hat cap photo portrait picture stand house light sign signal cone jam "
    "lane station officer member dinner table boat flag logo size bed ride guide book dog"
)
"""Nouns before which another noun, or a word for several, says of what sort they are: "a team bus"."""
_KIN = word_set("baby babies young mother mom mama parent parents offspring mate twin sibling siblings")
_NO_AGENTS = word_set(
    "papers newspapers flowers sunflowers computers containers controllers covers towers corners trailers burgers "
    "hamburgers speakers drawers counters posters layers stickers fingers feathers boulders rollers shoulders "
    "sneakers others waters ladders lockers planters heaters crackers scooters helicopters rivers trousers "
    "slippers banners borders dividers diapers zippers bumpers propellers skyscrapers printers loafers peppers "
    "coolers dressers rafters gutters shutters lighters timbers shelters powers showers quarters meters centers "
    "theaters coasters burners toasters blenders rulers markers binders hangers hammers trackers cruisers "
    "choppers freezers appetizers twists wrists waists"
)
"""Words in -ers and -ists that do not mean people."""


@dataclass(frozen=True)
class _Mention:
    """One mention of a thing in a caption."""

    at: int
    """Index of its first word."""

    name: str
    """How the caption calls it, in the singular."""
    least: int
    """How many it means at least; 0 for one that was mentioned before."""
    said: int | None
    """The number that the caption says, if any."""
    own: bool
    """Whether it is the thing's own name, or another of the same meaning."""

    further: bool
    """Whether it says that there is one besides: "another", "other"."""


@dataclass(frozen=True)
class _Forms:
    """The names of a thing, ready to be looked for."""

    forms: dict[tuple[str, ...], tuple[str, bool, bool]]
    """Words of a name -> the name in the singular, whether it means the thing itself, and whether it is a plural."""

    lengths: tuple[int, ...]
    """How many words the names have, the longest first."""

    first: frozenset[str]
    """Words that names begin with."""


def speaks_against(captions: Sequence[str], noun: str, found: int) -> bool:
    """Return whether a caption speaks of more of a thing than were found, or of another number of it."""
    return any(
        _number_said(caption, noun) not in (None, found) or _least(caption, noun) > found for caption in captions
    )


def _number_said(caption: str, noun: str) -> int | None:
    """Return the number of a thing that a caption says in the thing's own name, if it is its only mention there."""
    mentions = _mentioned(caption, noun)
    said = mentions[0].said if len(mentions) == 1 and mentions[0].own else None
    return said if said is not None and said > 1 else None


def disputed(caption: str, others: Sequence[str], noun: str) -> bool:
    """Return whether a caption says a number of a thing, or of a sort of it, and another says a different one."""
    # Several numbers in one caption are of parts: "one pizza is larger than two others" does not say two.
    mine, *theirs = (_mentioned(one, noun) for one in (caption, *others))
    if len(mine) != 1 or (mine[0].said or 0) < 2:
        return False
    name, said = mine[0].name, mine[0].said
    return any(len(one) == 1 and one[0].name == name and one[0].said not in (None, said) for one in theirs)


def wider_speaks_against(captions: Sequence[str], counts: dict[str, int]) -> set[str]:
    """Return the categories whose wider word ("animals") is said of more than all of them together."""
    out: set[str] = set()
    for word, categories in WIDER.items():
        if not (here := {one for one in categories if one in counts}):
            continue
        together = sum(counts[one] for one in here)
        for caption in captions:
            mentions = list(_mentions(_words(caption), _forms_of_word(word)))
            if mentions and _together(mentions) > together:
                out |= here
    return out


def in_pieces(captions: Sequence[str], noun: str) -> bool:
    """Return whether a caption speaks of pieces of a thing: then a box may be a piece, and not one of it."""
    if noun in LIVING:  # "a man cuts a cake into pieces"
        return False
    return any(_pieces_of(noun).search(caption.lower()) for caption in captions)


@lru_cache(maxsize=1 << 10)
def _pieces_of(noun: str) -> re.Pattern[str]:
    names = "|".join(re.escape(form) for name in _names(noun) for form in {name, plural(name)})
    of = rf"\b(?:{'|'.join(sorted(_PIECES))}) of (?:\w+ ){{0,3}}(?:{names})\b"
    eaten = rf"\b(?:{names})\b[^.]* (?:pieces|slices)\b|\b(?:{names}) (?:pieces?|slices?)\b"
    return re.compile(f"{of}|{eaten}")


@lru_cache(maxsize=1 << 10)
def _words(caption: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(caption.lower().replace("\u2019", "'")))


def _names(noun: str) -> dict[str, bool]:
    """Every name of a thing, and whether it means the thing itself (not a sort of it)."""
    sorts = SORTS.get(noun, ())
    return {**dict.fromkeys(sorts, False), **dict.fromkeys((noun.lower(), *OTHER_NAMES.get(noun, ())), True)}


def _least(caption: str, noun: str) -> int:
    """How many of a thing a caption speaks of at least."""
    mentions, words = _mentioned(caption, noun), _words(caption)
    least = _together(mentions)
    if mentions:
        least += _besides(words[mentions[0].at :], noun)
    return max(least, _collective(words, noun), _they(words, noun, bool(mentions)))


def _besides(words: tuple[str, ...], noun: str) -> int:
    """How many more there are by words that name no thing: "others", "another", "the other", and "its baby"."""
    if "others" in words:
        return 2
    for before, word, after in zip(("", *words), words, (*words[1:], "."), strict=False):
        if word in ("its", "their") and after in _KIN and noun in LIVING - {"person"}:
            return 1
        # "each other" and "one another" are said of those that are named.
        if word in ("another", "other") and before not in ("each", "one") and is_boundary(after):
            return 1
    return 0


def _together(mentions: Sequence[_Mention]) -> int:
    """How many the mentions of one caption mean at least; "another" says that there is one besides."""
    first = any(not one.further for one in mentions)
    return sum(one.least for one in mentions) + (1 if mentions and not first else 0)


# The rules ask for the same caption and thing again: for a number, for the sound captions, for the others beside it.
@lru_cache(maxsize=1 << 10)
def _mentioned(caption: str, noun: str) -> tuple[_Mention, ...]:
    """Every mention of a category in a caption."""
    return tuple(_mentions(_words(caption), _forms(noun)))


# A category comes with every image of a data set; the bound is for what users call theirs.
@lru_cache(maxsize=1 << 10)
def _forms(noun: str) -> _Forms:
    """Every name of a category as words, in the singular and the plural."""
    return _forms_of(_names(noun))


@lru_cache(maxsize=1 << 6)
def _forms_of_word(word: str) -> _Forms:
    """A word as it is, in the singular and the plural."""
    return _forms_of({word: True})


def _forms_of(names: dict[str, bool]) -> _Forms:
    forms: dict[tuple[str, ...], tuple[str, bool, bool]] = {}
    for name, own in names.items():
        forms.setdefault(tuple(plural(name).lower().split()), (name, own, True))
        forms[tuple(name.split())] = (name, own, False)
    return _Forms(forms, tuple(sorted({len(form) for form in forms}, reverse=True)), frozenset(one[0] for one in forms))


def _mentions(words: tuple[str, ...], forms: _Forms) -> Iterator[_Mention]:
    """Every mention of a thing, the longest name first, from left to right."""
    named: set[str] = set()
    at = 0
    while at < len(words):
        for length in forms.lengths if words[at] in forms.first else ():
            if (found := forms.forms.get(words[at : at + length])) is not None:
                name, own, many = found
                yield _mention(words, at, length, name, own=own, many=many, again=name in named)
                named.add(name)
                at += length - 1
                break
        at += 1


def _mention(
    words: tuple[str, ...], at: int, length: int, name: str, *, own: bool, many: bool, again: bool
) -> _Mention:
    """One mention; `again`: the caption has called something so before."""
    before = _before(words, at)
    after = words[at + length] if at + length < len(words) else ""
    if plural(name) == name and is_counted(name) and not _ONE & {*before}:  # "sheep in a field"
        many = True
    if after in ("are", "were", "have") and not {"a", "an", "one"} & {*before}:  # "zebra are grazing"
        many = True
    said = next((number for word in before if (number := read_number(word)) is not None), None)
    least = max(2 if many else 1, said or 0, *(_VAGUE.get(word, 0) for word in before))
    this_one = again and bool(before) and before[-1] in _THIS_ONE
    if least == 1 and (this_one or _is_compound(words, at, length)):
        least = 0  # of another thing ("a dog bed"), or mentioned before ("the boy")
    return _Mention(at, name, least, said, own, bool({"other", "another"} & {*before}))


def _is_compound(words: tuple[str, ...], at: int, length: int) -> bool:
    """Whether the next word makes another thing of a noun: "dog bed", and not "a boy and girl walk".

    It has to be known as a noun, and no object may follow, which a verb has ("a boy ride a bike").
    """
    end = at + length
    after, then = (*words[end : end + 2], "", "")[:2]
    if then in _ARTICLES or (at and words[at - 1] == "and"):
        return False
    return spelling(" ".join((*words[at:end], after))) is not None or spelling(after) is not None or after in _HEADS


def _before(words: tuple[str, ...], at: int) -> list[str]:
    """The words before a noun that may say how many it is, the nearest first: up to its article, and over "of"."""
    out: list[str] = []
    for index in range(at - 1, max(-1, at - 7), -1):
        word, further = words[index], words[index - 1] if index else ""
        if word in ("with", "in", "by"):
            return [*out, "many"] if further in _FILLED else out
        if word in _BREAKS or not word[0].isalnum():
            break
        out.append("many" if word == "of" and further in _FILLED else word)
        if word in _ARTICLES and further not in ("of", "all", "both"):
            break
    return out


def _collective(words: tuple[str, ...], noun: str) -> int:
    """How many of a thing the words for several mean that name no thing: "a crowd watches", "the team"."""
    most = 0
    known = COLLECTIVES.get(noun, {})
    for at, word in enumerate(words):
        after = words[at + 1] if at + 1 < len(words) else ""
        # "a team bus", "a traffic light" and "a pair of skis" say something of other things.
        if word in known and after != "of" and after.removesuffix("s") not in _HEADS:
            most = max(most, known[word])
        if noun == "person" and len(word) > 5 and word.endswith(("ers", "ists", "men")) and word not in _NO_AGENTS:
            before = _before(words, at)
            most = max(most, 2, *(read_number(one) or _VAGUE.get(one, 0) for one in before))
    return most


def _they(words: tuple[str, ...], noun: str, mentioned: bool) -> int:
    """2 where a caption says "they" or "each other" and may mean this."""
    if noun not in LIVING or not ("they" in words or {"each", "other"} <= {*words} or {"one", "another"} <= {*words}):
        return 0
    named = {one for one in LIVING if next(_mentions(words, _forms(one)), None)}
    return 0 if len(named) > 1 or (named and not mentioned) else 2
