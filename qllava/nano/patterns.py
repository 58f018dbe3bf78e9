"""The ways to ask the plain questions of nano, as templates; `wording` draws from them."""

from __future__ import annotations

import re

# In a template {0}, {1} are what the plain question names, {a} is what is asked of colour, form and size, and one of
# (a|b|c) is drawn.
ATTRIBUTE = {
    "colour": "(colour|color|colour|color|hue)",
    "form": "(form|shape|shape|kind of shape|type of shape)",
    "size": "size",
}
"""Words for what is asked about a shape, by the plain word."""
SEEN = "(| in the picture| in the image| in this image| in this picture| in the photo| in the scene| here)"
"""What may be added to a question."""
TELL = (
    "(Tell me|Please tell me|Say|Can you tell me|Could you tell me|Can you say|I want to know|I would like to know|"
    "Do you know|Please say|tell me)"
)
"""What may come before an indirect question."""
GIVE = "(Name|Give me|Tell me|State|Give|Please name|Please give me|Identify)"
"""What may come before what is asked for."""
_OF_A_SHAPE = (
    "What {a} is {1}{seen}?", "What is the {a} of {1}{seen}?", "What's the {a} of {1}?", "Which {a} is {1}?",
    "What {a} does {1} have?", "Which {a} does {1} have{seen}?", "{1} is what {a}?", "{1}: what {a}?",
    "{tell} what {a} {1} is.", "{tell} the {a} of {1}.", "{give} the {a} of {1}{seen}.", "{a} of {1}?",
    "The {a} of {1}?", "What {a} has {1}?", "{1}, what {a} is it?", "What {a} would you say {1} is?",
    "Of what {a} is {1}?", "{a} of {1}", "Look at {1}. What {a} is it?", "What's {1}'s {a}?",
)  # fmt: skip
_PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What (size) is (the .+)\?",
        (
            *_OF_A_SHAPE, "How big is {1}{seen}?", "How large is {1}?", "How big is {1}?", "{1} is how big?",
            "How big would you say {1} is?", "{tell} how (big|large) {1} is.",
            "What size is {1}: small, medium or large?",
            "Is {1} small, medium or large?", "Is {1} (small or large|big or small)?",
            "How (small|big) is {1}, please?",
        ),
    ),
    (
        r"What (colour|form) is (the .+)\?",
        _OF_A_SHAPE,
    ),
    (
        r"Where is (the .+)\?",
        (
            "Where is {0}{seen}?", "Where's {0}?", "Where can I find {0}?",
            "In (which|what) (place|part|position) is {0}?",
            "What is the (position|place|location) of {0}{seen}?", "Where (in the picture|in the image) is {0}?",
            "{tell} where {0} is.", "{give} the (place|position|location) of {0}.", "Find {0}.", "Locate {0}.",
            "{0} is where?", "{0}, where is it?", "Position of {0}?", "Where do you see {0}?",
            "Where exactly is {0}?", "Whereabouts is {0}?", "In which spot is {0}?",
            "Where would I find {0}?", "(Where|In which part) (of the picture|of the image) do I find {0}?",
            "Where does {0} sit?",
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
        r"Is there anything (\w+)\?",
        (
            "Is there anything {0}{seen}?", "Any {0} (things|shapes|objects)?",
            "Are there any {0} (shapes|things|objects){seen}?",
            "Do you see anything {0}?", "Is something {0}{seen}?", "Any {0} ones?",
            "Are there {0} (shapes|things|objects){seen}?",
            "Do you see (any |){0} (shapes|things|objects){seen}?", "Is anything {0}?", "Is there something {0}?",
        ),
    ),
    (
        r"Are there any (\w+)\?",
        (
            "Are there any {0}{seen}?", "Any {0}?", "Any {0} (in here|here|in the picture)?", "Do you see any {0}?",
            "Are there {0}{seen}?",
            "Can you see any {0}?", "Do you see {0}{seen}?", "{0}, any?", "Does the (picture|image) have any {0}?",
        ),
    ),
    (
        r"Is there (an? .+) ((?:at|on|in) the .+)\?",
        (
            "Is there {0} {1}?", "Do you see {0} {1}?", "Is {0} {1}?", "Can you see {0} {1}?", "{1}, is there {0}?",
            "{0} {1}?",
            "{tell} (if|whether) there is {0} {1}.",
        ),
    ),
    (
        r"Are there more than (\w+) (.+)\?",
        (
            "Are there more than {0} {1}{seen}?", "Do you see more than {0} {1}?", "More than {0} {1}?",
            "Is it more than {0} {1}?",
        ),
    ),
    (
        r"Are all shapes (\w+)\?",
        (
            "Are all (shapes|objects|things) {0}?", "Are all of the shapes {0}?", "Is everything {0}?",
            "Is every (shape|object|thing) {0}?",
            "{tell} (if|whether) all shapes are {0}.", "Are they all {0}?", "All {0}?",
        ),
    ),
    (
        r"Are both shapes (\w+)\?",
        (
            "Are both (shapes|objects|things) {0}?", "Are both of the shapes {0}?", "Are the two shapes {0}?",
            "Are both {0}?",
        ),
    ),
    (
        r"Is (the .+) (an? \w+|\w+) or (an? \w+|\w+)\?",
        (
            "Is {0} {1} or {2}?", "Is {0} {1} or {2}{seen}?", "Would you say {0} is {1} or {2}?",
            "{tell} (if|whether) {0} is {1} or {2}.",
            "{0}: {1} or {2}?", "Is {0} {1}, or is it {2}?",
        ),
    ),
    (
        r"Which is (larger|smaller|higher|lower|further left|further right), (the .+) or (the .+)\?",
        (
            "Which is {0}, {1} or {2}?", "What is {0}, {1} or {2}?",
            "Which (shape|one|thing|object) is {0}, {1} or {2}?",
            "Which is {0}: {1} or {2}?", "{1} or {2}, which is {0}?", "{0}: {1} or {2}?",
            "Which of {1} and {2} is {0}?",
        ),
    ),
    (
        r"What is (the (?:red|orange|yellow|green|blue|purple) shape)\?",
        (
            "What is {0}?", "{0}, what is it?", "{tell} what {0} is.", "{0} - what is it?", "Which shape is {0}?",
            "Describe {0}.",
            "What's {0}{seen}?", "What kind of thing is {0}?", "What do you know about {0}?",
        ),
    ),
    (
        r"Which shapes are there\?",
        (
            "List (all|the|all the|every one of the) (shapes|objects|things){seen}.",
            "List every (shape|object|thing){seen}.",
            "Give me a list of (all |)(the |)(objects|shapes|things){seen}.", "Name every (shape|object|thing){seen}.",
            "Which (objects|things) (do you see|are there|are shown){seen}?",
            "Name all (the |)(objects|shapes|things).",
            "What (objects|things) (do you see|are there){seen}?", "Enumerate the (shapes|objects).",
            "List what is there.",
        ),
    ),
    (
        r"Is there (an? .+)\?",
        (
            "Is there {0}{seen}?", "Do you see {0}{seen}?", "Can you see {0}{seen}?",
            "Does the (picture|image) (show|have|contain) {0}?",
            "Is {0} there?", "Is {0} (visible|shown|present){seen}?", "{tell} (if|whether) there is {0}.",
            "{tell} (if|whether) you see {0}.", "Any sign of {0}?", "There is {0}, (right|yes or no)?",
            "I think I see {0}, (am I right|right|is that so)?",
            "Would you say (that |)there is {0}?", "Is {0} anywhere?", "{0} there?", "Is there {0} somewhere?",
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
            "Which shapes can you see{seen}?", "{tell} which shapes there are.",
            "What kinds of shapes are there{seen}?",
            "Which shapes are (shown|visible|present){seen}?", "What types of shapes do you see?",
            "{tell} the shapes you see.",
            "What figures can you see?", "Which (forms|kinds of shapes) do you see?",
            "List the (forms|kinds of shapes){seen}.",
            "Which forms do the shapes have?", "What forms are used{seen}?",
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
ASKED = tuple((re.compile(plain), patterns) for plain, patterns in _PATTERNS)
"""Plain questions, and the templates of their other words."""

_CORNER = "(at|in) the ({0} {1}|{2} {1}|{0} {1} corner|{2} {1} corner|{1} {0}|{0}-{1}|{0}-{1} corner)"
PLACES = {
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
"""Where a shape is, by the plain words."""
RELATIONS = {
    "left of": "(left of|to the left of|directly left of|on the left of|on the left side of|further left than)",
    "right of": "(right of|to the right of|directly right of|on the right of|on the right side of|further right than)",
    "above": "(above|above|directly above|higher than|over|further up than|on top of)",
    "below": "(below|below|directly below|lower than|under|beneath|further down than|underneath)",
}
"""Where a shape is from another, by the plain words."""
WORDS = {
    "larger": "(larger|larger|bigger|bigger|greater)",
    "higher": "(higher|higher up|further up|nearer to the top)",
    "lower": "(lower|lower down|further down|nearer to the bottom)",
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
"""Single words, by the plain word."""
GENERIC = "(shape|shape|shape|thing|object|figure|one|item)"
"""Words for "shape"."""
