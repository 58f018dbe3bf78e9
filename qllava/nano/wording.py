"""Other words for the plain questions of nano, as people type them.

`language` and `further` ask each question in one plain form. Here a plain question becomes one of many: other verbs and
nouns, requests, bare keywords, polite or terse, in lower case, without a question mark, with a typo. The answer stays
the same, so what is learned from them is the question and not its wording.
"""

from __future__ import annotations

import random
import re

# A pattern is a template: {0}, {1} stand for what the plain question names, and one of (a|b|c) is drawn.
# colour, form and size, whichever is asked, are {a}.
_CHOICE = re.compile(r"\(([^()]*)\)")
_ATTRIBUTE = {
    "colour": "(colour|color|colour|color|hue)",
    "form": "(form|shape|shape|kind of shape|type of shape)",
    "size": "size",
}
_SEEN = "(| in the picture| in the image| in this image| in this picture| in the photo| in the scene| here)"
_TELL = (
    "(Tell me|Please tell me|Say|Can you tell me|Could you tell me|Can you say|I want to know|I would like to know|"
    "Do you know|Please say|tell me)"
)
_GIVE = "(Name|Give me|Tell me|State|Give|Please name|Please give me|Identify)"
_PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What (colour|form|size) is (the .+)\?",
        (
            "What {a} is {1}{seen}?", "What is the {a} of {1}{seen}?", "What's the {a} of {1}?", "Which {a} is {1}?",
            "What {a} does {1} have?", "Which {a} does {1} have{seen}?", "{1} is what {a}?", "{1}: what {a}?",
            "{tell} what {a} {1} is.", "{tell} the {a} of {1}.", "{give} the {a} of {1}{seen}.", "{a} of {1}?",
            "The {a} of {1}?", "What {a} has {1}?", "{1}, what {a} is it?", "What {a} would you say {1} is?",
            "Of what {a} is {1}?", "{a} of {1}", "Look at {1}. What {a} is it?", "What's {1}'s {a}?",
        ),
    ),
    (
        r"Where is (the .+)\?",
        (
            "Where is {0}{seen}?", "Where's {0}?", "Where can I find {0}?",
            "In (which|what) (place|part|position) is {0}?",
            "What is the (position|place|location) of {0}{seen}?", "Where (in the picture|in the image) is {0}?",
            "{tell} where {0} is.", "{give} the (place|position|location) of {0}.", "Find {0}.", "Locate {0}.",
            "{0} is where?", "{0}, where is it?", "Position of {0}?", "Where do you see {0}?", "Where does {0} sit?",
            "Where (on|in) the (picture|image) can {0} be (seen|found)?", "where {0}",
        ),
    ),
    (
        r"How many (.+) are there\?",
        (
            "How many {0} are there{seen}?", "How many {0} do you see{seen}?", "How many {0} can you (see|count|find)?",
            "How many {0}?", "Count the {0}{seen}.", "What is the number of {0}?", "{tell} how many {0} there are.",
            "{tell} how many {0} you see.", "{give} the number of {0}{seen}.", "Number of {0}?", "number of {0}",
            "How many {0} does the (picture|image|scene) (have|show|contain)?",
            "How many {0} are (shown|visible){seen}?",
            "What's the (count|total) of {0}?", "Please count the {0}.", "{0}, how many are there?",
            "There are how many {0}?", "How many {0} are in the (picture|image)?",
        ),
    ),
    (
        r"Is there (an? .+|anything .+)\?",
        (
            "Is there {0}{seen}?", "Do you see {0}{seen}?", "Can you see {0}{seen}?",
            "Does the (picture|image) (show|have|contain) {0}?",
            "Is {0} there?", "Is {0} (visible|shown|present){seen}?", "{tell} (if|whether) there is {0}.",
            "{tell} (if|whether) you see {0}.", "Any sign of {0}?", "There is {0}, (right|yes or no)?",
            "Can {0} be seen?",
            "Can you (find|spot) {0}?", "Does {0} appear{seen}?", "Have you got {0} there?", "{0}?",
            "Is there {0} or not?",
        ),
    ),
    (
        r"Is (the .+) (above|below|left of|right of) (the .+)\?",
        (
            "Is {0} {1} {2}?", "Is {0} {1} {2}{seen}?", "{0} is {1} {2}, (right|true or false|is that right)?",
            "Does {0} (lie|sit|stand) {1} {2}?", "{tell} (if|whether) {0} is {1} {2}.", "Can {0} be found {1} {2}?",
            "Is it true that {0} is {1} {2}?", "Do you see {0} {1} {2}?", "{0} {1} {2}?",
            "Is {0} (placed|located|positioned) {1} {2}?",
        ),
    ),
    (
        r"Is (the .+) (larger|smaller) than (the .+)\?",
        (
            "Is {0} {1} than {2}?", "Is {0} {1} than {2}{seen}?",
            "{0} is {1} than {2}, (right|true or false|is that right)?",
            "Is it true that {0} is {1} than {2}?", "{tell} (if|whether) {0} is {1} than {2}.", "{0} {1} than {2}?",
            "Is the size of {0} {1} than that of {2}?", "Compared with {2}, is {0} {1}?",
            "Would you say {0} is {1} than {2}?",
        ),
    ),
    (
        r"What is ((?:at|on|in) the .+)\?",
        (
            "What is {0}{seen}?", "What's {0}?", "What do you see {0}?", "What can you see {0}{seen}?",
            "Which shape is {0}?",
            "What shape is {0}?", "What (stands|sits|is shown|is drawn) {0}?", "{tell} what is {0}.",
            "What is there {0}?",
            "Describe the shape {0}.", "Describe what is {0}.", "Is there something {0}? What is it?",
            "{give} the shape {0}.",
            "{0}, what is there?", "{0}?", "What object is {0}?",
        ),
    ),
    (
        r"Which shape is the (largest|smallest)\?",
        (
            "Which shape is the {0}{seen}?", "What is the {0} shape{seen}?",
            "Which is the {0} (shape|thing|object|one)?",
            "{tell} which shape is {0}.", "{give} the {0} shape.", "Which of the shapes is the {0}?", "{0} shape?",
            "What's the {0} (thing|object|shape)?", "Find the {0} shape.", "Which (object|thing) is the {0}{seen}?",
        ),
    ),
    (
        r"Which colours are there\?",
        (
            "Which {c}s are there{seen}?", "What {c}s are there{seen}?", "What {c}s do you see{seen}?",
            "List the {c}s{seen}.",
            "Name (the|all) {c}s{seen}.", "Which {c}s can you see?", "{tell} which {c}s there are.",
            "List all the {c}s.",
            "What {c}s are (used|shown|present){seen}?", "{c}s?", "What {c}s are the shapes?",
            "Which {c}s does the (picture|image) have?",
            "What are the {c}s of the shapes?", "{tell} the {c}s you see.",
        ),
    ),
    (
        r"Which forms are there\?",
        (
            "Which (shapes|forms|figures) are there{seen}?", "What (shapes|forms) are there{seen}?",
            "What shapes do you see{seen}?",
            "List the (shapes|forms|objects){seen}.", "Name (the|all) (shapes|forms|objects){seen}.",
            "Which shapes can you see{seen}?",
            "{tell} which shapes there are.", "List all the shapes.", "What kinds of shapes are there{seen}?",
            "What (objects|things) are there{seen}?",
            "Which (objects|things|shapes) are (shown|visible|present){seen}?",
            "What types of shapes do you see?", "{tell} the shapes you see.", "What figures can you see?",
        ),
    ),
    (
        r"Describe the picture\.",
        (
            "Describe the (picture|image|photo|scene|drawing).", "Describe this (picture|image|photo|scene).",
            "What do you see?",
            "What is in the (picture|image|photo|scene)?", "Tell me what the (picture|image) shows.",
            "What's in (the|this) (picture|image|photo)?",
            "What does the (picture|image|photo) show?", "What can you see{seen}?", "What is shown{seen}?",
            "Please describe the (image|picture).",
            "Describe what you see.", "Describe everything you see.", "Can you describe the (picture|image|scene)?",
            "What is this?",
            "Tell me about (the|this) (picture|image).",
            "Give a (detailed |full |)description of the (image|picture).", "What's this?",
            "Describe the image in detail.", "Explain what is in the (image|picture).",
            "Caption this (image|picture).", "Describe it.",
            "What is going on in the (picture|image)?", "What is on the (picture|image)?", "describe",
            "What do we have here?",
            "Tell me everything about the (picture|image).", "Describe all (the |)(shapes|objects)(| you see).",
        ),
    ),
    (
        r"Is (the .+) (an? \w+|red|orange|yellow|green|blue|purple|small|medium|large|(?:at|on|in) the .+)\?",
        (
            "Is {0} {1}?", "Is {0} {1}{seen}?", "Is it true that {0} is {1}?",
            "{0} is {1}, (right|true or false|is that right)?",
            "{tell} (if|whether) {0} is {1}.", "Would you say {0} is {1}?", "{0} is {1}?", "Is {0} {1} or not?",
        ),
    ),
    (
        r"Are there more (.+) than (.+)\?",
        (
            "Are there more {0} than {1}{seen}?", "Do you see more {0} than {1}?",
            "Is the number of {0} larger than that of {1}?",
            "{tell} (if|whether) there are more {0} than {1}.", "More {0} than {1}?",
            "Does the (picture|image) have more {0} than {1}?",
        ),
    ),
    (
        r"What is (above|below|left of|right of) (the .+)\?",
        (
            "What is {0} {1}{seen}?", "What's {0} {1}?", "Which shapes are {0} {1}?", "What do you see {0} {1}?",
            "What can be found {0} {1}?",
            "{tell} what is {0} {1}.", "What (lies|stands|sits) {0} {1}?", "{give} what is {0} {1}.",
            "Which shape is {0} {1}?",
        ),
    ),
    (
        r"Do (the .+) and (the .+) have the same (colour|form|size)\?",
        (
            "Do {0} and {1} have the same {a}?", "Are {0} and {1} of the same {a}?", "Are {0} and {1} the same {a}?",
            "Is the {a} of {0} the same as that of {1}?", "{tell} (if|whether) {0} and {1} have the same {a}.",
            "Does {0} have the same {a} as {1}?", "Is {0} the same {a} as {1}?", "Same {a}: {0} and {1}?",
        ),
    ),
    (
        r"Do all shapes have the same (colour|form|size)\?",
        (
            "Do all (shapes|objects|things) have the same {a}?", "Are all (shapes|objects|things) the same {a}{seen}?",
            "Is everything of the same {a}?", "{tell} (if|whether) all shapes have the same {a}.",
            "Do (the |)shapes share one {a}?",
        ),
    ),
    (
        r"Which shapes are (\w+)\?",
        (
            "Which (shapes|objects|things) are {0}{seen}?", "What (shapes|things) are {0}?", "What is {0}{seen}?",
            "Which ones are {0}?",
            "List (the|all) {0} shapes.", "Name (the|all) {0} (shapes|things|objects).", "{tell} which shapes are {0}.",
            "Which shape is {0}?", "What {0} shapes are there?", "Which {0} shapes do you see?",
        ),
    ),
    (
        r"Which colours do the (\w+) have\?",
        (
            "Which {c}s do the {0} have?", "What {c}s are the {0}{seen}?", "What {c} are the {0}{seen}?",
            "What are the {c}s of the {0}?",
            "{tell} the {c}s of the {0}.", "Which {c} do the {0} have?", "{give} the {c}s of all {0}.",
            "{c}s of the {0}?",
        ),
    ),
    (
        r"And (the .+)\?",
        (
            "And {0}?", "What about {0}?", "How about {0}?", "and {0}", "And what about {0}?", "The same for {0}?",
            "Now {0}.", "And for {0}?",
        ),
    ),
)  # fmt: skip
_ASKED = tuple((re.compile(plain), patterns) for plain, patterns in _PATTERNS)

_CORNER = "(at|in) the ({0} {1}|{2} {1}|{0} {1} corner|{2} {1} corner|{1} {0}|{0}-{1}|{0}-{1} corner)"
_PLACES = {
    **{
        f"at the {row} {side}": _CORNER.format(row, side, other)
        for row, other in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
    "at the top": (
        "(at the top|at the top|at the top centre|at the top center|in the top middle|at the top in the middle|"
        "in the upper middle|up top)"
    ),
    "at the bottom": (
        "(at the bottom|at the bottom|at the bottom centre|at the bottom center|in the bottom middle|"
        "in the lower middle|down at the bottom)"
    ),
    **{
        f"on the {side}": (
            f"(on the {side}|on the {side}|at the {side}|on the {side} side|at the {side} edge|to the {side}|"
            f"on the middle {side}|in the middle {side})"
        )
        for side in ("left", "right")
    },
    "in the centre": (
        "(in the centre|in the center|in the middle|in the center of the image|in the middle of the picture|"
        "at the center|at the centre)"
    ),
}
_RELATIONS = {
    "left of": "(left of|to the left of|on the left of|on the left side of|further left than)",
    "right of": "(right of|to the right of|on the right of|on the right side of|further right than)",
    "above": "(above|above|higher than|over|further up than|on top of)",
    "below": "(below|below|lower than|under|beneath|further down than|underneath)",
}
_WORDS = {
    "larger": "(larger|larger|bigger|bigger|greater)",
    "largest": "(largest|largest|biggest|biggest)",
    "smallest": "(smallest|smallest|littlest|tiniest)",
    "smaller": "(smaller|smaller|smaller|littler)",
    "large": "(large|large|big|big)",
    "small": "(small|small|little|tiny)",
    "medium": "(medium|medium|medium-sized|middle-sized|mid-size)",
    "purple": "(purple|purple|purple|violet)",
    "circle": "(circle|circle|circle|circle|circle|disc|dot)",
    "cross": "(cross|cross|cross|cross|plus sign|plus)",
    "ring": "(ring|ring|ring|ring|ring|hoop|donut)",
    "square": "(square|square|square|square|square|box)",
    "circles": "(circles|circles|circles|circles|discs|dots)",
    "crosses": "(crosses|crosses|crosses|plus signs)",
    "rings": "(rings|rings|rings|rings|hoops)",
    "squares": "(squares|squares|squares|squares|boxes)",
    "shapes": "(shapes|shapes|objects|things|figures|items)",
    "anything": "(anything|anything|something)",
}
_GENERIC = "(shape|shape|shape|thing|object|figure|one|item)"
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def reword(plain: str, rng: random.Random, *, noise: float = 0.35) -> str:
    """Return a plain question in other words.

    Args:
        plain: A question as `language`, `further` or `And the red circle?` asks it.
        rng: Draws the words.
        noise: Share of the results that are also typed carelessly: see `careless`.

    Raises:
        ValueError: No pattern is known for the question.
    """
    known = ((asked.fullmatch(plain), patterns) for asked, patterns in _ASKED)
    found, patterns = next(((found, patterns) for found, patterns in known if found), (None, ()))
    if found is None:
        raise ValueError(f"no other words are known for {plain!r}")
    parts = [_phrase(part, rng) for part in found.groups()]
    attribute = next((part for part in found.groups() if part in _ATTRIBUTE), "colour")
    values = {"a": _ATTRIBUTE[attribute], "c": _ATTRIBUTE["colour"], "seen": _SEEN, "tell": _TELL, "give": _GIVE}
    said = _draw(rng.choice(patterns).format(*parts, **values), rng)
    said = said[0].upper() + said[1:]
    return careless(said, rng) if rng.random() < noise else said


def careless(text: str, rng: random.Random) -> str:
    """Return a question as it is typed in a hurry: lower case, no question mark, a typo, or with polite words."""
    if rng.random() < 0.25:
        text = rng.choice(
            ("Please: {}", "Hey, {}", "Hi! {}", "{} Please.", "{} Thanks!", "So, {}", "Ok, {}", "Well, {}")
        ).format(text)
    if rng.random() < 0.6:
        text = text.lower()
    if rng.random() < 0.5:
        text = text.rstrip("?.!") or text
    elif rng.random() < 0.2:
        text = text.rstrip("?.!") + rng.choice((" ?", "??", "?!", ".", "..."))
    if rng.random() < 0.3:
        text = _typo(text, rng)
    return text


def _typo(text: str, rng: random.Random) -> str:
    """One wrong letter in one of the longer words: left out, doubled, swapped with the next, or from the next key."""
    places = list(re.finditer(r"[a-zA-Z]{4,}", text))
    if not places:
        return text
    word = rng.choice(places)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    letter, following = text[at], text[at + 1]
    row = next((keys for keys in _KEYBOARD if letter.lower() in keys), letter.lower())
    beside = row[(row.index(letter.lower()) + 1) % len(row)]
    changed = rng.choice((following, letter * 2 + following, following + letter, beside + following))
    return text[:at] + changed + text[at + 2 :]


def _phrase(part: str, rng: random.Random) -> str:
    """What a plain question names, in other words: the places, sizes, forms and "shape" in it."""
    for place, said in _PLACES.items():
        if part.endswith(place):
            # "at the top" ends no "at the top left", which comes first.
            rest = part.removesuffix(place).strip()
            return f"{_phrase(rest, rng)} {said}".strip() if rest else said
    if part in _RELATIONS:
        return _RELATIONS[part]
    words = [_GENERIC if word == "shape" else _WORDS.get(word, word) for word in part.split()]
    return " ".join(words)


def _draw(pattern: str, rng: random.Random) -> str:
    """Draw one of each (a|b|c), the innermost first."""
    while found := _CHOICE.search(pattern):
        pattern = pattern[: found.start()] + rng.choice(found[1].split("|")) + pattern[found.end() :]
    return " ".join(pattern.split())
