# SPDX-License-Identifier: Apache-2.0
"""The smallest file of a wanted quality: which ratio to try next, and when to be content.

KL follows the distortion that a ratio leaves almost as a power of it. So a few tries, each of which is compressed and
measured in full, are enough: the curve of distortion is known beforehand, and two measured points give the power.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaweave.converter.errors import RecipeError

__all__ = ["ROUNDS", "Attempt", "Curve", "best_of", "search"]

ROUNDS = 6
# The next try aims at this share of the limit, at less after every miss; a KL within CLOSE of the limit is near enough,
# and so is a file that is at most NARROW larger than one that missed it.
AIM, CLOSE, NARROW = 0.95, 0.9, 1.01
# Bounds of the power by which KL follows distortion.
POWERS = 0.3, 3.0
# Less KL than this, or none at all, is rounding: it says that a file is too good, and not by how much.
LEAST_KL = 1e-9


@dataclass(frozen=True)
class Attempt:
    """One compression.

    Attributes:
        ratio: that it was given.
        bytes: of all projections.
        predicted: the KL expected beforehand, None where nothing was known.
        kl: measured on held-out text.
        error: standard error of `kl`.
    """

    ratio: float
    bytes: int
    predicted: float | None
    kl: float
    error: float


class Curve:
    """What KL to expect at a ratio.

    Distortion over ratio is read from the allocation's tables; where there are none, it is taken to fall with the
    square.
    """

    def __init__(self, points: Sequence[tuple[float, float]], nothing: tuple[float, float] | None = None) -> None:
        """Of a pair and a recipe.

        Args:
            points: (ratio, distortion) by rising ratio.
            nothing: (distortion, KL) with nothing stored, if both are known.
        """
        self._points = [(math.log(ratio), math.log(distortion)) for ratio, distortion in points if distortion > 0]
        self._nothing = nothing and (math.log(nothing[0]), math.log(nothing[1]))

    @classmethod
    def square(cls, least: float) -> Curve:
        """From `least` to 1, where no distortions are known."""
        return cls([(least, least**-2), (1.0, 1.0)] if least < 1 else [(1.0, 1.0)])

    @property
    def ratios(self) -> tuple[float, float]:
        """The least and the largest that the curve knows."""
        least, most = math.exp(self._points[0][0]), min(1.0, math.exp(self._points[-1][0]))
        return min(least * (1 + 1e-6), most), most

    def kl(self, ratio: float, attempts: Sequence[Attempt]) -> float:
        """Expected at `ratio`, after `attempts`."""
        power, (at, kl) = self._law(ratio, attempts)
        return math.exp(kl + power * (self._distortion(ratio) - at))

    def ratio(self, kl: float, attempts: Sequence[Attempt]) -> float:
        """Where `kl` is expected, the largest if nowhere; distortion falls with the ratio, so halving finds it."""
        low, high = self.ratios
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.kl(middle, attempts) > kl else (low, middle)
        return high

    def _law(self, ratio: float, attempts: Sequence[Attempt]) -> tuple[float, tuple[float, float]]:
        """(power, a point that it goes through) about `ratio`: of the two nearest tries, or the first and nothing."""
        known = [(self._distortion(attempt.ratio), math.log(max(attempt.kl, LEAST_KL))) for attempt in attempts]
        known.sort(key=lambda point: abs(point[0] - self._distortion(ratio)))
        if len(known) < 2 and self._nothing:
            known.append(self._nothing)
        if len(known) < 2 or known[0][0] == known[1][0]:
            return 1.0, known[0]
        power = (known[0][1] - known[1][1]) / (known[0][0] - known[1][0])
        return min(max(power, POWERS[0]), POWERS[1]), known[0]

    def _distortion(self, ratio: float) -> float:
        """Its logarithm, linear between the points."""
        at, points = math.log(ratio), self._points
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if at <= x1:
                return y0 + (y1 - y0) * (max(at, x0) - x0) / (x1 - x0)
        return points[-1][1]


def best_of(limit: float, attempts: Sequence[Attempt]) -> Attempt | None:
    """The smallest within the limit."""
    return min((attempt for attempt in attempts if attempt.kl <= limit), key=lambda a: a.bytes, default=None)


def search(
    limit: float,
    curve: Curve,
    first: float | None,
    attempts: Sequence[Attempt],
    compress: Callable[[float, float | None, int], Attempt],
) -> Attempt:
    """The smallest of a few compressions whose measured KL is at most `limit`.

    Args:
        limit: in nats a token.
        curve: what to expect.
        first: the ratio to begin with; None takes the one that the curve gives.
        attempts: made before the work was stopped.
        compress: makes and measures one of (ratio, KL expected, its number from 0).

    Raises:
        RecipeError: no file of any size reaches the limit, or none was found in `ROUNDS`.
    """
    attempts = list(attempts)
    while (ratio := _next_ratio(limit, curve, first, attempts)) is not None:
        expected = None if first is not None and not attempts else curve.kl(ratio, attempts)
        attempts.append(compress(ratio, expected, len(attempts)))
    found = best_of(limit, attempts)
    assert found is not None  # else `_next_ratio` raises
    return found


def _next_ratio(limit: float, curve: Curve, first: float | None, attempts: Sequence[Attempt]) -> float | None:
    """What to try next, None if the best so far will do."""
    passed = best_of(limit, attempts)
    missed = [a.ratio for a in attempts if a.kl > limit and (passed is None or a.ratio < passed.ratio)]
    below = max(missed, default=0.0)
    if passed and (passed.kl >= CLOSE * limit or passed.ratio <= below * NARROW or len(attempts) >= ROUNDS):
        return None
    _require_hope(limit, curve, attempts)
    least, most = curve.ratios
    if not attempts and first is not None:
        return first
    if passed is None and len(attempts) == ROUNDS - 1:
        return most
    step = math.sqrt(NARROW)
    ratio = max(curve.ratio(limit * AIM ** (1 if passed else 1 + len(missed)), attempts), least, below * step)
    if passed is None:
        return min(ratio, most)
    ratio = min(ratio, passed.ratio / step)
    return ratio if ratio >= least and ratio > below else None


def _require_hope(limit: float, curve: Curve, attempts: Sequence[Attempt]) -> None:
    """Refuses a limit that the largest file misses, or that was not found in time."""
    if not attempts:
        return
    best = min(attempts, key=lambda attempt: attempt.kl)
    reached = f"the least was {best.kl:.3g} at ratio 1/{1 / best.ratio:.2f}, {best.bytes} bytes of projections"
    if any(attempt.kl > limit and attempt.ratio >= curve.ratios[1] for attempt in attempts):
        raise RecipeError(f"max_kl {limit:g}: not reached by the largest file either; {reached}")
    if len(attempts) >= ROUNDS:
        raise RecipeError(f"max_kl {limit:g}: not reached in {ROUNDS} compressions; {reached}")
