"""The checker's own parser of captions: which things they state, and how many.

It was written independently of the rules' parser, shares no code or table with it, and works differently: the rules
look for noun phrases that they recognize; this parser splits a sentence with regular expressions.
"""

from __future__ import annotations

import re

NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_MANY = {"person": "people", "couch": "couches", "bus": "buses", "cross": "crosses", "wine glass": "wine glasses"}
_MANY |= {"bench": "benches", "toothbrush": "toothbrushes", "sheep": "sheep", "knife": "knives", "man": "men"}
_MANY |= {"woman": "women", "child": "children", "sandwich": "sandwiches", "box": "boxes", "bush": "bushes"}
_MANY |= {"skis": "skis", "scissors": "scissors", "lobby": "lobbies", "shelf": "shelves", "dress": "dresses"}
_SPELLINGS = [{"moustache", "mustache"}, {"newspaper", "news paper"}, {"forest", "woods"}, {"couch", "sofa"}]
_SPELLINGS += [{"donut", "doughnut"}, {"grass field", "grassy field"}, {"child", "kid"}, {"cell phone", "cellphone"}]
_SPELLINGS += [{"fountain", "water fountain"}, {"skateboard", "skate board"}, {"laptop", "laptop computer"}]

_UNSURE = (
    r"\b(?:not|never|or|nor|neither|if|would|could|might|maybe|seems?|appears?|pretend\w*|imagin\w*|picture|photo|image"
    r"|drawing|painting|poster|statue|toy|stuffed|cartoon|sculpture|tattoo|reflect\w*|shadow|depict\w*|painted|says"
    r"|costume|video|shaped|mural|nowhere|missing|gone"
    r"|wooden (?:horse|cow|dog|cat|man|train|car|boat))\b|n't\b"
)
_TAKEN_BACK = (
    r"\b(?:no|without|for|like|as(?! well)|than|instead of|toward|towards|wait\w*|mimic\w*|imitat\w*|resembl\w*|want\w*"
    r"|the number of"
    r"|(?:piece|part|head|slice|shape|half)s? of|about|lacking|off|from|(?<!next )(?<!close )to|half|showing"
    r"|(?:turn|ma[dk]e|convert|transform|cut|carv|fold|trim|built)\w*(?: \w+){0,3} into"
    r"|making|building (?:an?|the)|before|after)\b"
)
_FOLLOWS = (
    r"$|[ ]?[,.]|[ ](?:and|with|in|on|at|by|near|next|that|which|who|is|are|has|to|of|from|full|filled|behind|while|as"
    r"|surrounded|stands?|sits?|for|beside|along|standing|sitting|[a-z]+ing (?:a|an|the|at|on|in|to|down|next)|topped"
    r"|leaving|sleeping|under|above|over|between|where|has|lays|wearing|covered by|inside)\b"
)
_MODIFIES = (
    r"(?:large|small|big|little|long|short|tall|old|young|older|younger|new|open|dark|bright|wooden|metal|glass|empty|red|green"
    r"|blue|black|white|brown|grey|gray|yellow|folded|quiet|busy|wheeled|same|elderly|several|many|few|of)"
)
_INTRODUCES = (
    r"^|\b(?:a|an|the|his|her|their|its|some|two|three|four|and|with|in|on|at|by|near|under|over|behind|beside|through|down"
    r"|along|across|around|against|wearing|riding|holding|next to|of|are|there|featuring|facing|inside|up),? |, "
)

_PEOPLE = re.findall(
    r"\w+",
    "person man woman boy girl kid child baby guy lady skier surfer player rider worker skateboarder snowboarder "
    "batter catcher umpire driver officer spectator tourist passenger fan student adult friend swimmer cyclist "
    "somebody someone bride groom husband wife father mother son daughter brother sister doctor patient",
)
_FAMILY = {
    "person": set(_PEOPLE),
    "donut": {"donut", "doughnut"},
    "motorcycle": {"motorcycle", "motorbike", "moped", "scooter", "bike"},
    "remote": {"remote", "controller"},
    "table": {"table"},
    "suitcase": {"suitcase", "bag"},
    "backpack": {"backpack"},
    "couch": {"couch", "sofa"},
    "cat": {"cat", "kitten"},
    "dog": {"dog", "puppy"},
    "cow": {"cow", "calf"},
    "cell phone": {"cell phone", "cellphone", "phone"},
}
_ANIMALS = {"cat", "dog", "horse", "sheep", "cow", "bear", "elephant", "zebra", "giraffe", "bird"}
_CROWD = {
    "person": (
        r"\b(?:crowds?|audience|people|family|team(?! shirt| bus)|couple(?! of)|twins|spectators|onlookers|everyone"
        r"|group(?! of)|they)\b"
    ),
    "cow": r"\b(?:cattle|herd|cows|oxen)\b",
    "car": r"\btraffic(?! light| sign)\b",
} | dict.fromkeys(_ANIMALS - {"cow"}, r"\b(?:herd|flock|animals)\b")
_ANOTHER = r"(?<!each )(?<!one )\b(?:an)?other(?= (?:on|in|is)\b|[.]|$)"
_ONE_MORE = dict.fromkeys(_ANIMALS, rf"{_ANOTHER}|\bits baby\b")
_LEAST = {
    "some": 2,
    "several": 3,
    "few": 3,
    "group of": 3,
    "herd of": 3,
    "row of": 3,
    "dozen": 12,
    "lined with": 99,
    "family": 3,
    "couple of": 2,
    "pair of": 2,
}
_LEAST |= {"many": 99, "lots of": 99, "crowd of": 99, "filled with": 99, "full of": 99, "dozens of": 99, "other": 2}
_LEAST |= {word: number for number, word in enumerate(NUMBERS) if number > 1} | {"flock of": 3, "variety of": 3}


def many(noun: str) -> str:
    """Return the plural of a noun."""
    before, _, last = noun.rpartition(" ")
    return _MANY.get(noun, f"{before} {_MANY.get(last, last if last == noun_s(last) else noun_s(last))}".strip())


def noun_s(noun: str) -> str:
    """Return the regular plural; a word that ends in -s, such as "sunglasses", is not changed."""
    return noun if noun.endswith("s") and not noun.endswith("ss") else f"{noun}s"


def plain(caption: str) -> str:
    """Return a caption in lower case, with single spaces between words."""
    return " ".join(caption.lower().split())


def _forms(phrase: str) -> str:
    """Return all spellings of a phrase, singular and plural, as alternatives of a pattern."""
    ones = {one for one in [*_MANY, *(w for s in _SPELLINGS for w in s), phrase.removesuffix("s"), phrase] if one}
    same = {one for one in ones if phrase in (one, many(one))} | {phrase}
    same |= {other for spellings in _SPELLINGS if same & spellings for other in spellings}
    return "|".join(sorted({re.escape(form) for one in same for form in (one, many(one))}, key=len, reverse=True))


def asserts(caption: str, phrase: str) -> bool:
    """Return whether a caption states that this exists: nothing retracts it, and no word changes its meaning."""
    for sentence in re.split(r"[.;] ?(?=\w)", plain(caption)):
        if re.search(_UNSURE, re.sub(r"taking a picture|a picture on|a photo at", "", sentence)):
            continue
        found = re.search(rf"(?:{_INTRODUCES})(?:{_MODIFIES} )*(?:{_forms(phrase)})(?={_FOLLOWS})", sentence)
        if found and not re.search(_TAKEN_BACK, sentence[: found.start()]):
            return True
    return False


def asserted_twice(captions: list[str], phrase: str) -> bool:
    """Return whether two captions state that this exists, and none denies it."""
    denied = rf"\b(?:no|without|not)\b[^,.]*\b(?:{_forms(phrase)})\b|\b(?:{_forms(phrase)})\b[^,.]*\bmissing"
    refused = any(re.search(denied, plain(caption)) for caption in captions)
    return not refused and sum(asserts(caption, phrase) for caption in captions) >= 2


def allows(captions: list[str], noun: str, count: int) -> bool:
    """Return whether no caption contradicts this number of a thing."""
    return all(_allows(plain(caption), noun, count) for caption in captions)


def _told_apart(caption: str, ones: str, then: str) -> int:
    """Return how many of a thing a caption names one by one: "a boy and girl", "a woman and her baby"."""
    found: list[str] = []
    for before, name in re.findall(rf"(?:\b(\w+) )?\b({ones})\b{then}", caption):
        if before not in ("the", "this", "that", "same") or name not in found:
            found.append(name)
    return len(found)


def _allows(caption: str, noun: str, count: int) -> bool:
    family = _FAMILY.get(noun, {noun})
    plurals = "|".join(sorted({re.escape(many(one)) for one in family}, key=len, reverse=True))
    ones = "|".join(sorted(map(re.escape, family), key=len, reverse=True))
    if noun == "person" and (
        count < 3
        and re.search(r"\bfamily\b", caption)
        or any(_LEAST.get(word, 0) > count for word in re.findall(r"\b(\w+) (?!wo)\w+(?<!\bwo)men\b", caption))
    ):
        return False
    if count < 2 and (
        re.search(_CROWD.get(noun, "$^"), caption)
        or (noun != "sheep" and re.search(rf"\b(?:{plurals})\b", caption))
        or re.search(rf"\b(?:{ones}) (?:are|were)\b", caption)
        or re.search(rf"\banother (?:\w+ )?(?:{ones})\b", caption)
        or (noun == "person" and re.search(r"\b\w{3,}(?<!pap)(?<!flow)(?<!controll)(?<!oth)ers\b", caption))
        or (noun == "sheep" and re.search(r"(?<!\ba )(?<!\bone )(?<!\bthe )\bsheep\b", caption))
    ):
        return False
    # A verb may directly follow people and animals; a word after another thing may make it a different thing.
    then = r"(?! (?:bed|stop|shirt|hat)\b)" if noun in {"person", *_ANIMALS} else rf"(?={_FOLLOWS})"
    if count < 2 and (_told_apart(caption, ones, then) > 1 or re.search(_ONE_MORE.get(noun, _ANOTHER), caption)):
        return False
    said = re.findall(
        rf"\b({'|'.join(_LEAST)}|\d+) (?:(?!with|and|in|on|of|a|the)[a-z]+ ){{0,3}}?({plurals}|{ones})\b", caption
    )
    numbers = [(_LEAST.get(word, 0) or int(word), name) for word, name in said]
    if any(number > count for number, _ in numbers):
        return False
    mentions = re.findall(rf"\b(?:{plurals}|{ones})\b", caption)
    own = {noun, many(noun), *(() if noun == "person" else plurals.split("|"))}
    exact = [number for number, name in numbers if name in own and number in range(2, 13)]
    if len(mentions) == 1 and exact and exact[0] != count and not re.search(r"several|few|group|herd|some", caption):
        return False
    one_each = re.findall(rf"\b(?:a|an) (?:[a-z]+ ){{0,2}}?({ones})(?={_FOLLOWS})", caption)
    return len(one_each) + sum(number for number, _ in numbers) <= max(count, len(mentions) < 2)
