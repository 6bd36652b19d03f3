"""Seeded English-like text for the demo model: train, calibrate and evaluate without a data set.

`generate` tells small stories. A story draws its facts first (who, where, when, which pet, how many
apples) and every sentence is a function of these facts, so that a reader which remembers the story
predicts names, numbers and verb forms that a bigram model cannot. Words are chosen Zipf-like.

The three seeds below keep training, calibration and evaluation text apart.
"""

import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

TRAIN_SEED = 1
CALIBRATION_SEED = 2
EVALUATION_SEED = 3

T = TypeVar("T")


def _rows(table: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in table.split(","))


# --- words, frequent ones first -------------------------------------------------------------------

WOMEN = """Mira Anna Lena Rosa Ida Clara Nell Vera Greta Tessa Hedda Olga Edith Lotte Wilma Agnes
    Sonja Petra Flora Judith""".split()
MEN = """Tomas Otto Emil Hugo Peter Karl Anton Felix Oskar Jonas Rolf Bruno Arne Milo Victor Simon
    Walter Henrik Casper Edgar""".split()
TOWNS = """Oldford Stonebridge Millbrook Fernley Whitsand Kettleby Longmarsh Eastwell Harrowby
    Northgate Ashmere Coldwater Redcliff Summerton Thornhill Wexcombe""".split()
# One, third person present, plural present, past, object: "a baker bakes bread".
JOBS = _rows("""baker bakes bake baked bread, farmer grows grow grew corn,
    smith makes make made nails, teacher reads read read books, weaver sells sell sold cloth,
    miller grinds grind ground flour, painter mixes mix mixed colours,
    sailor mends mend mended nets, doctor gives give gave advice, carpenter cuts cut cut wood,
    gardener plants plant planted roses, tailor sews sew sewed coats,
    clerk writes write wrote letters, shepherd keeps keep kept sheep,
    printer prints print printed papers, singer sings sing sang songs,
    hunter follows follow followed deer, judge hears hear heard cases""")
# One, many, the sound it made.
ANIMALS = _rows("""dog dogs barked, cat cats purred, horse horses neighed, goose geese hissed,
    mouse mice squeaked, goat goats bleated, owl owls hooted, duck ducks quacked,
    rabbit rabbits thumped, crow crows cawed, pony ponies whinnied, ox oxen snorted""")
FOLK = _rows("""woman women, man men, child children, girl girls, boy boys, neighbour neighbours,
    stranger strangers, guest guests, soldier soldiers, merchant merchants, monk monks,
    widow widows, thief thieves, fisherman fishermen""")
THINGS = _rows("""apple apples, egg eggs, pear pears, candle candles, plum plums, loaf loaves,
    onion onions, cherry cherries, coin coins, potato potatoes, feather feathers, orange oranges,
    knife knives, box boxes, bottle bottles, stone stones""")
# Third person present, plural present, past; all take an object.
ACTS = _rows("""carries carry carried, finds find found, sells sell sold, brings bring brought,
    counts count counted, washes wash washed, hides hide hid, wants want wanted, steals steal stole,
    throws throw threw, keeps keep kept, buys buy bought, drops drop dropped, needs need needed""")
PET_NAMES = "Pip Moss Bell Patch Star Button Ginger Rook Hazel Tip Sooty Clover Biscuit".split()
SIZES = "small big old young tiny fat thin clever lazy quiet strong slow".split()
COLOURS = "brown black white grey red yellow golden silver".split()
PLACES = """market mill river bridge harbour church school inn forest well station library tower
    garden orchard square""".split()
GOODS = """bread salt tea flour milk rope oil cheese soap wool honey butter paper sugar wood coffee
    iron pepper""".split()
TREASURES = "ring lamp key coat book hat umbrella clock mirror axe letter map violin kettle".split()
TIMES = ("every morning", "at night", "before noon", "in spring", "after supper", "in the winter",
         "on market days", "when nobody looks")
# Mood and cause, told of a person.
MOODS = (
    ("tired", "had worked all night"), ("happy", "had good news from home"),
    ("hungry", "had not eaten since morning"), ("sad", "missed an old friend"),
    ("cold", "had no coat"), ("proud", "had won a prize"), ("angry", "had lost a bet"),
    ("afraid", "had heard a noise in the dark"), ("ill", "had eaten too many plums"),
    ("calm", "had nothing left to do"))
# Weather and what it did to the town.
WEATHER = (
    ("it rained", "the streets were wet"), ("the sun shone", "the stones were warm"),
    ("it snowed", "the roofs were white"), ("the wind blew", "the doors would not stay shut"),
    ("the fog was thick", "nobody could see the river"),
    ("it was hot", "the wells were almost dry"))
PROVERBS = (
    "A small key opens a big door", "Slow water runs deep", "Two hands are better than one",
    "No road is long with a friend", "Who asks will find the way", "Every hill has two sides",
    "Old bread is better than none", "The last sheep shuts the gate")
MONTHS = """January February March April May June July August September October November
    December""".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = """no one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = "first second third fourth fifth".split()


# --- chance ---------------------------------------------------------------------------------------

class Dice:
    """The only source of chance. Uses random(), whose sequence Python promises never to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number, low <= number <= high, all equally likely."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, table: Sequence[T]) -> T:
        """One entry; the k-th has weight 1 / (k + 2)."""
        sums = _zipf_sums(len(table))
        return table[bisect(sums, self._random() * sums[-1])]

    def pick_several(self, table: Sequence[T], count: int) -> list[T]:
        """`count` different entries in the order drawn."""
        drawn: list[T] = []
        while len(drawn) < count:
            entry = self.pick(table)
            if entry not in drawn:
                drawn.append(entry)
        return drawn


@lru_cache
def _zipf_sums(size: int) -> tuple[float, ...]:
    # The shift by 2 keeps the first words from crowding out the rest of such short tables.
    return tuple(accumulate(1 / (rank + 2) for rank in range(1, size + 1)))


# --- facts ----------------------------------------------------------------------------------------

@dataclass
class Person:
    """One character. Facts stay as drawn, except `count`, which follows what the story tells."""

    name: str
    age: int
    job: tuple[str, ...]
    mood: tuple[str, str]
    pet: tuple[str, ...]
    pet_name: str
    pet_looks: str
    thing: tuple[str, ...]
    count: int

    def __post_init__(self) -> None:
        self.she, self.her = ("she", "her") if self.name in WOMEN else ("he", "his")


@dataclass
class Story:
    """Everything that the sentences of one story agree on."""

    dice: Dice
    people: list[Person]
    town: str
    place: str
    date: tuple[int, str, int]
    weekday: int
    weather: tuple[str, str]
    shopping: list[str]
    treasure: str
    proverb: str
    spoken_of: Person | None = None

    def someone(self) -> Person:
        """The first person of the story more often than the others."""
        return self.dice.pick(self.people)

    def two(self) -> tuple[Person, Person]:
        one, other = self.dice.pick_several(self.people, 2)
        return one, other

    def subject(self, person: Person) -> str:
        """Start of a sentence: mostly a pronoun if the person is already spoken of, else a name."""
        known = self.spoken_of is person and self.dice.chance(0.8)
        self.spoken_of = person
        return person.she.capitalize() if known else person.name


def new_story(dice: Dice) -> Story:
    size = dice.number(2, 3)
    names = dice.pick_several(dice.pick_several(WOMEN, 2) + dice.pick_several(MEN, 2), size)
    jobs, pets = dice.pick_several(JOBS, size), dice.pick_several(ANIMALS, size)
    pet_names, things = dice.pick_several(PET_NAMES, size), dice.pick_several(THINGS, size)
    people = [
        Person(name=names[i], age=dice.number(18, 79), job=jobs[i], mood=dice.pick(MOODS),
               pet=pets[i], pet_name=pet_names[i], thing=things[i], count=dice.number(2, 12),
               pet_looks=f"{dice.pick(SIZES)} {dice.pick(COLOURS)}")
        for i in range(size)]
    return Story(
        dice=dice, people=people, town=dice.pick(TOWNS), place=dice.pick(PLACES),
        date=(dice.number(1, 28), dice.pick(MONTHS), dice.number(1800, 1899)),
        weekday=dice.number(0, 6), weather=dice.pick(WEATHER),
        shopping=dice.pick_several(GOODS, dice.number(3, 5)), treasure=dice.pick(TREASURES),
        proverb=dice.pick(PROVERBS))


# --- phrases --------------------------------------------------------------------------------------

def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def in_words(number: int) -> str:
    """0..99; 0 is "no", as in "no apples"."""
    if number < 20:
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens - 2] + (f"-{UNITS[unit]}" if unit else "")


def counted(number: int, thing: Sequence[str]) -> str:
    """As in "one apple", "three apples"."""
    return f"{in_words(number)} {thing[0] if number == 1 else thing[1]}"


def listing(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]


# --- sentences ------------------------------------------------------------------------------------

def age_and_job(story: Story) -> str:
    person = story.someone()
    story.spoken_of = person
    if story.dice.chance(0.5):
        return f"{person.name} was {a(person.job[0])} in {story.town}."
    return f"{person.name}, {a(person.job[0])}, was {in_words(person.age)} years old."


def work(story: Story) -> str:
    person = story.someone()
    job, does, do, did, what = person.job
    story.spoken_of = person
    if story.dice.chance(0.5):
        return f"Every day {person.name} {did} {what}, as {job}s do."
    return f"All {job}s {do} {what}, but {person.name} {does} more {what} than most."


def pet(story: Story) -> str:
    person = story.someone()
    looks = f"{a(person.pet_looks)} {person.pet[0]}"
    return f"{story.subject(person)} had {looks} named {person.pet_name}."


def pet_acts(story: Story) -> str:
    person = story.someone()
    story.spoken_of = None
    if story.dice.chance(0.5):
        return f"{person.pet_name} the {person.pet[0]} {person.pet[2]} at {story.someone().name}."
    return f"When {person.name} came home, {person.pet_name} {person.pet[2]} by the {story.place}."


def errand(story: Story) -> str:
    person, friend = story.two()
    story.spoken_of, day = person, WEEKDAYS[story.weekday]
    story.weekday = (story.weekday + 1) % 7
    return f"On {day} {person.name} walked to the {story.dice.pick(PLACES)} with {friend.name}."


def owns(story: Story) -> str:
    person = story.someone()
    return f"{story.subject(person)} had {counted(person.count, person.thing)}."


def buys(story: Story) -> str:
    person, more = story.someone(), story.dice.number(1, 6)
    before, person.count = person.count, person.count + more
    return (f"{story.subject(person)} had {counted(before, person.thing)} and bought "
            f"{in_words(more)} more, which made {in_words(person.count)}.")


def gives(story: Story) -> str:
    person, friend = story.two()
    if person.count < 2:
        return owns(story)
    gift = story.dice.number(1, person.count - 1)
    before, person.count = person.count, person.count - gift
    return (f"{story.subject(person)} gave {friend.name} {in_words(gift)} of {person.her} "
            f"{counted(before, person.thing)}, so {in_words(person.count)} "
            f"{'was' if person.count == 1 else 'were'} left.")


def feeling(story: Story) -> str:
    person = story.someone()
    mood, cause = person.mood
    if story.dice.chance(0.6):
        return f"{story.subject(person)} was {mood}, because {person.she} {cause}."
    story.spoken_of, guess = person, story.dice.pick(MOODS)[0]
    answer = "Yes" if guess == mood else "No"
    return f"Was {person.name} {guess}? {answer}, {person.she} was {mood}."


def says(story: Story) -> str:
    person, friend = story.two()
    story.spoken_of = person
    if story.dice.chance(0.5):
        return f'"I am {person.mood[0]}," said {person.name}.'
    return f'"{story.proverb}," said {person.name} to {friend.name}.'


def asks(story: Story) -> str:
    person, friend = story.two()
    story.spoken_of = person
    question, answer = story.dice.pick((
        (f"Where is {person.pet_name}", f"The {person.pet[0]} is at the {story.place}"),
        ("How old are you", f"I am {in_words(person.age)}"),
        ("Who are you", f"I am {a(person.job[0])} from {story.town}")))
    return f'"{question}?" asked {friend.name}. "{answer}," said {person.name}.'


def habit(story: Story) -> str:
    """The verb agrees with the first noun and not with the nearer one."""
    dice = story.dice
    (one, many), (beast, beasts, _) = dice.pick(FOLK), dice.pick(ANIMALS)
    (third, plural, _), (thing, things) = dice.pick(ACTS), dice.pick(THINGS)
    looks, time, story.spoken_of = dice.pick(SIZES), dice.pick(TIMES), None
    if dice.chance(0.5):
        return f"The {looks} {many} with the {beast} {plural} {things} {time}."
    return f"The {looks} {one} with the {beasts} {third} {a(thing)} {time}."


def event(story: Story) -> str:
    dice, (folk, _), (_, bare, past) = story.dice, story.dice.pick(FOLK), story.dice.pick(ACTS)
    what, story.spoken_of = f"the {dice.pick(COLOURS)} {dice.pick(THINGS)[0]}", None
    if dice.chance(0.3):
        return f"{a(folk).capitalize()} did not {bare} {what}."
    return f"{a(folk).capitalize()} {past} {what} near the {dice.pick(PLACES)}."


def weather(story: Story) -> str:
    cause, effect = story.weather
    story.spoken_of = None
    return f"In {story.date[1]} {cause} in {story.town}, and {effect}."


def shopping(story: Story) -> str:
    person = story.someone()
    return f"{story.subject(person)} wrote a list for the {story.place}: {listing(story.shopping)}."


def checks_list(story: Story) -> str:
    rank = story.dice.number(0, len(story.shopping) - 1)
    story.spoken_of = None
    return f"The {ORDINALS[rank]} word on the list was {story.shopping[rank]}."


def sums(story: Story) -> str:
    left, right = story.dice.number(1, 12), story.dice.number(1, 12)
    if story.dice.chance(0.5):
        return f"{in_words(left).capitalize()} and {in_words(right)} is {in_words(left + right)}."
    return f"In the school book they read: {left} + {right} = {left + right}."


def treasure(story: Story) -> str:
    person, what = story.someone(), story.treasure
    where = f"behind the {story.dice.pick(PLACES)}"
    return f"{story.subject(person)} looked for the {what} {where}, but the {what} was gone."


def compares(story: Story) -> str:
    one, other = story.two()
    story.spoken_of = None
    if one.age == other.age:
        return f"{one.name} was as old as {other.name}."
    return f"{one.name} was {'older' if one.age > other.age else 'younger'} than {other.name}."


def month_and_year(story: Story) -> str:
    story.spoken_of = None
    return f"It was still {story.date[1]} {story.date[2]}."


SENTENCES: tuple[Callable[[Story], str], ...] = (
    pet, event, gives, says, habit, feeling, errand, age_and_job, asks, buys, work, pet_acts, owns,
    shopping, weather, checks_list, sums, treasure, compares, month_and_year)


# --- stories --------------------------------------------------------------------------------------

def tell(story: Story) -> str:
    """A title, then one to three paragraphs, each on its line; the first opens with the date."""
    hero, dice, (day, month, year) = story.people[0], story.dice, story.date
    story.spoken_of = hero
    opening = (f"On {day} {month} {year} {story.weather[0]} in {story.town}. "
               f"{hero.name} was {a(hero.job[0])} and lived near the {story.place}.")
    paragraphs = [
        " ".join(sentence(story) for sentence in dice.pick_several(SENTENCES, dice.number(4, 9)))
        for _ in range(dice.number(1, 3))]
    title = f"The {story.treasure.capitalize()} of {story.town}"
    return "\n".join([title, f"{opening} {paragraphs[0]}", *paragraphs[1:]])


def generate(seed: int, characters: int) -> str:
    """Text of exactly `characters` ASCII characters: stories parted by empty lines.

    The same seed gives the same text on every machine, and a longer text starts with the shorter.
    """
    dice, stories, length = Dice(seed), [], 0
    while length < characters:
        stories.append(tell(new_story(dice)) + "\n\n")
        length += len(stories[-1])
    return "".join(stories)[:characters]
