# SPDX-License-Identifier: Apache-2.0
"""Generated data of the experiment: mathematics in English, German without mathematics, and both at once.

    maths     Question: Tom has 14 apples and buys 23 more. How ...?   14 + 23 = 37. Tom has 37 apples.
    german    English: Ida sells 37 pears.                             Ida verkauft siebenunddreißig Birnen.
    joint     Question: Tom has 14 apples and buys 23 more. How ...?   14 + 23 = 37. Tom hat siebenunddreißig Äpfel.

No German sentence of the second skill states a calculation, and no example of the first is German. The joint examples
that a gate is trained on come from some of the templates, those it is tested on from the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = [
    "HELD_OUT",
    "SKILLS",
    "TEMPLATES",
    "THINGS",
    "VERBS",
    "Item",
    "Template",
    "german",
    "german_number",
    "items",
    "joint",
    "problem",
    "verdict",
]

PEOPLE = (
    "Tom", "Ida", "Max", "Lena", "Paul", "Emma", "Jonas", "Clara", "Felix", "Nora", "Simon", "Greta", "Oscar", "Julia",
    "Anton", "Marie", "Peter", "Sara", "David", "Lisa",
)  # fmt: skip
THINGS = {
    "apples": "Äpfel", "books": "Bücher", "pens": "Stifte", "stamps": "Briefmarken", "coins": "Münzen",
    "marbles": "Murmeln", "cards": "Karten", "eggs": "Eier", "cups": "Tassen", "keys": "Schlüssel",
    "shells": "Muscheln", "stones": "Steine", "balls": "Bälle", "pears": "Birnen", "plums": "Pflaumen",
    "candles": "Kerzen", "photos": "Fotos", "buttons": "Knöpfe", "bottles": "Flaschen", "flowers": "Blumen",
    "dolls": "Puppen", "letters": "Briefe", "rings": "Ringe", "boxes": "Kisten",
}  # fmt: skip
VERBS = {
    "has": "hat", "needs": "braucht", "sells": "verkauft", "finds": "findet", "counts": "zählt", "buys": "kauft",
    "sees": "sieht", "loses": "verliert",
}  # fmt: skip
PLACES = {"": "", " at home": " zu Hause", " in the garden": " im Garten", " at school": " in der Schule"}
ONES = ("", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
TEENS = {10: "zehn", 11: "elf", 12: "zwölf", 16: "sechzehn", 17: "siebzehn"}
TENS = ("", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
LARGEST = 99


@dataclass(frozen=True)
class Item:
    """One example.

    Attributes:
        prompt: what the model is given.
        completion: what it must write.
        number: the answer's, for scores of parts of it.
    """

    prompt: str
    completion: str
    number: int


@dataclass(frozen=True)
class Template:
    """A word problem.

    Attributes:
        text: with {p} a person, {q} another, {t} things, {a}, {b}, {c} numbers.
        formula: how the answer is calculated, in the same letters.
        verb: of the answer's sentence.
    """

    text: str
    formula: str
    verb: str = "has"


TEMPLATES = (
    Template("{p} has {a} {t} and buys {b} more. How many {t} does {p} have?", "{a} + {b}"),
    Template("{p} has {a} {t} and gives {b} of them to {q}. How many {t} does {p} have?", "{a} - {b}"),
    Template("There are {a} {t} on each of {b} tables. How many {t} does {p} count?", "{a} * {b}", "counts"),
    Template("{p} needs {a} {t} today and {b} {t} tomorrow. How many {t} does {p} need?", "{a} + {b}", "needs"),
    Template("{p} brings {a} {t} to the market and takes {b} back. How many {t} does {p} sell?", "{a} - {b}", "sells"),
    Template("{p} fills {a} bags with {b} {t} each. How many {t} does {p} have?", "{a} * {b}"),
    Template("{p} finds {a} {t}, then {b}, then {c}. How many {t} does {p} find?", "{a} + {b} + {c}", "finds"),
    Template("{p} had {a} {t}, lost {b} and bought {c}. How many {t} does {p} have?", "{a} - {b} + {c}"),
    Template("{a} friends of {p} want {b} {t} each. How many {t} does {p} need?", "{a} * {b}", "needs"),
    Template("{p} sells {a} {t} before noon and {b} after it. How many {t} does {p} sell?", "{a} + {b}", "sells"),
    Template("{q} has {a} {t}. {p} has {b} fewer. How many {t} does {p} have?", "{a} - {b}"),
    Template("{p} has {a} rows of {b} {t} and {c} single ones. How many {t} does {p} have?", "{a} * {b} + {c}"),
    Template("{q} has {a} {t}. {p} has {b} more than {q}. How many {t} does {p} have?", "{a} + {b}"),
    Template("Of {a} {t} on the shelf {b} are broken. How many good {t} does {p} find?", "{a} - {b}", "finds"),
    Template("{p} buys {b} {t} a day for {a} days. How many {t} does {p} buy?", "{b} * {a}", "buys"),
    Template(
        "{p} sees {a} {t} here, {b} there and {c} far away. How many {t} does {p} see?", "{a} + {b} + {c}", "sees"
    ),
    Template("{p} must have {a} {t} and has {b} already. How many {t} does {p} need?", "{a} - {b}", "needs"),
    Template("{p} gets {a} boxes of {b} {t} and drops {c} {t}. How many {t} does {p} have?", "{a} * {b} - {c}"),
    Template("{p} and {q} put {a} and {b} {t} on a table. How many {t} does {p} count?", "{a} + {b}", "counts"),
    Template("{p} has {a} {t}, eats {b} and gives away {c}. How many {t} does {p} have?", "{a} - {b} - {c}"),
)
# Never in a gate's examples: one of every kind of calculation, the rest alike.
HELD_OUT = frozenset({3, 5, 7, 10, 12, 15, 17, 19})


def german_number(number: int) -> str:
    """A number from 2 to 99 in German words."""
    if not 2 <= number <= LARGEST:
        raise ValueError(f"number {number}, expected 2 to {LARGEST}")
    if number < 10:
        return ONES[number]
    if number < 20:
        return TEENS.get(number, ONES[number - 10] + "zehn")
    tens, one = divmod(number, 10)
    return (ONES[one] + "und" if one else "") + TENS[tens]


def maths(random: random.Random) -> Item:
    """A problem of any template, asked and answered in English."""
    return problem(random, range(len(TEMPLATES)), german=False)


def german(random: random.Random) -> Item:
    """A sentence to be said in German, its number in words."""
    person, thing, verb = random.choice(PEOPLE), random.choice(list(THINGS)), random.choice(list(VERBS))
    place, number = random.choice(list(PLACES)), random.randint(2, LARGEST)
    english = f"{person} {verb} {number} {thing}{place}."
    answer = f" {person} {VERBS[verb]}{PLACES[place]} {german_number(number)} {THINGS[thing]}."
    return Item(f"English: {english}\nGerman:", answer, number)


def joint(random: random.Random, *, held_out: bool) -> Item:
    """A problem asked in English and answered in German."""
    chosen = [index for index in range(len(TEMPLATES)) if (index in HELD_OUT) == held_out]
    return problem(random, chosen, german=True)


SKILLS: dict[str, Callable[[random.Random], Item]] = {"maths": maths, "german": german}


def items(make: Callable[[random.Random], Item], count: int, seed: str) -> Iterator[Item]:
    """So many different items."""
    source, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        item = make(source)
        if item.prompt not in seen:
            seen.add(item.prompt)
            yield item


def verdict(item: Item, reply: str) -> dict[str, bool]:
    """What is right about a reply.

    Returns:
        `exact`: all of it; `number`: the calculation's result; `german`: the sentence after it is the German one, its
        number in words but not necessarily the right one.
    """
    wanted, got = item.completion.strip(), reply.strip()
    before, word, after = wanted.rpartition(". ")[2].partition(german_number(item.number))
    return {
        "exact": got == wanted,
        "number": got.partition(".")[0].endswith(f"= {item.number}"),
        "german": bool(word) and _german_number_between(before, got.rpartition(". ")[2], after),
    }


def _german_number_between(before: str, sentence: str, after: str) -> bool:
    return any(sentence == before + german_number(number) + after for number in range(2, LARGEST + 1))


def problem(random: random.Random, templates: list[int] | range, *, german: bool) -> Item:
    template = TEMPLATES[random.choice(templates)]
    person, other = random.sample(PEOPLE, 2)
    thing = random.choice(list(THINGS))
    while True:
        numbers = _numbers(random, template.formula)
        formula = template.formula.format(**numbers)
        # Digits and + - * alone, written by us.
        result = int(eval(formula, {"__builtins__": {}}))
        if 2 <= result <= LARGEST:
            break
    problem = template.text.format(p=person, q=other, t=thing, **numbers)
    if german:
        sentence = f"{person} {VERBS[template.verb]} {german_number(result)} {THINGS[thing]}."
    else:
        sentence = f"{person} {template.verb} {result} {thing}."
    asked = "Answer in German" if german else "Answer"
    return Item(f"Question: {problem}\n{asked}:", f" {formula} = {result}. {sentence}", result)


def _numbers(random: random.Random, formula: str) -> dict[str, int]:
    if "*" in formula:
        return {"a": random.randint(2, 9), "b": random.randint(2, 12), "c": random.randint(2, 20)}
    a, b, c = (random.randint(2, 60) for _ in "abc")
    return {"a": max(a, b), "b": min(a, b), "c": c} if "-" in formula else {"a": a, "b": b, "c": c}
