"""Numbers of things that captions mention, to be compared with the number of boxes.

    speaks_against(["Two snowboarders ride."], "person", found=1)    True: two are more than one
    speaks_against(["A crowd watches."], "person", found=1)          True: a collective noun
    speaks_against(["A man and a woman."], "person", found=1)        True: together they are two
    in_pieces(["Two slices of pizza."], "pizza")                     True: a box may be a slice

Each caption gives a lower bound: the sum of its mentions, where a number, a plural, a collective noun ("a herd of") or
"other" gives the number of one mention. A number is exact if it is the only mention in its caption and uses the thing's
own name. The reading uses no grammar. Where it is uncertain it takes the larger number, so that the number of things
counts as unknown.
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
"""Words before a noun, with the smallest number that each means; `_HUGE` means too many to count."""
_FILLED = word_set("full filled loaded packed covered lined crowded stacked piled topped")
"""Words before "of", "with", "in" or "by"; the number of what something is full of is unknown."""
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
"""Nouns that another noun or a collective noun before them only describes: "a team bus"."""
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
"""Words that end in -ers or -ists and do not mean people."""


@dataclass(frozen=True)
class _Mention:
    """One mention of a thing in a caption."""

    at: int
    """Index of its first word."""

    name: str
    """Name that the caption uses, in the singular."""
    least: int
    """Smallest number that it means; 0 if the thing was mentioned before."""
    said: int | None
    """Number that the caption states, if any."""
    own: bool
    """Whether the name is the thing's own name or a synonym, not a narrower term."""

    further: bool
    """Whether it implies one more thing: "another", "other"."""


@dataclass(frozen=True)
class _Forms:
    """Names of a thing, prepared for searching."""

    forms: dict[tuple[str, ...], tuple[str, bool, bool]]
    """Words of each name -> its singular, whether it means the thing itself, and whether the words are a plural."""

    lengths: tuple[int, ...]
    """Numbers of words that the names have, the largest first."""

    first: frozenset[str]
    """First words of the names."""


def speaks_against(captions: Sequence[str], noun: str, found: int) -> bool:
    """Return whether a caption mentions more of a thing than `found`, or states a different number of it."""
    return any(
        _number_said(caption, noun) not in (None, found) or _least(caption, noun) > found for caption in captions
    )


def _number_said(caption: str, noun: str) -> int | None:
    """Return the number that a caption states with the thing's own name, if that is the only mention of it."""
    mentions = _mentioned(caption, noun)
    said = mentions[0].said if len(mentions) == 1 and mentions[0].own else None
    return said if said is not None and said > 1 else None


def disputed(caption: str, others: Sequence[str], noun: str) -> bool:
    """Return whether a caption states a number of a thing, or of a narrower term, that another contradicts."""
    # Several numbers in one caption count parts: "one pizza is larger than two others" does not mean two.
    mine, *theirs = (_mentioned(one, noun) for one in (caption, *others))
    if len(mine) != 1 or (mine[0].said or 0) < 2:
        return False
    name, said = mine[0].name, mine[0].said
    return any(len(one) == 1 and one[0].name == name and one[0].said not in (None, said) for one in theirs)


def wider_speaks_against(captions: Sequence[str], counts: dict[str, int]) -> set[str]:
    """Return the categories whose broader term ("animals") a caption uses for more things than they have together."""
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
    """Return whether a caption mentions pieces of a thing: a box may then show a piece, not a whole thing."""
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
    """Return every name of a thing, and whether it means the thing itself (not a narrower term)."""
    sorts = SORTS.get(noun, ())
    return {**dict.fromkeys(sorts, False), **dict.fromkeys((noun.lower(), *OTHER_NAMES.get(noun, ())), True)}


def _least(caption: str, noun: str) -> int:
    """Return the smallest number of a thing that a caption implies."""
    mentions, words = _mentioned(caption, noun), _words(caption)
    least = _together(mentions)
    if mentions:
        least += _besides(words[mentions[0].at :], noun)
    return max(least, _collective(words, noun), _they(words, noun, bool(mentions)))


def _besides(words: tuple[str, ...], noun: str) -> int:
    """Return how many more things are implied by "others", "another", "the other" or "its baby"."""
    if "others" in words:
        return 2
    for before, word, after in zip(("", *words), words, (*words[1:], "."), strict=False):
        if word in ("its", "their") and after in _KIN and noun in LIVING - {"person"}:
            return 1
        # "each other" and "one another" refer to the things already named.
        if word in ("another", "other") and before not in ("each", "one") and is_boundary(after):
            return 1
    return 0


def _together(mentions: Sequence[_Mention]) -> int:
    """Return the smallest number that the mentions of one caption imply; "another" implies one more."""
    first = any(not one.further for one in mentions)
    return sum(one.least for one in mentions) + (1 if mentions and not first else 0)


# The rules read the same caption and thing several times: for the number, for the sound captions and for the others.
@lru_cache(maxsize=1 << 10)
def _mentioned(caption: str, noun: str) -> tuple[_Mention, ...]:
    """Return every mention of a category in a caption."""
    return tuple(_mentions(_words(caption), _forms(noun)))


# Every image of a data set has the same few categories; the bound is for data with many categories of its own.
@lru_cache(maxsize=1 << 10)
def _forms(noun: str) -> _Forms:
    """Return every name of a category as words, in the singular and the plural."""
    return _forms_of(_names(noun))


@lru_cache(maxsize=1 << 6)
def _forms_of_word(word: str) -> _Forms:
    """Return the forms of a single word: its singular and its plural."""
    return _forms_of({word: True})


def _forms_of(names: dict[str, bool]) -> _Forms:
    forms: dict[tuple[str, ...], tuple[str, bool, bool]] = {}
    for name, own in names.items():
        forms.setdefault(tuple(plural(name).lower().split()), (name, own, True))
        forms[tuple(name.split())] = (name, own, False)
    return _Forms(forms, tuple(sorted({len(form) for form in forms}, reverse=True)), frozenset(one[0] for one in forms))


def _mentions(words: tuple[str, ...], forms: _Forms) -> Iterator[_Mention]:
    """Yield every mention of a thing from left to right; at each position the longest name."""
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
    """Return one mention; `again` means that the caption has used the same name before."""
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
    """Return whether the next word forms a compound with a noun: "dog bed", but not "a boy and girl walk".

    The next word must be a known noun, and no object may follow, because then it is a verb ("a boy ride a bike").
    """
    end = at + length
    after, then = (*words[end : end + 2], "", "")[:2]
    if then in _ARTICLES or (at and words[at - 1] == "and"):
        return False
    return spelling(" ".join((*words[at:end], after))) is not None or spelling(after) is not None or after in _HEADS


def _before(words: tuple[str, ...], at: int) -> list[str]:
    """Return the words before a noun that may state its number, nearest first, up to its article and across "of"."""
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
    """Return the smallest number of a thing that collective nouns alone imply: "a crowd watches", "the team"."""
    most = 0
    known = COLLECTIVES.get(noun, {})
    for at, word in enumerate(words):
        after = words[at + 1] if at + 1 < len(words) else ""
        # "a team bus", "a traffic light" and "a pair of skis" are about other things.
        if word in known and after != "of" and after.removesuffix("s") not in _HEADS:
            most = max(most, known[word])
        if noun == "person" and len(word) > 5 and word.endswith(("ers", "ists", "men")) and word not in _NO_AGENTS:
            before = _before(words, at)
            most = max(most, 2, *(read_number(one) or _VAGUE.get(one, 0) for one in before))
    return most


def _they(words: tuple[str, ...], noun: str, mentioned: bool) -> int:
    """Return 2 if a caption says "they" or "each other" and may refer to this thing; otherwise 0."""
    if noun not in LIVING or not ("they" in words or {"each", "other"} <= {*words} or {"one", "another"} <= {*words}):
        return 0
    named = {one for one in LIVING if next(_mentions(words, _forms(one)), None)}
    return 0 if len(named) > 1 or (named and not mentioned) else 2
