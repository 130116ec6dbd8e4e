# SPDX-License-Identifier: Apache-2.0
"""The training of gates: its forward against the runtime's, its gradients, its schedule, and resuming to the bit."""

import math

import numpy as np
import pytest
import torch
from deltaweave.converter import ResumeError
from deltaweave.formats.fusion import FixedGate
from deltaweave.runtime_plugin.pytorch.fusion import attach_fusion
from fusions import SHAPES, make_fusion, make_lora
from helpers import FAMILIES, tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import deltaweave.gates.training as training
from deltaweave.gates.examples import Example, ExampleSet, collate
from deltaweave.gates.experts import GateError
from deltaweave.gates.mixture import FixedWeights, TokenWeights, attach_mixture, weigher_of
from deltaweave.gates.training import GateRecipe, answer_loss, evaluate_loss, train_gates
from deltaweave.models import load_checkpoint

TOKENS = 3 + torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("gates") / "base", dtype=torch.float32)


@pytest.fixture
def model(base):
    return load_checkpoint(base)


def two_loras(seed=0):
    generator = np.random.default_rng(seed)
    return [make_lora(generator, 2, name="german"), make_lora(generator, 3, list(SHAPES)[:5], name="maths")]


def example_set(count=12, seed=0):
    generator = np.random.default_rng(seed)
    examples = tuple(
        Example(
            tuple(map(int, generator.integers(3, 40, 4 + index % 3))), tuple(map(int, generator.integers(3, 40, 3)))
        )
        for index in range(count)
    )
    return ExampleSet("drawn", "0" * 64, examples)


def trained(model, recipe=None, **options):
    return train_gates(model, two_loras(), example_set(), recipe or GateRecipe(epochs=2), **options)


@pytest.mark.parametrize("gate", [None, FixedGate((0.3, -0.7, 1.2))])
def test_forward_is_the_reference_ops(model, gate):
    fusion = make_fusion(gate=gate)
    with torch.no_grad():
        with attach_fusion(model, fusion, accept_base=True):
            expected = model(TOKENS).logits
        with attach_mixture(model, fusion.loras, weigher_of(fusion.gate)):
            found = model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_detaching_restores_the_base(model):
    before = model(TOKENS).logits
    mixture = attach_mixture(model, two_loras(), FixedWeights([1.0, 1.0]))
    assert not torch.equal(model(TOKENS).logits, before)
    with pytest.raises(GateError, match="already"):
        attach_mixture(model, two_loras(), FixedWeights([1.0, 1.0]))
    mixture.detach()
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_training_starts_with_the_task_alone(count):
    weights = TokenWeights.starting(2, count, 64, task=1)
    found = weights(0, torch.randn(3, 7, 64))
    expected = torch.zeros(3, 7, count)
    expected[..., 1] = 1
    torch.testing.assert_close(found, expected)


class Norm64(torch.nn.Module):
    """RMSNorm in the input's dtype; Transformers' computes in float32 whatever the input's is."""

    def __init__(self, weight, epsilon):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def test_gradients_match_finite_differences(base):
    """Central differences in float64, through softmax, bias, rank space and both blocks; temperature not 1."""
    model = load_checkpoint(base, torch.float64)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if name.endswith("norm"):
                setattr(module, name, Norm64(child.weight, child.variance_epsilon))
    generator = torch.Generator().manual_seed(1)
    weights = TokenWeights(
        0.1 * torch.randn(2, 2, 64, generator=generator, dtype=torch.float64),
        torch.randn(2, 2, generator=generator, dtype=torch.float64),
        temperature=1.3,
    )
    batch = collate(example_set(3).examples, 0)
    with attach_mixture(model, two_loras(), weights):
        answer_loss(model, batch).backward()
        for parameter in weights.parameters():
            flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
            for index in torch.randperm(len(flat), generator=generator)[:12].tolist():
                kept, losses = flat[index].item(), []
                for step in (1e-5, -1e-5):
                    flat[index] = kept + step
                    with torch.no_grad():
                        losses.append(answer_loss(model, batch).item())
                flat[index] = kept
                assert gradient[index].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=2e-5, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_gates_are_trained(tmp_path, family):
    model = load_checkpoint(tiny_checkpoint(tmp_path / "base", family))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = trained(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(dict(result.weights.named_parameters())) == {"weight", "bias"}
    assert result.weights.weight.abs().max() > 0
    assert not torch.equal(result.weights.bias, TokenWeights.starting(2, 2, 64, 1).bias)


def test_training_lowers_the_loss(model):
    examples = example_set()
    result = train_gates(model, two_loras(), examples, GateRecipe(epochs=12, learning_rate=0.03), dev=examples)
    assert result.dev_losses[-1] < result.dev_losses[0] - 0.05


def test_schedule_is_the_recipes(model):
    """Linear over 20 % of the steps, then half a cosine to zero."""
    result = trained(model, GateRecipe(epochs=5, batch_size=3))
    steps, warm = 20, 4
    for step, rate in enumerate(result.rates):
        share = step / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
        assert rate == pytest.approx(1e-3 * share, abs=1e-12)
    assert len(result.rates) == steps


def test_learning_rate_follows_the_batch():
    assert GateRecipe().peak_rate == 1e-3
    assert GateRecipe(batch_size=16).peak_rate == 1e-4
    assert GateRecipe(batch_size=16, learning_rate=5e-3).peak_rate == 5e-3


def test_one_step_is_adamws(model):
    """The first step that moves, by the formula: clipped gradient, moments, decay."""
    recipe = GateRecipe(epochs=1, batch_size=12, warmup=0.0, learning_rate=0.01, clip=1e-3)
    weights = TokenWeights.starting(2, 2, 64, 1)
    with attach_mixture(model, two_loras(), weights):
        answer_loss(model, collate(example_set().examples, 0)).backward()
    gradients = [parameter.grad.double() for parameter in weights.parameters()]
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    result = trained(model, recipe)
    for before, gradient, after in zip(weights.parameters(), gradients, result.weights.parameters(), strict=True):
        clipped = gradient * 1e-3 / norm
        expected = before.double() * (1 - 0.01 * 0.1) - 0.01 * clipped / (clipped.abs() + 1e-5)
        torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-6)


def test_checkpointing_changes_nothing(model):
    plain, saved = trained(model), trained(model, checkpointing=True)
    assert plain.losses == pytest.approx(saved.losses, abs=1e-6)
    torch.testing.assert_close(plain.weights.bias, saved.weights.bias)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_run_is_the_unbroken_one(model, tmp_path, monkeypatch, stop):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"dev": example_set(4, 9), "key": {"data": "x"}}
        whole = trained(model, **options)
        monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0.0)

        def interrupt(_, done, total):
            if done == stop:
                raise KeyboardInterrupt

        state = tmp_path / "fusion.partial"
        with pytest.raises(KeyboardInterrupt):
            trained(model, state=state, progress=interrupt, **options)
        resumed = trained(model, state=state, **options)
    finally:
        torch.set_num_threads(threads)
    assert resumed.resumed_at == stop - 1
    assert resumed.losses == whole.losses
    assert resumed.dev_losses == whole.dev_losses
    for one, other in zip(resumed.weights.parameters(), whole.weights.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_training_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0.0)
    state = tmp_path / "fusion.partial"
    trained(model, state=state, key={"data": "one"})
    with pytest.raises(ResumeError, match=r"other options \(data\).*--restart"):
        trained(model, state=state, key={"data": "two"})
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ResumeError, match="damaged"):
        trained(model, state=state, key={"data": "one"})


def test_the_best_epoch_is_kept(model):
    result = trained(model, GateRecipe(epochs=3, learning_rate=5.0), dev=example_set(4, 9))
    assert result.best_epoch == np.argmin(result.dev_losses)
    with attach_mixture(model, two_loras(), result.weights):
        assert evaluate_loss(model, example_set(4, 9).examples, 0) == pytest.approx(min(result.dev_losses), rel=1e-6)


@pytest.mark.parametrize(("losses", "best"), [([1, 2, 3], 0), ([3, 1, 2], 1), ([3, 2, 1], 2)])
def test_the_start_may_be_the_best_epoch(model, monkeypatch, losses, best):
    found = iter(losses)
    monkeypatch.setattr(training, "evaluate_loss", lambda *_: next(found))
    result = trained(model, dev=example_set(4, 9))
    assert result.best_epoch == best
    untouched = torch.equal(result.weights.weight, torch.zeros(2, 2, 64))
    assert untouched == (best == 0)


def test_loss_is_over_answers_alone(model):
    """Against transformers' own loss with labels, example by example."""
    examples = example_set(5).examples
    total = count = 0
    with torch.no_grad():
        for example in examples:
            tokens = torch.tensor([example.prompt + example.answer])
            labels = torch.tensor([[-100] * len(example.prompt) + list(example.answer)])
            total += model(tokens, labels=labels).loss.item() * len(example.answer)
            count += len(example.answer)
        found = answer_loss(model, collate(examples, 0)).item()
    assert found == pytest.approx(total / count, rel=1e-5)
    assert evaluate_loss(model, examples, 0, batch_size=2) == pytest.approx(total / count, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_collated_targets_are_the_next_answer_tokens(lengths):
    examples = [Example(tuple(range(10, 10 + prompt)), tuple(range(50, 50 + answer))) for prompt, answer in lengths]
    batch = collate(examples, 7)
    for row, example in enumerate(examples):
        whole = example.prompt + example.answer
        assert batch.tokens[row, : len(whole)].tolist() == list(whole)
        assert (batch.tokens[row, len(whole) :] == 7).all()
        assert batch.mask[row].sum() == len(whole)
        kept = batch.targets[row] != -100
        assert kept.sum() == len(example.answer)
        assert batch.targets[row][kept].tolist() == list(example.answer)
        places = kept.nonzero().flatten()
        assert batch.tokens[row][(places + 1)].tolist() == list(example.answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs 0"),
        ({"learning_rate": math.nan}, "learning_rate nan"),
        ({"temperature": -1.0}, r"temperature -1\.0"),
        ({"warmup": 1.5}, r"warmup 1\.5"),
    ],
)
def test_recipes_are_checked(options, message):
    with pytest.raises(GateError, match=message):
        GateRecipe(**options)


def test_experts_must_fit_the_model(model):
    with pytest.raises(GateError, match="at least two"):
        train_gates(model, two_loras()[:1], example_set(), GateRecipe())
    with pytest.raises(GateError, match="task expert 2 of 2"):
        trained(model, task=2)
    generator = np.random.default_rng(0)
    deep = make_lora(generator, 2)
    stray = type(deep)("stray", None, {name.replace("layers.1", "layers.7"): m for name, m in deep.modules.items()})
    with pytest.raises(GateError, match=r"layers\.7.*no such module"):
        attach_mixture(model, [deep, stray], FixedWeights([1.0, 1.0]))
    wide = {"model.layers.0.self_attn.q_proj": deep.modules["model.layers.0.mlp.up_proj"]}
    with pytest.raises(GateError, match=r"q_proj has shape \[160, 64\], the model \[64, 64\]"):
        attach_mixture(model, [type(deep)("wide", None, wide)], FixedWeights([1.0]))
    assert torch.isfinite(model(TOKENS).logits).all()


def test_a_loss_that_is_not_finite_ends_the_training(model):
    model.get_input_embeddings().weight.data[:] = math.nan
    with pytest.raises(GateError, match="step 1: the loss is nan"):
        trained(model)
