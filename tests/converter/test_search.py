# SPDX-License-Identifier: Apache-2.0
"""The search for a quality, over made-up models whose KL is a known function of the ratio."""

import math

import pytest
from deltaweave.converter import ROUNDS, RecipeError
from deltaweave.converter.search import NARROW, Attempt, Curve, best_of, search
from hypothesis import given
from hypothesis import strategies as st

LEAST = 1 / 300
RATIOS = [LEAST * 1.2**step for step in range(32)] + [1.0]


def distortion(ratio):
    """Falls slowly at first and fast later, as allocations' curves do."""
    return math.exp(-9 * ratio**0.6)


def model(factor, power, floor=0.0):
    return lambda ratio: factor * distortion(ratio) ** power + floor


class Pair:
    """Counts compressions of a model whose KL is a function of the ratio."""

    def __init__(self, kl, curve):
        self.kl, self.curve, self.made = kl, curve, []

    def compress(self, ratio, predicted, number):
        assert number == len(self.made)
        assert LEAST <= ratio <= 1
        self.made.append(Attempt(ratio, int(1e9 * ratio), predicted, self.kl(ratio), 0.0))
        return self.made[-1]

    def search(self, limit, first=None, attempts=()):
        self.made = list(attempts)
        return search(limit, self.curve, first, attempts, self.compress)

    def smallest(self, limit):
        low, high = LEAST, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self.kl(middle) <= limit else (middle, high)
        return high


def allocated(kl):
    return Pair(kl, Curve([(ratio, distortion(ratio)) for ratio in RATIOS], (1.0, 3 * kl(LEAST))))


def fixed(kl):
    return Pair(kl, Curve.square(LEAST))


@given(
    factor=st.floats(0.05, 20),
    power=st.floats(0.6, 2.0),
    share=st.floats(0.02, 0.95),
    first=st.sampled_from([None, 1 / 16]),
)
def test_finds_a_file_near_the_smallest_in_a_few_rounds(factor, power, share, first):
    kl = model(factor, power)
    limit = kl(LEAST) * (kl(1.0) / kl(LEAST)) ** share
    pair = (fixed if first else allocated)(kl)
    found = pair.search(limit, first)
    assert len(pair.made) <= ROUNDS
    assert found.kl <= limit
    assert found == best_of(limit, pair.made)
    assert found.kl >= 0.85 * limit or found.ratio <= 1.1 * pair.smallest(limit)


def test_a_curve_that_holds_takes_two_or_three_compressions():
    for power in (0.8, 1.0, 1.3):
        kl = model(0.7, power)
        for limit in (0.02, 0.1, 0.3):
            pair = allocated(kl)
            found = pair.search(limit * kl(LEAST))
            assert len(pair.made) <= 3
            assert found.kl > 0.85 * limit * kl(LEAST)


def test_predictions_come_from_what_was_measured_before():
    pair = allocated(model(0.7, 1.2))
    found = pair.search(0.02)
    assert all(attempt.predicted is not None for attempt in pair.made)
    assert found.predicted == pytest.approx(found.kl, rel=0.25)
    without_a_curve = fixed(model(0.7, 1.2))
    without_a_curve.search(0.02, 1 / 16)
    assert without_a_curve.made[0].predicted is None


def test_goes_on_where_it_was_stopped():
    whole = allocated(model(0.5, 1.4))
    found = whole.search(0.004)
    for done in range(len(whole.made)):
        again = allocated(model(0.5, 1.4))
        assert again.search(0.004, attempts=tuple(whole.made[:done])) == found
        assert again.made == whole.made


def test_a_limit_that_no_file_reaches_is_refused_by_what_was_reached():
    pair = allocated(model(0.5, 1.0, floor=0.01))
    with pytest.raises(RecipeError, match=r"max_kl 0\.005: not reached by the largest file either; .* was 0\.01"):
        pair.search(0.005)
    assert max(attempt.ratio for attempt in pair.made) == pytest.approx(1.0)
    assert len(pair.made) <= ROUNDS


def test_a_limit_that_the_smallest_file_keeps_ends_there():
    pair = allocated(model(0.5, 1.0))
    found = pair.search(0.9)
    assert found.ratio == pytest.approx(LEAST, rel=NARROW - 1)


def test_a_model_too_small_for_any_ratio_below_one_is_tried_once():
    pair = Pair(lambda ratio: 0.01, Curve.square(1.0))
    assert pair.search(0.02, first=1.0).ratio == 1.0
    assert len(pair.made) == 1
    with pytest.raises(RecipeError, match=r"not reached by the largest file either; the least was 0\.01 at ratio 1/1"):
        pair.search(0.005, first=1.0)
    assert len(pair.made) == 1


def test_noise_does_not_keep_it_from_ending():
    bumps = {number: 1 + 0.2 * (-1) ** number for number in range(ROUNDS)}
    smooth = model(0.7, 1.0)
    pair = allocated(smooth)
    pair.kl = lambda ratio: smooth(ratio) * bumps[len(pair.made)]
    assert pair.search(0.03).kl <= 0.03
    assert len(pair.made) <= ROUNDS


def test_files_without_any_error():
    """A LoRA that was merged, in bands that hold all of it: KL is 0 from some ratio on."""
    smooth = model(0.7, 1.0)
    for make, first in ((fixed, 1 / 16), (allocated, None)):
        pair = make(lambda ratio: smooth(ratio) if ratio < 1 / 40 else 0.0)
        found = pair.search(0.35, first)
        assert len(pair.made) <= ROUNDS
        assert found.kl <= 0.35 and found.ratio < 1 / 16
