# SPDX-License-Identifier: Apache-2.0
"""The demo's claims: each is told when it is not met. `make demo` itself measures them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))
from run import unmet_claims

from deltaweave.evaluation import Candidate, Comparison, TaskScore, TextScore

# (solved of 100, KL) as the demo finds them
FOUND = {
    "base": (0, 3.0),
    "fine-tune": (97, 0.0),
    "optimal": (97, 0.001),
    "delta-come": (96, 0.0025),
    "round-to-nearest": (96, 0.007),
    "low-rank": (44, 0.2),
    "bitdelta": (85, 0.016),
}


def comparison(**changes):
    rows = [
        Candidate(name, "", 1, 1, 1 / 16, 1 / 15, TextScore(100, 5.0, kl, 0.0, 0.9, 0.1), TaskScore(solved, 100), ())
        for name, (solved, kl) in {**FOUND, **changes}.items()
    ]
    return Comparison("a base", "a fine-tune", (), tuple(rows))


def test_what_the_demo_finds_meets_its_claims():
    assert unmet_claims(comparison()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": (5, 3.0)}, "the base solves 5.0 %, expected less than 5 %"),
        ({"delta-come": (90, 0.0025)}, "Delta-CoMe kept 92.8 % of the fine-tune's gain, expected 95 %"),
        ({"low-rank": (88, 0.2)}, "Delta-CoMe 0.960 is not 10 points ahead of low-rank 0.880"),
        ({"bitdelta": (96, 0.016)}, "Delta-CoMe 0.960 is not ahead of BitDelta 0.960"),
        ({"optimal": (97, 0.0024)}, "optimal's KL 0.00240 is not below Delta-CoMe's 0.00250"),
    ],
)
def test_every_claim_can_fail(changes, message):
    assert unmet_claims(comparison(**changes)) == [message]
