"""The grammar of the children's stories: events, their consequences, and sentence templates.

In the templates, ``{hero}``, ``{friend}`` and ``{other}`` are people, and other fields in braces are filled in by the
story so far: a lost ball stays the same ball, and the remedy follows from the trouble.
"""

import re
from typing import NamedTuple

import numpy as np

PEOPLE = ("hero", "friend", "other")
"""The people of a story."""

# fmt: off
FIRST_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ines", "Jack", "Kira", "Leo",
    "Mia", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tara", "Uma", "Vera", "Will", "Yara", "Zoe",
    "Anna", "Bruno", "Cora", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Karl", "Lina",
    "Max", "Nora", "Otto", "Pia", "Ruth", "Seth", "Tom", "Ute", "Vic", "Wanda", "Xenia", "Yan",
)
LAST_NAMES = (
    "Apple", "Brook", "Cliff", "Dale", "Elm", "Frost", "Grove", "Hill", "Iron", "Joy", "Knight", "Lake",
    "Moss", "North", "Oak", "Pond", "Quill", "Reed", "Stone", "Thorn", "Upton", "Vale", "Wood", "York",
    "Ash", "Berry", "Clay", "Dove", "Ember", "Fern", "Gold", "Heath", "Ivy", "Jet", "Kite", "Lark",
    "Mint", "Nest", "Olive", "Pine", "Rain", "Sky", "Tide", "Umber", "Vine", "Wolf", "Yew", "Zest",
)
# fmt: on


class Trouble(NamedTuple):
    """Something goes wrong with a toy.

    Attributes:
        toys: What it can happen to.
        places: Where.
        happens: What it is.
        tool: What helps.
        helps: How.
        effect: What it leaves behind.
    """

    toys: tuple[str, ...]
    places: tuple[str, ...]
    happens: str
    tool: str
    helps: str
    effect: str


class Weather(NamedTuple):
    """What the sky does, what one wears for it, and what comes of it."""

    sky: str
    clothes: str
    effect: str


class Animal(NamedTuple):
    """An animal, its voice, its food and where it goes."""

    name: str
    voice: str
    food: str
    home: str


TROUBLES = (
    Trouble(
        ("ball", "boat", "duck"),
        ("lake", "river", "harbor"),
        "the {toy} fell into the water and drifted away",
        "net",
        "caught the {toy} with the net",
        "wet",
    ),
    Trouble(
        ("kite", "balloon", "plane"),
        ("park", "forest", "garden"),
        "the wind took the {toy} and it got stuck in a tree",
        "ladder",
        "climbed up the ladder and took the {toy} down",
        "torn",
    ),
    Trouble(
        ("ring", "coin", "marble"),
        ("mill", "farm", "castle"),
        "the {toy} rolled away and fell into a deep hole",
        "rope",
        "slid down the rope and found the {toy}",
        "dusty",
    ),
    Trouble(
        ("doll", "truck", "bear"),
        ("field", "farm", "garden"),
        "the {toy} sank into the mud",
        "shovel",
        "dug out the {toy} with the shovel",
        "dirty",
    ),
    Trouble(
        ("cup", "drum", "train"),
        ("school", "shop", "kitchen"),
        "the {toy} dropped on the floor and broke in two",
        "pot of glue",
        "put the {toy} together with the glue",
        "cracked",
    ),
    Trouble(
        ("book", "flute", "map"),
        ("cave", "cellar", "castle"),
        "it became so dark that nobody could see the {toy}",
        "lamp",
        "lit the lamp and found the {toy} in a corner",
        "cold",
    ),
)
WEATHERS = (
    Weather("rained", "boots", "there were puddles everywhere"),
    Weather("snowed", "gloves", "the path was white"),
    Weather("was hot", "a hat", "everybody was thirsty"),
    Weather("was windy", "a scarf", "the leaves danced in the air"),
    Weather("was foggy", "a bright coat", "the houses looked like shadows"),
)
ANIMALS = (
    Animal("dog", "barked", "a bone", "behind the fence"),
    Animal("cat", "purred", "some milk", "on the roof"),
    Animal("cow", "mooed", "some grass", "in the barn"),
    Animal("horse", "neighed", "a carrot", "in the stable"),
    Animal("bird", "sang", "some seeds", "in the nest"),
    Animal("pig", "grunted", "an acorn", "under the oak"),
    Animal("frog", "croaked", "a fly", "on the stone"),
    Animal("mouse", "squeaked", "some cheese", "in the wall"),
)
FOODS = ("cake", "soup", "bread", "honey", "pears", "pudding")
COLORS = ("red", "blue", "green", "yellow", "purple", "silver")
SIZES = ("little", "big", "tiny", "huge")
TIMES = ("one morning", "one day", "in the summer", "last winter", "after lunch", "on a quiet evening")

OPENINGS = (
    "{time} {hero} went to the {place} with {friend}.",
    "{time} {hero} met {friend} at the {place}.",
    "once upon a time {hero} and {friend} lived near the {place}.",
    "{time} {friend} asked {hero} to come to the {place}.",
)
TOYS = (
    "{hero} had a {size} {color} {toy}.",
    "{hero} carried a {color} {toy} that was {size}.",
    "{friend} had given {hero} a {size} {color} {toy}.",
)
PLAYS = (
    "they played with the {toy} all day.",
    "{friend} liked the {color} {toy} too.",
    "{hero} showed the {toy} to {friend}.",
)
SKIES = (
    "it {sky}, so {hero} wore {clothes}.",
    "{hero} wore {clothes} because it {sky}.",
    "it {sky} and {effect}.",
)
MEETINGS = (
    "then {hero} saw a {color2} {animal}. the {animal} {voice}, so {hero} gave it {meal}.",
    "a {size2} {animal} came by and {voice}. {friend} gave {meal} to the {animal}.",
    "{friend} heard something that {voice}. it was a {animal} {home}.",
)
ACCIDENTS = (
    "suddenly {happens}.",
    "but then {happens}. oh no!",
    "{hero} was not careful, and {happens}.",
)
FEELINGS = ("{hero} cried.", "{hero} was very sad.", "{hero} called for help.")
RESCUES = (
    "{friend} ran home to get a {tool}. then {friend} {helps}.",
    "{friend} had a {tool} and {helps}.",
    "so {hero} borrowed a {tool} from {friend} and {helps}.",
)
STRANGERS = (
    "nobody had a {tool}, so they asked {other}. {other} came and {helps}.",
    "{friend} did not know what to do, but {other} brought a {tool} and {helps}.",
)
ENDS_WELL = (
    "the {toy} was {effect}, but {hero} was happy again.",
    "{hero} thanked {helper} and smiled.",
    "{hero} hugged {helper}. the {toy} was a bit {effect}.",
)
FAREWELLS = (
    "in the end {hero} shared some {food} with {friend}.",
    "{friend} and {hero} went home and ate {food}.",
    "after that {hero} and {friend} were best friends.",
    "that night {hero} dreamed of the {color} {toy}.",
)

_FIELD = re.compile(r"\{\w+\}")
_WORDS = re.compile(r"\w+|[^\w\s]")


def vocabulary() -> list[str]:
    """Return every word that a story can hold, names first, each once."""
    sentences = (OPENINGS, TOYS, PLAYS, SKIES, MEETINGS, ACCIDENTS, FEELINGS, RESCUES, STRANGERS, ENDS_WELL, FAREWELLS)
    texts = [text for group in (*sentences, FOODS, COLORS, SIZES, TIMES) for text in group]
    for things in (*TROUBLES, *WEATHERS, *ANIMALS):
        texts += [text for thing in things for text in ([thing] if isinstance(thing, str) else thing)]
    words = {word for text in texts for word in _WORDS.findall(_FIELD.sub(" ", text))}
    return [*FIRST_NAMES, *LAST_NAMES, *sorted(words)]


def tell(generator: np.random.Generator) -> list[str]:
    """Sample a story: its words, with ``hero``, ``friend`` and ``other`` in braces for the people.

    Args:
        generator: The only source of randomness.
    """

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(generator.integers(len(choices)))]

    trouble = TROUBLES[int(generator.integers(len(TROUBLES)))]
    weather = WEATHERS[int(generator.integers(len(WEATHERS)))]
    animal = ANIMALS[int(generator.integers(len(ANIMALS)))]
    stranger = generator.random() < 0.4
    fields = {person: f"{{{person}}}" for person in PEOPLE}
    fields |= {"time": pick(TIMES), "place": pick(trouble.places), "toy": pick(trouble.toys), "food": pick(FOODS)}
    fields |= {"color": pick(COLORS), "size": pick(SIZES), "color2": pick(COLORS), "size2": pick(SIZES)}
    fields |= {"sky": weather.sky, "clothes": weather.clothes, "tool": trouble.tool}
    fields |= {"animal": animal.name, "voice": animal.voice, "meal": animal.food, "home": animal.home}
    fields |= {"happens": trouble.happens.format(toy=fields["toy"]), "helps": trouble.helps.format(toy=fields["toy"])}
    fields["helper"] = fields["other" if stranger else "friend"]

    beginning = [pick(OPENINGS).format(**fields)]
    asides = [
        pick(SKIES).format(**fields, effect=weather.effect),
        pick(MEETINGS).format(**fields),
        pick(PLAYS).format(**fields),
    ]
    kept = [asides[index] for index in generator.permutation(len(asides))[: int(generator.integers(1, 4))]]
    toy, accident = pick(TOYS).format(**fields), pick(ACCIDENTS).format(**fields)
    rescue = [pick(FEELINGS).format(**fields), pick(STRANGERS if stranger else RESCUES).format(**fields)]
    end = [pick(ENDS_WELL).format(**fields, effect=trouble.effect), pick(FAREWELLS).format(**fields)]
    return re.findall(r"\{\w+\}|\w+|[^\w\s]", " ".join([*beginning, toy, *kept, accident, *rescue, *end]))
