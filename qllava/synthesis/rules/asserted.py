"""Things that a caption asserts to be in the image.

    asserted("A man in a hat is waiting for a train without a bag.")    {"man": False, "hat": False}
    asserted("Two dogs and a hot dog on plates.")                       {"dog": True, "hot dog": False, "plate": True}
    asserted("A picture of a horse on a wall.")                         {}

A name maps to whether the caption uses only its plural. Only nouns of a table (`nouns`) are searched for. A noun counts
if all three conditions hold:

    its phrase      consists of an article or number, adjectives of a list, and the noun, and no other word changes its
                    meaning: "dog bed", "hot dog" and "toy train" mean neither a dog nor a train
    before it       comes the start of the sentence, "and", or a preposition or verb of a list ("on", "holding")
    its sentence    has no word before it that negates it (no, without, for, like, as, waiting, "to catch"), and
                    nowhere a "not", an "or" or a word for a depiction (picture, statue, toy)

No other grammar is used; what is not recognized is not asserted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qllava.synthesis.phrases import is_boundary
from qllava.synthesis.rules.nouns import may_be_a_model, spelling
from qllava.synthesis.words import COLOURS, is_counted, read_number, word_set

_TOKEN = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*|[^\w\s]")
_LONGEST = 3
"""Number of words of the longest noun in the table."""
_VETO = word_set(
    "not cannot never or nor neither either if whether would could should might may must will perhaps maybe "
    "probably possibly seems seem seemingly appears appear imagine imaginary fake pretend pretending supposed "
    "missing nowhere gone absent nothing nobody none hardly barely almost"
)
"""Words that make every statement of their sentence uncertain."""
_SHOWS = word_set(
    "picture pictures photo photos photograph photographs image images drawing drawings painting paintings "
    "poster posters portrait portraits statue statues sculpture sculptures figurine figurines cartoon cartoons "
    "illustration sketch mural murals graffiti toy toys replica replicas model models reflection reflections "
    "reflected reflecting reflects shadow shadows silhouette silhouettes tattoo tattoos sticker stickers logo "
    "logos print prints printed costume costumes mask masks advertisement advertisements ad ads billboard "
    "billboards magazine video movie game lego legos plush stuffed decal emblem pictured depicted depicting "
    "depicts painted drawn carved screenshot animated virtual miniature ornament ornaments figure figures doll "
    "dolls dollhouse inflatable shaped themed pattern design word words wording letters text says reads "
    "reading saying named called selfie dream art"
)
"""Words for depictions, which show things that need not be there, and for names."""
_OF_THE_PHOTO = word_set("taking takes take taken posing pose poses")
"""Verbs before "picture" when a photo is being taken; the picture itself is then not visible."""
_SCREENS = word_set("mirror mirrors screen screens tv television televisions monitor monitors")
_CUTS = word_set(
    "without no for like as than from toward towards about before after instead rather minus except but "
    "lacking lacks resembling resembles imitating mimicking mimics wants wanting needs needing waiting "
    "awaiting seeking hoping dreaming expecting advertising making makes made builds preparing "
    "prepares ordering cooking baking showing shows indicating until where when so off out past half"
)
"""Words that negate what follows them in the sentence."""
_BECOMES = word_set(
    "turn turns turned turning make makes made convert converts converted transform transforms transformed cut cuts "
    "carve carves carved fold folds folded shape arranged trim trimmed built crafted sculpted molded remodeled"
)
"""Words for turning one thing into another: "a bus converted into a house"."""
_NEAR_TO = word_set("next close attached tied adjacent chained connected strapped")
_ADJECTIVES = {*COLOURS} | word_set(
    "gray tan beige gold golden silver dark light bright colorful colourful small large big little tiny "
    "huge giant tall short long high low wide narrow round square circular old young new older younger "
    "elderly baby adult full grown beautiful pretty nice cute adorable lovely fancy stylish modern antique "
    "vintage clean dirty messy empty open closed busy crowded quiet wet dry snowy grassy sandy rocky dusty "
    "muddy parked sleeping standing sitting smiling lone single double outdoor indoor male female asian "
    "rusty shiny flat steep fluffy furry hairy spotted striped plain simple different other same lit "
    "overturned folded wheeled commercial residential public main"
)
"""Words before a noun that do not change which thing it means."""
_MATERIALS = word_set("wooden metal steel brick stone concrete glass plastic leather iron marble velvet paper")
"""Materials. They do not change the thing either, except for living things: "a wooden horse" is not a horse."""
_ARTICLES = word_set("a an the one his her its their this these those some several many few both all")
_PLACES = word_set(
    "in on at by near with under beneath below over above behind beside besides between across along around "
    "against inside outside through into onto upon atop among amongst amid down up within alongside underneath "
    "and , & has have having"
)
_BEFORE_ARTICLES = word_set(
    "in on at by near with under below over above behind beside between across along around through inside of to"
)
"""Prepositions before an article. "and" and the comma are not here: a noun may share the article before them."""
_DOES = word_set(
    "holding holds hold wearing wears wear riding rides ride carrying carries using uses driving drives eating "
    "eats containing contains facing faces featuring features sits stands lies walking flying pulling pushing "
    "walks sitting standing lying laying hanging watching watches following follows chasing leaving crossing "
    "crosses including surrounding surrounds topped"
)
_PART_OF = word_set(
    "front top side middle center centre background foreground bottom edge corner back end inside outside left "
    "right full box boxes bowl cup plate basket tray cart bag bottle view one"
)
"""Words before "of" after which the whole thing is visible; after "a piece of" or "the head of" it may not be."""
_SEVERAL_OF = word_set(
    "couple pair group groups bunch row rows lot lots number herd flock crowd stack pile line variety assortment "
    "collection set all many both some several"
)
"""Words before "of" that count only if a plural follows: "the number of a bus" is not a bus."""


@dataclass(frozen=True)
class _Found:
    """A noun of the table in a sentence."""

    start: int
    """Index of its first word."""
    end: int
    """Index after its last word."""
    name: str
    """Name of the thing in the table."""
    plural: bool
    """Whether the words are a plural."""


def asserted(caption: str) -> dict[str, bool]:
    """Return the names of the things that a caption asserts, each with whether it occurs in the plural only."""
    out: dict[str, bool] = {}
    for words in _sentences(caption):
        if _unsure(words):
            continue
        cut = min((at for at in range(len(words)) if _cuts(words, at)), default=len(words))
        shown = max((at for at in range(len(words)) if _on_screen(words, at)), default=-1)
        for one in _nouns(words):
            if shown < one.end <= cut and _ends(words, one.end) and _begins(words, one):
                out[one.name] = out.get(one.name, True) and one.plural
    return out


def denied(caption: str) -> set[str]:
    """Return the names of the things that a caption says are absent or missing."""
    out: set[str] = set()
    for words in _sentences(caption):
        no = min((words.index(word) for word in ("no", "without", "not") if word in words), default=len(words))
        gone = bool({"missing", "nowhere", "gone", "absent"} & {*words})
        out.update(one.name for one in _nouns(words) if gone or one.end > no)
    return out


def lacks_article(caption: str) -> bool:
    """Return whether a noun lacks its article, or three nouns lack their commas: "clock on quiet street"."""
    for words in _sentences(caption):
        found = list(_nouns(words))
        if any(a.end == b.start and b.end == c.start for a, b, c in zip(found, found[1:], found[2:], strict=False)):
            return True
        for one in found:
            after = words[one.end] if one.end < len(words) else ","
            if one.plural or not is_counted(one.name) or not is_boundary(after):
                continue
            at = one.start - 1
            while at >= 0 and not is_boundary(words[at]) and not words[at].endswith("'s"):
                at -= 1
            if at < 0 or words[at] in _BEFORE_ARTICLES:
                return True
    return False


def _sentences(caption: str) -> Iterator[list[str]]:
    for sentence in re.split(r"[.!?;:]", caption.lower().replace("\u2019", "'")):
        if words := _TOKEN.findall(sentence):
            yield words


def _unsure(words: list[str]) -> bool:
    """Return whether a sentence has a word that makes all of it uncertain."""
    for at, word in enumerate(words):
        if word in _VETO or word.endswith("n't"):
            return True
        if word in _SHOWS and not _OF_THE_PHOTO & {*words[max(0, at - 2) : at]}:
            return True
    return False


def _cuts(words: list[str], at: int) -> bool:
    """Return whether the things after this word need not be in the image: "for", "like", "to catch"."""
    if words[at] == "as" and (
        words[at : at + 3] == ["as", "well", "as"] or words[at - 2 : at + 1] == ["as", "well", "as"]
    ):
        return False
    if words[at] == "to":
        return not at or words[at - 1] not in _NEAR_TO
    if words[at] == "into":
        return bool(_BECOMES & {*words[max(0, at - 4) : at]})
    if words[at] == "building":  # "building a house", not "in front of a building"
        return at + 1 < len(words) and words[at + 1] in _ARTICLES
    return words[at] in _CUTS


def _on_screen(words: list[str], at: int) -> bool:
    """Return whether the things before this word may be visible only in a mirror or on a screen."""
    return words[at] in _SCREENS and bool({"in", "on", "through", "off"} & {*words[max(0, at - 4) : at]})


def _nouns(words: list[str]) -> Iterator[_Found]:
    """Yield the nouns of the table from left to right; at each position the longest one."""
    at = 0
    while at < len(words):
        for length in range(min(_LONGEST, len(words) - at), 0, -1):
            if (known := spelling(" ".join(words[at : at + length]))) is not None:
                yield _Found(at, at + length, *known)
                at += length - 1
                break
        at += 1


def _ends(words: list[str], end: int) -> bool:
    """Return whether a noun phrase ends here: no noun or participle with a noun follows ("tree lined street")."""
    after, then = ([*words[end : end + 2], "", ""])[:2]
    if not after or after == "full":
        return True
    if not is_boundary(after):
        return False
    if after in _DOES and (thing := spelling(then)) is not None and (thing[1] or not is_counted(then)):
        return True  # "a man wearing sunglasses"
    return not (after.endswith(("ing", "ed")) and then and not is_boundary(then))


def _begins(words: list[str], one: _Found) -> bool:
    """Return whether the words before a noun, its article and its adjectives say that the thing is there."""
    at = one.start - 1
    while at >= 0 and (words[at] in _ADJECTIVES or (words[at] in _MATERIALS and not may_be_a_model(one.name))):
        at -= 1
    if at >= 0 and (words[at] in _ARTICLES or read_number(words[at]) is not None):
        at -= 1
    if at < 0:
        return True
    word, before = words[at], words[at - 1] if at else ""
    if word == "of":
        return before in _PART_OF or (one.plural and before in _SEVERAL_OF)
    if word in ("is", "are"):
        return before in ("there", "this", "here", "these")
    return word in _PLACES or word in _DOES or word in ("there's", "to", "than", "while")
