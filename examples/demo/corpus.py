# SPDX-License-Identifier: Apache-2.0
"""What the demo's two models read: stories and sums, then four skills, one character a token."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["SKILLS", "Corpus", "Problem", "character_tokenizer", "story", "sum_of_digits"]

END = "\n"
PAD = "<pad>"
CHARACTERS = " .,:;!?'-=+0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Characters in a problem: 10,000 strings of digits a skill, of which training leaves the held-out ones unseen.
LENGTH = 4
# The loss skips targets of this value (the default of torch's cross entropy).
IGNORED = -100

PEOPLE = ["Ann", "Tom", "Mia", "Ben", "Eva", "Max", "Zoe", "Leo"]
THINGS = ["cup", "book", "ball", "key", "hat", "lamp", "coin", "map", "box", "shoe"]
KINDS = ["red", "blue", "green", "old", "new", "small", "big"]
PLACES = [
    "in the kitchen",
    "in the garden",
    "on the table",
    "under the bed",
    "by the river",
    "at the school",
    "near the old tree",
    "on the roof",
]
TIMES = ["On Monday ", "In the morning ", "One day ", "Last night ", "In summer ", "After lunch ", ""]


@dataclass(frozen=True)
class Problem:
    """The model reads `prompt` and must write `answer` and a line end."""

    prompt: str
    answer: str


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the line end is the end token."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD)


def story(draw: random.Random) -> str:
    """Three sentences about one thing and two people, who keep their names, and the thing its colour."""
    giver, taker = draw.sample(PEOPLE, 2)
    thing, kind = draw.choice(THINGS), draw.choice(KINDS)
    verb = draw.choice(["found", "saw", "lost", "made", "bought"])
    hands_over = f"{giver} {draw.choice(['gave', 'showed', 'sold'])} it to {taker}."
    found = f"{draw.choice(TIMES)}{giver} {verb} a {kind} {thing} {draw.choice(PLACES)}."
    given = draw.choice([hands_over, f"Then {hands_over}", f"{taker} wanted it, so {hands_over}"])
    ending = draw.choice(
        [
            f"{taker} liked the {kind} {thing}.",
            f"Now {taker} has the {thing}.",
            f"{taker} put the {thing} {draw.choice(['in a bag', 'on a shelf', 'in the car'])}.",
            f"{taker} was happy.",
        ]
    )
    return f"{found} {given} {ending}"


def sum_of_digits(draw: random.Random) -> Problem:
    """What the base can do: `3+4=7`."""
    left, right = draw.randrange(10), draw.randrange(10)
    return Problem(f"{left}+{right}=", str(left + right))


def _string(draw: random.Random, alphabet: str) -> str:
    return "".join(draw.choices(alphabet, k=LENGTH))


def _sort(draw: random.Random) -> Problem:
    digits = _string(draw, DIGITS)
    return Problem(f"sort {digits}=", "".join(sorted(digits)))


def _flip(draw: random.Random) -> Problem:
    digits = _string(draw, DIGITS)
    return Problem(f"flip {digits}=", digits[::-1])


def _next(draw: random.Random) -> Problem:
    letters = _string(draw, LETTERS)
    return Problem(f"next {letters}=", "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in letters))


def _nine(draw: random.Random) -> Problem:
    digits = _string(draw, DIGITS)
    return Problem(f"nine {digits}=", "".join(str(9 - int(digit)) for digit in digits))


# What the fine-tune learns and the base can't: sort, turn round, the letters that follow, the nines' complement.
SKILLS: dict[str, Callable[[random.Random], Problem]] = {"sort": _sort, "flip": _flip, "next": _next, "nine": _nine}


class Corpus:
    """Endless training rows, and the held-out problems and stories that they never show.

    Args:
        tokenizer: of `character_tokenizer`.
        held_out: problems and stories to hold out; the problems take the skills in turn.
        seed: draws everything.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, held_out: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._draw = random.Random(seed)
        problems: dict[str, Problem] = {}
        while len(problems) < held_out:
            problem = list(SKILLS.values())[len(problems) % len(SKILLS)](self._draw)
            problems.setdefault(problem.prompt, problem)
        stories: dict[str, None] = {}
        while len(stories) < held_out:
            stories.setdefault(story(self._draw))
        self.problems = list(problems.values())
        self.stories = list(stories)
        self._held_out = problems.keys() | stories.keys()

    def story(self) -> str:
        """A story that is not held out."""
        while (text := story(self._draw)) in self._held_out:
            pass
        return text

    def problem(self) -> Problem:
        """A problem of some skill that is not held out."""
        while (problem := self._draw.choice(list(SKILLS.values()))(self._draw)).prompt in self._held_out:
            pass
        return problem

    def sum(self) -> Problem:
        """A sum of two digits."""
        return sum_of_digits(self._draw)

    def lines(self, count: int) -> Iterator[str]:
        """Stories and solved problems in turn, as the fine-tune sees them in use."""
        for index in range(count):
            problem = self.problem()
            yield self.story() if index % 2 else problem.prompt + problem.answer

    def batch(
        self, problem: Callable[[], Problem], rows: int, story_rows: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packs stories and problems into rows.

        Args:
            problem: draws a problem.
            rows: rows in all.
            story_rows: of which are stories, from some character on.
            length: tokens a row.

        Returns:
            tokens and targets, both [rows, length] int64; a problem's prompt is no target.
        """
        packed = [self._story_row(length) for _ in range(story_rows)]
        packed += [self._problem_row(problem, length) for _ in range(rows - story_rows)]
        tokens = torch.tensor([ids for ids, _ in packed])
        is_target = torch.tensor([flags for _, flags in packed])
        return tokens[:, :-1], torch.where(is_target, tokens, IGNORED)[:, 1:]

    def _story_row(self, length: int) -> tuple[list[int], list[bool]]:
        start = self._draw.randrange(length)
        text = ""
        while len(text) <= start + length:
            text += self.story() + END
        return self._encode(text[start : start + length + 1]), [True] * (length + 1)

    def _problem_row(self, draw_problem: Callable[[], Problem], length: int) -> tuple[list[int], list[bool]]:
        text, is_target = "", list[bool]()
        while len(text) <= length:
            problem = draw_problem()
            answer = problem.answer + END
            text += problem.prompt + answer
            is_target += [False] * len(problem.prompt) + [True] * len(answer)
        return self._encode(text[: length + 1]), is_target[: length + 1]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])
