"""Noun phrases of captions, found by spaCy or by a simple rule.

    A man in a red jacket is riding his horse along the beach.
      man      red jacket               horse           beach      simple: words between boundaries
    a man   a red jacket             his horse        the beach    spaCy's noun chunks; the first word is removed

**simple** uses no grammar. A text in lower case is split into words and signs; a phrase is a run of words without a
boundary. Boundaries are

    signs           all characters except letters and digits (apostrophes and hyphens inside a word belong to it)
    numbers         words of digits, and words for small numbers
    function words  articles, pronouns, prepositions, conjunctions, auxiliaries, negations, and some adverbs: `FUNCTION`
    verbs           common verbs of captions: `VERBS`; and words that end in -ing or -ed
    adverbs         words that end in -ly

Words in -ing, -ed and -ly are no boundaries if they have fewer than five letters or are in `NOUNS` ("ceiling",
"family"); the last part of a word with a hyphen decides ("bunk-bed"). The rule is made for English. It makes the same
mistakes in all captions: an unknown verb remains in a phrase, and a participle before a noun ("a crowded street") is
lost.

**spacy** takes the noun chunks of en_core_web_sm, in lower case, without determiners and pronouns at their start.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import dropwhile
from typing import TYPE_CHECKING, Literal

from qllava.config import InputError
from qllava.synthesis.words import word_set

if TYPE_CHECKING:
    from spacy.tokens import Token

SPACY_MODEL = "en_core_web_sm"


FUNCTION = word_set(
    """
    a an the this that these those some any each every either neither no all both another other others such several
    many few more most much less least own same enough various
    i you he she it we they me him us them my your his her hers its our ours their theirs mine yours who whom whose
    which what someone somebody something anyone anything everyone everything nobody nothing myself yourself himself
    herself itself ourselves themselves there here
    about above across after against along alongside amid among amongst around as at atop away behind below beneath
    beside besides between beyond by despite down during except for from in inside into like near next of off on
    onto opposite out outside over past per since than through throughout to toward towards under underneath until
    up upon via versus vs with within without while during
    and or but nor so yet because although though if when where whether unless once how why
    is are was were be been being am do does did done has have had having can could may might must shall should will
    would isn't aren't wasn't weren't doesn't don't didn't hasn't haven't hadn't can't couldn't won't wouldn't
    shouldn't it's that's there's he's she's they're we're you're i'm s t not never
    very too also just only even still then now again almost already always often together apart quite rather really
    maybe perhaps ahead forward
    zero one two three four five six seven eight nine ten eleven twelve dozen hundreds thousands
    """
)
"""Function words, which always separate phrases; `s` and `t` are the rest of a clitic written as its own word."""

VERBS = word_set(
    """
    sits sit sat stands stood lies lay laid lays holds hold held rides rode walks runs ran eats eat ate plays wears
    wear wore looks shows shown goes go went gone gets get got gives give gave given takes take took taken makes
    make made comes come came flies flew jumps swings throws threw thrown catches caught hits hangs hung contains
    contain features includes include uses used poses smiles sleeps slept drives drove carries carry cuts fills
    covers surrounds serves reads talks waits leans pulls pushes rests appears appear seems seem gathers crosses
    grazes feeds shines depicts depict displays says said tries tied prepares attempts performs perform arrives
    arrive attends attend lets let sees see seen built worn written drawn grown put kept keep keeps enjoys enjoy
    stares faces reaches leads became become becomes
    """
)
"""Common verbs of captions that end in neither -ing nor -ed, without forms that are often nouns (watch, drinks)."""

NOUNS = word_set(
    """
    building ceiling clothing crossing dining living evening morning earring string spring swing thing
    painting drawing wedding railing awning bedding frosting icing topping stuffing pudding dumpling sibling
    duckling parking meeting landing washing boxing lightning sterling
    speed breed tweed hundred sacred naked wicked rugged bobsled infrared
    family butterfly dragonfly jelly belly holly italy curly friendly lovely early elderly lonely woolly silly
    """
)
"""Nouns, and words used before nouns, with the endings of verbs and adverbs."""

_TOKEN = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]|_")


@dataclass(frozen=True)
class Chunker:
    """Method of finding noun phrases."""

    name: str
    """Name of the method, as in `--concepts`."""
    about: str
    """Short description, with versions."""
    phrases: Callable[[Iterable[str]], Iterator[Sequence[str]]]
    """Function from captions to the phrases of each, in order, with repetitions; it reads ahead as little as it can."""


def chunker(wanted: Literal["spacy", "simple"] | None = None) -> Chunker:
    """Return a chunker: the one asked for, or else spaCy if it and its model are installed, or else the simple one.

    Raises:
        InputError: spaCy is asked for, and it or its model is not installed.
    """
    versions = [_version(name) for name in ("spacy", SPACY_MODEL)]
    installed = None not in versions
    if wanted == "spacy" and not installed:
        raise InputError(
            f"spaCy or its model {SPACY_MODEL} is not installed; `pip install 'qllava[concepts]'` and "
            f"`python -m spacy download {SPACY_MODEL}`, or use --concepts simple."
        )
    if installed and wanted != "simple":
        about = f"noun chunks by spaCy {versions[0]} and {SPACY_MODEL} {versions[1]}"
        return Chunker("spacy", about, _by_spacy)
    return Chunker("simple", "runs of words between function words, verbs and signs", _by_rule)


def simple_phrases(text: str) -> list[str]:
    """Return the phrases of a text by the simple rule.

    >>> simple_phrases("A man in a red jacket is riding his horse along the beach.")
    ['man', 'red jacket', 'horse', 'beach']
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    found: list[str] = []
    run: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        if not is_boundary(token):
            run.append(token)
        elif run:
            found.append(" ".join(run))
            run = []
    if run:
        found.append(" ".join(run))
    return found


# Most words of a million captions repeat; the bound limits the memory for those that do not.
@lru_cache(maxsize=1 << 17)
def is_boundary(token: str) -> bool:
    """Return whether this word or sign ends a phrase and cannot be part of one."""
    if not token[0].isalnum() or token.isnumeric() or token in FUNCTION or token in VERBS:
        return True
    last = token.rpartition("-")[2]
    return last.endswith(("ing", "ed", "ly")) and len(last) >= 5 and last not in NOUNS


def _by_rule(texts: Iterable[str]) -> Iterator[list[str]]:
    return map(simple_phrases, texts)


def _by_spacy(texts: Iterable[str]) -> Iterator[list[str]]:
    import spacy

    try:
        # Noun chunks need only the parser and the tagger; the excluded components take half of the time.
        pipeline = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer"])
    except (OSError, ValueError) as error:  # for example a model of another version
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"spaCy cannot load {SPACY_MODEL} ({reason}); install both again, or use --concepts simple."
        ) from error
    for doc in pipeline.pipe(texts, batch_size=256):
        yield [phrase for chunk in doc.noun_chunks if (phrase := spacy_phrase(chunk))]


def spacy_phrase(chunk: Iterable[Token]) -> str:
    """Return a noun chunk in lower case without leading determiners and pronouns; empty if nothing else is left."""
    words = (token for token in chunk if not token.is_space)
    return " ".join(token.lower_ for token in dropwhile(lambda token: token.pos_ in ("DET", "PRON"), words))


def _version(package: str) -> str | None:
    """Return the version of an installed package; spaCy finds its models in the same way."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
