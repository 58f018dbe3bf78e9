"""Names of things in captions: synonyms, narrower terms, broader terms, collective nouns, and visible things.

OTHER_NAMES["couch"]    ("sofa", ...): synonyms; "two sofas" means two couches
SORTS["person"]         ("man", "surfer", ...): narrower terms; "two men" means at least two people
WIDER["animal"]         categories of a broader term; "two animals" means two of these categories together
COLLECTIVES["person"]   {"crowd": 10, ...}: collective nouns, with the smallest number that each means
spelling("mustache")    "moustache": one name for all spellings and synonyms of a visible thing
"""

from __future__ import annotations

import re
from functools import cache

from qllava.synthesis.words import KINDS, plural, several

OTHER_NAMES = {
    "person": ("human", "individual", "someone", "somebody"),
    "donut": ("doughnut",),
    "bicycle": ("bike", "bicyclist", "cyclist"),
    "motorcycle": ("motorbike", "motor bike", "bike", "scooter", "moped", "motorcyclist"),
    "airplane": ("plane", "aeroplane", "air plane", "jet", "airliner", "aircraft"),
    "couch": ("sofa", "loveseat"),
    "cell phone": ("cellphone", "phone", "mobile phone", "smartphone", "smart phone"),
    "TV": ("tv", "television", "screen", "monitor"),
    "laptop": ("laptop computer", "computer", "notebook"),
    "remote": ("controller", "remote control", "control"),
    "potted plant": ("plant", "houseplant"),
    "table": ("dining table", "desk"),
    "hair drier": ("hair dryer", "hairdryer", "blow dryer"),
    "refrigerator": ("fridge", "freezer"),
    "tennis racket": ("tennis racquet", "racket", "racquet"),
    "baseball bat": ("bat",),
    "baseball glove": ("glove", "mitt"),
    "sports ball": ("ball",),
    "skateboard": ("skate board", "board"),
    "snowboard": ("snow board", "board"),
    "surfboard": ("surf board", "board"),
    "frisbee": ("disc", "disk"),
    "parking meter": ("meter",),
    "fire hydrant": ("hydrant",),
    "stop sign": ("sign",),
    "traffic light": ("stoplight", "stop light", "traffic signal", "street light", "light", "signal"),
    "teddy bear": ("bear", "stuffed animal", "stuffed bear", "teddy"),
    "wine glass": ("glass", "wineglass"),
    "toothbrush": ("tooth brush",),
    "hot dog": ("hotdog",),
    "tie": ("bow tie", "necktie", "bowtie"),
    "handbag": ("purse", "hand bag"),
    "backpack": ("back pack", "rucksack"),
    "mouse": ("computer mouse",),
}
"""Synonyms of each category in captions."""
SORTS = {
    "person": several(
        """
        man woman boy girl kid child baby toddler infant guy lady gentleman adult teen teenager youth fellow bride
        groom mother mom mum father dad son daughter brother sister sibling parent friend spouse wife husband skier
        snowboarder skateboarder surfer skater swimmer rider biker cyclist driver pilot jockey cowboy player batter
        pitcher catcher umpire referee goalie athlete golfer runner worker chef cook waiter waitress vendor officer
        policeman cop soldier fireman firefighter farmer fisherman businessman student teacher tourist passenger
        pedestrian spectator onlooker bystander fan visitor guest customer shopper commuter protester performer dancer
        musician singer actor artist hiker camper boater rower kayaker jogger teammate opponent competitor contestant
        boarder patron diner male female stranger member monk nun clown sailor doctor nurse dentist patient barber
        priest king queen prince princess clerk cashier salesman craftsman reporter photographer cameraman
        wrestler boxer grandmother grandfather grandma grandpa uncle aunt cousin niece nephew grandson
        granddaughter girlfriend boyfriend fiance buddy companion partner host butcher baker carpenter mechanic
        """
    ),
    "suitcase": ("bag", "case", "piece of luggage"),
    "backpack": ("bag",),
    "handbag": ("bag",),
    "bird": several(
        "duck goose gull seagull pigeon parrot owl chicken hen rooster swan penguin eagle hawk crow flamingo "
        "ostrich peacock pelican heron sparrow finch duckling chick turkey parakeet"
    ),
    "dog": ("puppy", "pup", "poodle", "terrier", "hound", "bulldog", "husky", "labrador", "retriever", "collie"),
    "cat": ("kitten", "kitty", "feline"),
    "cow": ("bull", "calf", "ox", "steer", "heifer"),
    "sheep": ("lamb", "ram", "ewe"),
    "horse": ("pony", "foal", "colt", "mare", "stallion"),
    "bear": ("cub",),
    "elephant": ("calf",),
    "boat": ("ship", "sailboat", "canoe", "kayak", "yacht", "ferry", "raft", "vessel", "gondola", "rowboat"),
    "car": ("taxi", "cab", "suv", "van", "minivan", "sedan", "jeep", "convertible", "automobile", "volkswagen"),
    "truck": ("pickup", "lorry", "trailer", "semi"),
    "train": ("tram", "trolley", "locomotive", "subway"),
    "bus": ("double decker", "coach"),
    "airplane": ("biplane", "fighter"),
    "chair": ("seat", "stool", "armchair", "recliner"),
    "cup": ("mug", "glass", "teacup"),
    "bowl": ("dish",),
    "book": ("magazine", "novel"),
    "cake": ("cupcake", "dessert"),
    "pizza": ("pie",),
    "sandwich": ("burger", "hamburger", "sub"),
    "clock": ("watch",),
    "toilet": ("urinal",),
    "sink": ("basin",),
    "oven": ("stove",),
    "umbrella": ("parasol",),
    "bed": ("bunk",),
}
"""Narrower terms of each category: names of some of its things."""
WIDER = {
    "animal": KINDS["animal"],
    "creature": KINDS["animal"],
    "pet": ("cat", "dog", "bird"),
    "vehicle": KINDS["vehicle"],
    "automobile": ("car", "truck", "bus"),
    "bag": ("suitcase", "backpack", "handbag"),
    "luggage": ("suitcase", "backpack", "handbag"),
    "baggage": ("suitcase", "backpack", "handbag"),
    "fruit": ("banana", "apple", "orange"),
    "vegetable": ("broccoli", "carrot"),
    "toy": ("teddy bear",),
    "utensil": ("fork", "knife", "spoon"),
    "bovine": ("cow",),
    "computer": ("laptop",),
    "dish": ("bowl", "cup"),
}
"""Broader terms, each with the categories that it includes."""
_LIVING = {"herd": 3, "flock": 3, "pack": 3, "pride": 3, "swarm": 10, "group": 3, "pair": 2, "trio": 3, "twins": 2}
COLLECTIVES: dict[str, dict[str, int]] = {
    "person": {
        "crowd": 10, "crowds": 10, "audience": 10, "mob": 10, "congregation": 10, "parade": 10, "army": 10, "troop": 10,
        "folks": 2, "folk": 2, "group": 3, "groups": 3, "gathering": 3, "team": 3,
        "teams": 3, "squad": 3, "class": 3, "crew": 3, "band": 3, "choir": 3, "gang": 3, "party": 3, "lineup": 3,
        "family": 3, "families": 3, "everyone": 3, "everybody": 3, "trio": 3, "couple": 2, "couples": 2, "pair": 2,
        "duo": 2, "twins": 2, "staff": 3, "police": 2, "public": 10, "community": 3, "club": 3, "tour": 3,
    },
    "cow": {"cattle": 2, "livestock": 2, "oxen": 2},
    "sheep": {"livestock": 2},
    "car": {"traffic": 3},
    "truck": {"traffic": 3},
    "bus": {"traffic": 3},
    "boat": {"fleet": 3, "armada": 10},
    "airplane": {"fleet": 3, "formation": 3, "squadron": 3},
    "book": {"library": 10, "bookshelf": 10, "bookcase": 10, "bookshelves": 10},
    "fork": {"silverware": 2, "cutlery": 2},
    "knife": {"silverware": 2, "cutlery": 2},
    "spoon": {"silverware": 2, "cutlery": 2},
}  # fmt: skip
"""Collective nouns of each category, with the smallest number that each means."""
for _animal in KINDS["animal"]:
    COLLECTIVES[_animal] = {**_LIVING, **COLLECTIVES.get(_animal, {})}
LIVING = frozenset({"person", *KINDS["animal"]})
"""Categories that "they" and "each other" may refer to."""

_MOVING = """
person, man, woman, boy, girl, child/kid, baby, lady, skier, skateboarder, surfer, snowboarder, bride, groom
dog, cat/kitten, bird, horse, cow, sheep, elephant, bear, polar bear, zebra, giraffe, duck, goose, goat, pig, deer,
monkey, lion, tiger, rabbit, squirrel, penguin, swan, seagull/gull
bicycle/bike/bycicle, car, motorcycle/motorbike/motor bike, scooter/moped, airplane/plane/aeroplane/air plane/jet,
bus, train, truck, boat, van, taxi, trailer, tractor, wagon, cart, stroller, wheelchair, canoe, kayak, ship,
helicopter, fire truck/firetruck, luggage cart, shopping cart, carriage, sailboat
"""
"""Names of people, animals and vehicles, one thing per entry; spellings and synonyms follow a slash."""
_SEEN = """
traffic light/stoplight, street light/streetlight, street sign, stop sign, sign, fire hydrant, parking meter, bench,
pole, post, lamp post/lamppost, flag, fountain/water fountain, bridge, tower, clock tower, fence,
chain link fence, wooden fence, gate, wall, brick wall, stone wall, building, brick building, house, barn, church,
shed, tent, cabin, castle, skyscraper, garage, porch, balcony, deck, patio, roof, chimney, stairs/staircase/stairway,
ramp, rail, railing, platform, dock, pier, parking lot, driveway, sidewalk, curb, street, city street, road, dirt road,
highway, path, trail, track, intersection, crosswalk, runway, tunnel, station, train station, bus stop, airport
tree, palm tree, bush, plant, potted plant, flower, leaf, branch, log, rock, boulder, hill, hillside, mountain, slope,
ski slope, field, grass field/grassy field, green field, pasture, meadow, lawn, yard, garden, park, forest/woods,
beach, ocean/sea, lake, pond, river, stream, pool, swimming pool, wave, cliff, desert, island, enclosure, pen, cage,
baseball field, soccer field, tennis court, court, stadium, skate park/skatepark, zoo, farm
room, living room, bedroom, bathroom/restroom, kitchen, dining room, hotel room, classroom, office, lobby, hallway,
restaurant, cafe, bar, store, shop, bakery, library, market, ceiling, floor, carpet, rug, door, glass door, doorway,
window, curtain, mirror, shower, bathtub/bath tub, toilet, sink, faucet, towel, shower curtain, cabinet, cupboard,
counter, countertop, shelf, bookshelf/bookcase, drawer, refrigerator/fridge, oven, stove, microwave, dishwasher,
toaster, fireplace, table, dining table, coffee table, desk, chair, couch/sofa, bed, dog bed, nightstand, dresser,
lamp, pillow, blanket, clock, vase, picnic table, ottoman, stool, fan, ceiling fan, heater, radiator
book, newspaper/news paper, laptop/laptop computer, computer, keyboard, computer mouse, monitor, television/tv,
cell phone/cellphone/mobile phone/smartphone, remote control, camera, speaker, printer, backpack/back pack, umbrella,
handbag/purse, suitcase, basket, box, bucket, bag, bottle, wine bottle, wine glass/wineglass, cup, mug, fork,
knife, spoon, bowl, plate, tray, pan, pot, napkin, candle, cutting board, display case, glass case, tablecloth
hat, cap, helmet, tie/necktie, bow tie/bowtie, suit, tuxedo, shirt, jacket, coat, dress, skirt, bikini, swimsuit,
wetsuit/wet suit, uniform, baseball uniform, vest, apron, scarf, glove, shoe, boot, moustache/mustache, beard,
toothbrush/tooth brush,
frisbee, skateboard/skate board, surfboard/surf board, snowboard/snow board, baseball bat, baseball glove,
tennis racket/tennis racquet, kite, parachute, soccer ball, tennis ball, ball, trophy
banana, apple, sandwich, hot dog/hotdog, pizza, donut/doughnut, cake, hamburger, burger, carrot, cupcake, cookie,
scissors, skis, sunglasses, headphones, snow, grass, sand, luggage, furniture, broccoli, rice, bread, lettuce
"""
"""Nouns of visible things that captions use in one sense; spellings and synonyms follow a slash."""


def _entries(table: str) -> list[list[str]]:
    """Return the spellings of each thing of a table, the name first."""
    return [one.strip().split("/") for one in re.split(r"[,\n]", table) if one.strip()]


_MODELS = frozenset(name for name, *_ in _entries(_MOVING))


@cache
def _forms() -> dict[str, tuple[str, bool]]:
    forms: dict[str, tuple[str, bool]] = {}
    for name, *others in _entries(_MOVING + _SEEN):
        for one in (name, *others):
            forms.setdefault(plural(one), (name, plural(one) != one))
            forms[one] = (name, False)
    return forms


def spelling(words: str) -> tuple[str, bool] | None:
    """Return the name of a visible thing, and whether the words are a plural; None for other words."""
    return _forms().get(words)


def may_be_a_model(name: str) -> bool:
    """Return whether a material before the noun turns the thing into a model of it: "a wooden horse"."""
    return name in _MODELS
