# SPDX-License-Identifier: Apache-2.0
"""Three skills to fine-tune for, each with templates that no training example has.

mathematics: word problems of `fusion/tasks.py`, eight of whose twenty templates are held out.
german:      English sentences said in German; a quarter of the pairs of verb and thing are held out.
code:        what a line of Python gives; compositions of list functions, a third of which are held out.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "fusion"))
from tasks import HELD_OUT, TEMPLATES, THINGS, VERBS, Item, german, problem

__all__ = ["SKILLS", "Item", "code", "mathematics", "sentence"]

# Functions of a list of numbers that give a list, and those that give a number.
LISTS = ("sorted({x})", "{x}[::-1]", "{x}[1:]", "{x}[:-1]", "{x}[::2]", "[n + 1 for n in {x}]", "[2 * n for n in {x}]")
NUMBERS = ("sum({x})", "max({x})", "min({x})", "{x}[0]", "{x}[-1]", "len({x})")
COMPOSITIONS = tuple(
    outer.replace("{x}", inner) for outer, inner in product((*LISTS, *NUMBERS), LISTS) if outer != inner
)
LARGEST = 30


def mathematics(source: random.Random, *, held_out: bool) -> Item:
    """A word problem and its calculation."""
    chosen = [index for index in range(len(TEMPLATES)) if (index in HELD_OUT) == held_out]
    return problem(source, chosen, german=False)


def sentence(source: random.Random, *, held_out: bool) -> Item:
    """A sentence to be said in German."""
    while True:
        item = german(source)
        if _held_out_pair(item.prompt) == held_out:
            return item


def code(source: random.Random, *, held_out: bool) -> Item:
    """A line of Python and its value."""
    chosen = [text for index, text in enumerate(COMPOSITIONS) if (index % 3 == 1) == held_out]
    values = [source.randint(0, LARGEST) for _ in range(source.randint(4, 6))]
    expression = source.choice(chosen)
    names = {"__builtins__": {}, "sorted": sorted, "sum": sum, "max": max, "min": min, "len": len}
    result = eval(expression.format(x="x"), names, {"x": values})  # a line that was put together above
    return Item(f">>> x = {values}\n>>> {expression.format(x='x')}\n", str(result), 0)


SKILLS: dict[str, Callable[..., Item]] = {"mathematics": mathematics, "german": sentence, "code": code}


def _held_out_pair(prompt: str) -> bool:
    words = prompt.replace(".", " ").split()
    verb = next(index for index, word in enumerate(VERBS) if word in words)
    thing = next(index for index, word in enumerate(THINGS) if word in words)
    return (verb + thing) % 4 == 0
