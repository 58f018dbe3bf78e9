"""Objects that a text names, among the eighty categories of COCO.

This finds hallucinated objects: those that the teacher's answer names, but no caption and no box. The method and its
limits are those of CHAIR (Rohrbach et al. 2018): only the eighty categories are searched for, words are compared by
their letters (no grammar), and synonyms in a caption count as evidence. If a word has too many other meanings (an
orange cat, a remote island), only some of its forms are searched for, so that a correct answer is not rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

# Category | words by which a text names it | further words that count as evidence in a caption.
# Plurals are added, except for words with "!". If the middle is empty, the category's own name is used.
_OBJECTS = """
person | man, men!, woman, women!, boy, girl | person, people!, child, children!, kid, baby, toddler, adult, \
someone!, anyone!, guy, lady, ladies!, gentleman, couple, family, crowd, player, batter, pitcher, catcher, umpire, \
surfer, skier, snowboarder, skateboarder, rider, cyclist, biker, driver, worker, chef, student, friend, pedestrian, \
he!, she!, his!, her!, team, group, bride, groom, tourist, spectator, passenger, soldier, officer, male, female, \
teenager, hand, tennis player, skater, athlete, jockey, fan, customer, shopper, swimmer, fisherman, farmer, mother, \
father
bicycle | bicycle, bike | cyclist, biker, biking!
car | | vehicle, traffic, taxi, cab, van, sedan, suv, automobile, jeep, truck
motorcycle | motorcycle, motorbike | bike, biker, scooter, moped, vespa
airplane | airplane, aeroplane, plane | jet, aircraft, jetliner, airliner, biplane
bus | | double decker, vehicle, coach
train | a train!, the train!, trains! | train, locomotive, subway, railway, railroad, rail, tram, trolley, engine
truck | | pickup, lorry, trailer, vehicle, semi, fire engine, firetruck
boat | | ship, sailboat, canoe, kayak, yacht, ferry, vessel, raft, gondola, rowboat, motorboat, watercraft
traffic light | traffic light, stoplight | traffic signal, street light, signal, light
fire hydrant | fire hydrant, hydrant | fire plug, pump
stop sign | | sign, stop
parking meter | | meter
bench | | seat
bird | | seagull, gull, parrot, duck, goose, geese!, pigeon, owl, penguin, eagle, hawk, swan, chicken, ostrich, crow, \
peacock, flamingo, rooster, hen, pelican, heron, sparrow, finch, stork, crane, turkey, waterfowl
cat | cat, kitten | kitty, kitties!, feline, tabby
dog | dog, puppy, puppies! | pup, canine, poodle, terrier, bulldog, collie, beagle, dachshund, retriever, shepherd, \
chihuahua, pug, labrador, doggy, hound
horse | | pony, ponies!, foal, rider, jockey, horseback!, mare, stallion, carriage
sheep | sheep!, lamb | ram, flock, ewe, goat, herd
cow | | cattle!, bull, calf, calves!, ox, oxen!, steer, herd, livestock
elephant | | herd
bear | a bear!, the bear!, polar bear | bear, cub
zebra | | herd
giraffe | | herd
backpack | | bag, rucksack, knapsack, pack, luggage
umbrella | | parasol, canopy
handbag | | purse, bag, tote
tie | a tie!, necktie, bow tie | tie, bowtie
suitcase | | luggage, bag, baggage, case
frisbee | | disc, disk
skis | skis! | ski, skier, skiing!, skiis!
snowboard | | snowboarder, snowboarding!, board
sports ball | sports ball, soccer ball, tennis ball, basketball | ball, soccer, tennis, baseball, football, volleyball
kite | | parasail, parachute
baseball bat | | bat, batter, baseball, batting!, swing
baseball glove | baseball glove, catcher's mitt | glove, mitt, catcher, baseball
skateboard | | skateboarder, skateboarding!, skater, skating!, skate, board
surfboard | | surfer, surf, surfing!, board, body board
tennis racket | tennis racket, tennis racquet, racket, racquet | tennis
bottle | | wine, beer, ketchup, water, drink
wine glass | wine glass, wineglass | wine, glass, drink
cup | | mug, coffee, tea, glass, drink, beverage, teacup
fork | | silverware, utensil, cutlery
knife | knife, knives! | silverware, utensil, cutlery
spoon | | silverware, utensil, cutlery, ladle
bowl | | dish, soup, salad, cereal
banana | | fruit, plantain
apple | | fruit
sandwich | | burger, hamburger, panini, sub, toast, wrap, cheeseburger, bagel
orange | oranges! | orange, fruit, citrus, tangerine, clementine
broccoli | broccoli! | vegetable, veggie, green
carrot | | vegetable, veggie
hot dog | hot dog, hotdog | sausage, chili dog, frankfurter
pizza | | pie, slice
donut | donut, doughnut | pastry, pastries!, bagel
cake | | cupcake, dessert, cheesecake, pastry, pastries!, brownie
chair | | seat, stool, furniture, recliner, armchair, sofa, seating!
couch | couch, sofa | loveseat, furniture, futon, seat
potted plant | potted plant, houseplant | plant, flower, pot, vase
bed | a bed!, the bed!, beds! | bed, bedroom, mattress, bunk, cot, hotel room
dining table | | table, desk, counter
toilet | | urinal, bathroom, restroom, commode, potty
tv | tv, television | screen, monitor, set
laptop | | computer, macbook, notebook
mouse | computer mouse, a mouse!, the mouse!, mice! | mouse, computer
remote | remote control, remotes! | remote, wii, controller, nintendo
keyboard | | computer, piano
cell phone | cell phone, cellphone, mobile phone, smartphone | phone, cell, mobile, iphone
microwave | | oven, appliance, kitchen
oven | | stove, range, kitchen, appliance
toaster | | appliance, oven
sink | a sink!, the sink!, sinks! | sink, basin, faucet, bathroom, washbasin, vanity, kitchen
refrigerator | refrigerator, fridge | freezer, icebox, appliance, kitchen
book | a book!, the book!, books! | book, bookshelf, bookcase, reading!, novel, magazine, shelf, shelves!
clock | | watch, time
vase | | pot, jar, pitcher
scissors | scissors! | scissor, shear
teddy bear | teddy bear, teddies! | bear, teddy, stuffed animal, stuffed toy, toy, plush, doll
hair drier | hair drier, hair dryer, hairdryer, blow dryer | dryer, drier
toothbrush | | tooth brush, brush
"""

CATEGORIES = tuple(line.partition(" | ")[0] for line in _OBJECTS.strip().splitlines())


def named(text: str) -> set[str]:
    """Return the categories that a text names: "two hot dogs" names a hot dog and not a dog."""
    return _found(text, _forms(strict=True))


def unsupported(text: str, captions: Iterable[str], categories: Iterable[str]) -> set[str]:
    """Return the categories that a text names but neither a caption nor a box does."""
    return named(text) - _found("\n".join((*captions, *categories)), _forms(strict=False))


def _found(text: str, forms: dict[str, set[str]]) -> set[str]:
    words = re.sub(r"[^a-z'\n]+", " ", text.lower().replace("\u2019", "'"))
    found = _pattern(tuple(forms)).findall(words)
    return set().union(*(forms[form] for form in found))


@cache
def _pattern(forms: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of all forms as whole words, the longest first, so that no form inside another is found."""
    longest = sorted(forms, key=len, reverse=True)
    return re.compile(rf"(?<![a-z'])(?:{'|'.join(map(re.escape, longest))})(?![a-z])")


@cache
def _forms(strict: bool) -> dict[str, set[str]]:
    """Return every form with the categories that it means: forms that name one, or all evidence if not `strict`."""
    forms: dict[str, set[str]] = {}
    for line in _OBJECTS.strip().splitlines():
        category, names, evidence = (part.strip() for part in line.split("|"))
        listed = names or category
        for word in (listed if strict else f"{category}, {listed}, {evidence}").split(", "):
            plain = word.rstrip("!")
            for form in {plain} if word.endswith("!") or not plain else {plain, _plural(plain)}:
                forms.setdefault(form, set()).add(category)
    return forms


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"
