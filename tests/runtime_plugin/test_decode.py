# SPDX-License-Identifier: Apache-2.0
"""`Decoder`: texts of a mixed batch are those that each fine-tune writes alone, whoever comes and goes beside them."""

import pytest
import torch
from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.library import ArenaFullError
from deltaweave.runtime_plugin.pytorch import ArenaError, Decoder, Request, Sampling, attach, decode
from deltaweave.runtime_plugin.pytorch.sampling import choose
from deltaweave.runtime_plugin.requests import Chooser
from family import Family
from helpers import FAMILIES

pytestmark = pytest.mark.usefixtures("native")
TENANTS = ["one", None, "two", "three", "one", "three", None]
PROMPTS = [list(range(3, 3 + length)) for length in (5, 17, 9, 30, 2, 8, 40)]


def make(folder, family="llama", **settings):
    made = Family.make(folder, family, **settings)
    for seed, name in enumerate(("one", "two", "three")):
        made.add(name, seed=seed, added_tokens=seed)
    return made


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make(tmp_path_factory.mktemp("family"))


def write(family, requests, *, arena=None, max_batch=4, listen=None):
    with (
        attach(family.model, arena or family.arena()) as attachment,
        Decoder(family.model, attachment, max_batch=max_batch, max_length=64) as decoder,
    ):
        return decoder.run(requests, listen)


def requests(count=10, **settings):
    return [Request(prompt, tenant, count, **settings) for prompt, tenant in zip(PROMPTS, TENANTS, strict=True)]


def texts(completions):
    return [completion.tokens for completion in completions]


def alone(family, count=10):
    return [family.greedy(tenant, prompt, count) for prompt, tenant in zip(PROMPTS, TENANTS, strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_written_alone(tmp_path, name):
    family = make(tmp_path, name, tied=name == "qwen2")
    expected = alone(family)
    found = write(family, requests())
    assert texts(found) == expected
    assert {completion.finish_reason for completion in found} == {"length"}
    assert expected[0] != family.greedy(None, PROMPTS[0], 10), "the fine-tunes write something else"


@pytest.mark.parametrize("max_batch", [1, 3, 32])
def test_any_number_of_rows(family, max_batch):
    assert texts(write(family, requests(), max_batch=max_batch)) == alone(family)


@pytest.mark.parametrize("limit", [1, 7, 24])
def test_long_prompts_come_in_chunks(family, monkeypatch, limit):
    monkeypatch.setattr(decode, "MAX_TOKENS", limit)
    assert texts(write(family, requests())) == alone(family)


@pytest.mark.parametrize("window", [4, 24])
def test_sliding_windows(tmp_path, window):
    family = make(tmp_path, "mistral", config={"sliding_window": window})
    assert texts(write(family, requests())) == alone(family)


def test_layers_with_and_without_windows(tmp_path):
    config = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}
    family = make(tmp_path, "qwen3", config=config)
    assert family.model.model.has_sliding_layers
    assert texts(write(family, requests())) == alone(family)


class TestSmallArenas:
    @pytest.mark.parametrize("slots", [1, 2])
    def test_requests_wait_for_their_tenants(self, family, slots):
        arena = family.arena(slots=slots)
        assert texts(write(family, requests(), arena=arena)) == alone(family)
        assert arena.stats().open_steps == 0

    def test_a_tenant_that_cannot_come(self, family):
        arena = family.arena(slots=1)
        arena.pin("two")
        with pytest.raises(ArenaFullError, match="'one' does not fit"):
            write(family, requests(), arena=arena)


class TestEnds:
    def test_stop_tokens(self, family):
        """A row ends at its own stop tokens; the others go on."""
        expected = alone(family)
        stops = [frozenset([expected[0][4]]), frozenset(), frozenset([expected[2][0], 999])]
        asked = [Request(PROMPTS[i], TENANTS[i], 10, stop) for i, stop in enumerate(stops)]
        found = write(family, asked)
        first = expected[0].index(expected[0][4])
        assert texts(found) == [expected[0][:first], expected[1], []]
        assert [each.finish_reason for each in found] == ["stop", "length", "stop"]

    def test_lengths_of_their_own(self, family):
        asked = [Request(PROMPTS[i], TENANTS[i], 1 + i) for i in range(5)]
        assert texts(write(family, asked)) == [text[: 1 + i] for i, text in enumerate(alone(family)[:5])]

    def test_tokens_are_heard_as_they_come(self, family):
        heard = []
        found = write(family, requests(3), listen=lambda index, token: heard.append((index, token)))
        for index, completion in enumerate(found):
            assert [token for who, token in heard if who == index] == completion.tokens
        assert [index for index, _ in heard] != sorted(index for index, _ in heard), "rows advance side by side"

    def test_nothing_to_do(self, family):
        assert write(family, []) == []


class TestSampling:
    def sampled(self, family, tenants, **settings):
        asked = [
            Request(PROMPTS[0], tenant, 12, sampling=Sampling(temperature=1.5, seed=seed, **settings))
            for seed, tenant in tenants
        ]
        return texts(write(family, asked))

    def test_a_seed_gives_its_text_whatever_the_company(self, family):
        [text] = self.sampled(family, [(7, "one")])
        mixed = self.sampled(family, [(1, "two"), (7, "one"), (2, None), (8, "one"), (7, "two")])
        assert mixed[1] == text
        assert len({tuple(each) for each in mixed}) == 5

    def test_greedy_rows_beside_sampled_ones(self, family):
        asked = [*requests()[:2], Request(PROMPTS[2], "two", 10, sampling=Sampling(2.0)), *requests()[3:]]
        found = texts(write(family, asked))
        expected = alone(family)
        assert found[:2] + found[3:] == expected[:2] + expected[3:]
        assert found[2] != expected[2]

    def test_narrow_choices_are_greedy(self, family):
        greedy = family.greedy("one", PROMPTS[0], 12)
        assert self.sampled(family, [(3, "one")], top_k=1) == [greedy]
        assert self.sampled(family, [(3, "one")], top_p=1e-6) == [greedy]

    def test_a_repetition_penalty(self, family):
        asked = [
            Request(PROMPTS[0], "one", 20, sampling=Sampling(repetition_penalty=1e6)),
            Request(PROMPTS[0], "one", 20),
        ]
        penalized, plain = texts(write(family, asked))
        assert plain == family.greedy("one", PROMPTS[0], 20)
        assert len(set(penalized)) == 20 and not set(penalized) & set(PROMPTS[0])

    def test_shares_are_the_probabilities(self):
        """Of many draws; top_p cuts where the summed probability passes it, top_k where it says."""
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(4000, 1)[:, [2, 0, 3, 1]]
        for settings, expected in (
            ({}, [0.2, 0.4, 0.1, 0.3]),
            ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
            ({"top_k": 3}, [2 / 9, 4 / 9, 0, 3 / 9]),
            ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ):
            choosers = [Chooser(Sampling(1.0, seed=seed, **settings)) for seed in range(4000)]
            counts = torch.bincount(torch.tensor(choose(logits, choosers, [()] * 4000)), minlength=4) / 4000
            assert torch.allclose(counts, torch.tensor(expected), atol=0.03)

    @pytest.mark.parametrize(
        "settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}]
    )
    def test_settings_without_sense(self, settings):
        with pytest.raises(ValueError, match="expected temperature >= 0"):
            Sampling(**settings)


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "error", "message"),
        [
            (Request([], "one"), DeltaweaveError, "request 1: expected at least one token"),
            (Request([4], "one", 0), DeltaweaveError, "request 1: expected at least one token"),
            (Request([4] * 60, "one", 5), DeltaweaveError, "request 1: 60 tokens and 5 to write, the cache holds 64"),
            (Request([4], "nobody", 5), ArenaError, "no tenant 'nobody'; there are one, three, two"),
        ],
    )
    def test_requests(self, family, request_, error, message):
        with pytest.raises(error, match=message):
            write(family, [Request([3], None, 3), request_])

    def test_other_attention(self, family):
        implementation = family.model.config._attn_implementation
        family.model.config._attn_implementation = "eager"
        try:
            with (
                attach(family.model, family.arena()) as attachment,
                pytest.raises(DeltaweaveError, match="'eager'; load"),
            ):
                Decoder(family.model, attachment)
        finally:
            family.model.config._attn_implementation = implementation
