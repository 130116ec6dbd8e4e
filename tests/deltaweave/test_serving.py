# SPDX-License-Identifier: Apache-2.0
"""`generate_batch` and the command: each prompt is read and continued as its own fine-tune does it alone."""

import json

import pytest
import torch
from deltaweave.converter import Checkpoint, CheckpointError
from deltaweave.formats import DeltaweaveError, write_fusion
from deltaweave.runtime_plugin.pytorch import attach
from family import finetune
from fusions import make_fusion
from helpers import tiny_checkpoint
from typer.testing import CliRunner

from deltaweave import Prompt, generate, generate_batch
from deltaweave.cli.app import application
from deltaweave.models import load_checkpoint, load_tokenizer

pytestmark = pytest.mark.usefixtures("native")
TEMPLATE = "?{{ messages[0]['content'] }}!{% if add_generation_prompt %}<added0>{% endif %}"


def carrying(settings=None, template=None):
    """An edit of a tuned folder: its own generation settings and chat template."""

    def edit(folder):
        settled = {"do_sample": False, "eos_token_id": 1, **(settings or {})}
        (folder / "generation_config.json").write_text(json.dumps(settled))
        if template:
            (folder / "chat_template.jinja").write_text(template)

    return edit


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def tenants(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    edits = {
        "plain": {"edit": carrying()},
        "chatty": {"edit": carrying(template=TEMPLATE), "added_tokens": 2, "seed": 2},
        "wild": {"edit": carrying({"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.9}), "seed": 3},
        "fresh": {"edit": carrying({"repetition_penalty": 50.0}), "seed": 4},
    }
    for name in edits:
        (folder / name).mkdir()
    return {name: finetune(base, folder / name, **changes) for name, changes in edits.items()}


def texts(results):
    return [result.text for result in results]


def test_each_text_is_the_one_written_alone(base, tenants):
    prompts = [Prompt("the dog", "plain"), Prompt("a cat", "chatty"), Prompt("the dog", "fresh"), Prompt("b", "plain")]
    found = generate_batch(base, tenants, prompts, max_new_tokens=12, max_batch=3)
    expected = [generate(base, tenants[each.tenant], each.text, max_new_tokens=12) for each in prompts]
    assert texts(found) == expected
    assert [(each.tenant, each.prompt) for each in found] == [(each.tenant, each.text) for each in prompts]


def test_the_base_writes_too(base, tenants):
    found = generate_batch(base, tenants, [Prompt("the dog"), Prompt("the dog", "plain")], max_new_tokens=12)
    model, tokenizer = load_checkpoint(base), load_tokenizer(base)
    ids = tokenizer("the dog", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert found[0].text != found[1].text


def test_chat_templates_are_the_tenants_own(base, tenants):
    [found] = generate_batch(base, tenants, [Prompt("dog", "chatty")], max_new_tokens=8, chat=True)
    assert found.text == generate(base, tenants["chatty"], "dog", chat=True, max_new_tokens=8)
    with pytest.raises(DeltaweaveError, match="no chat template"):
        generate_batch(base, tenants, [Prompt("dog", "plain")], chat=True)


def test_stop_tokens_are_the_tenants_own(base, tenants, tmp_path):
    """A fine-tune that ends at every letter it writes first."""
    [longer] = generate_batch(base, tenants, [Prompt("the dog", "plain")], max_new_tokens=12)
    stop = load_tokenizer(base)(longer.text)["input_ids"][3]
    short = finetune(base, tmp_path, edit=carrying({"eos_token_id": [1, stop]}))
    both = {**tenants, "short": short}
    found = generate_batch(base, both, [Prompt("the dog", "plain"), Prompt("the dog", "short")], max_new_tokens=12)
    assert longer.text.startswith(found[1].text) and found[1].tokens <= 3
    assert [each.finish_reason for each in found][1] == "stop"
    assert found[0] == longer


def test_sampling_follows_the_tenant_and_the_seed(base, tenants):
    def wild(seed, beside=()):
        prompts = [*beside, Prompt("dog", "wild", seed=seed)]
        return generate_batch(base, tenants, prompts, max_new_tokens=12)[-1].text

    assert wild(1) == wild(1, [Prompt("cat", "plain"), Prompt("dog", "wild", seed=4)]) != wild(2)
    greedy = Prompt("dog", "wild", temperature=0)
    [found] = generate_batch(base, tenants, [greedy], max_new_tokens=12)
    assert found.text == generate(base, tenants["wild"], "dog", temperature=0, max_new_tokens=12)


def test_pieces_come_as_they_are_written(base, tenants):
    pieces = {0: [], 1: []}
    prompts = [Prompt("the dog", "plain"), Prompt("a cat", "chatty")]
    found = generate_batch(
        base, tenants, prompts, max_new_tokens=30, write=lambda index, piece: pieces[index].append(piece)
    )
    assert ["".join(pieces[index]) for index in pieces] == texts(found)


def test_an_arena_for_one_tenant_at_a_time(base, tenants):
    prompts = [Prompt("the dog", "plain"), Prompt("a cat", "chatty"), Prompt("the dog", "fresh")]
    roomy = generate_batch(base, tenants, prompts, max_new_tokens=6)
    assert generate_batch(base, tenants, prompts, max_new_tokens=6, arena_bytes=200_000) == roomy


class TestRefusals:
    def test_an_unknown_tenant(self, base, tenants):
        with pytest.raises(DeltaweaveError, match="no tenant 'nobody'; there are chatty, fresh, plain, wild"):
            generate_batch(base, tenants, [Prompt("dog", "nobody")])

    def test_another_base(self, tenants, tmp_path):
        other = tiny_checkpoint(tmp_path / "other", dtype=torch.float32, seed=3)
        with pytest.raises(CheckpointError, match="is not the base"):
            generate_batch(other, tenants, [Prompt("dog", "plain")])

    def test_an_empty_prompt(self, base, tenants):
        with pytest.raises(DeltaweaveError, match="prompt holds no tokens"):
            generate_batch(base, tenants, [Prompt("", "plain")])

    def test_settings_that_batches_do_not_follow(self, base, tmp_path):
        path = finetune(base, tmp_path, edit=carrying({"num_beams": 4}))
        with pytest.raises(DeltaweaveError, match="tenant beams: its generation setting num_beams = 4 is not followed"):
            generate_batch(base, {"beams": path}, [Prompt("dog", "beams")])


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(application(), ["generate", *map(str, arguments)])

    def test_json(self, base, tenants):
        result = self.run(
            *("--base", base, "--tenant", f"a={tenants['plain']}", "--tenant", f"b={tenants['fresh']}"),
            *("--prompt", "b=the dog", "--prompt", "base=x=y", "--prompt", "a=the dog"),
            *("--max-new-tokens", 8, "--json"),
        )
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert [each["tenant"] for each in found] == ["b", None, "a"]
        assert found[1]["prompt"] == "x=y"
        assert found[0]["text"] == generate(base, tenants["fresh"], "the dog", max_new_tokens=8)
        assert set(found[0]) == {"tenant", "prompt", "text", "tokens", "finish_reason"}

    def test_text(self, base, tenants):
        result = self.run("--base", base, "--tenant", f"a={tenants['plain']}", "--prompt", "a=the dog")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("[a] the dog\n")

    def test_one_delta_as_json(self, base, tenants):
        result = self.run(tenants["plain"], "--base", base, "--prompt", "dog", "--max-new-tokens", 4, "--json")
        assert json.loads(result.stdout) == {
            "prompt": "dog",
            "text": generate(base, tenants["plain"], "dog", max_new_tokens=4),
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--prompt", "x"], "give a delta file, or --tenant"),
            (["d.safetensors", "--tenant", "a=b", "--prompt", "x"], "give a delta file, or --tenant"),
            (["d.safetensors", "--prompt", "x", "--prompt", "y"], "2 times --prompt"),
            (["--tenant", "a", "--prompt", "a=x"], "--tenant 'a': expected NAME="),
            (["--tenant", "a=b", "--tenant", "a=c", "--prompt", "a=x"], "'a' is b already"),
            (["--engine", "e", "--tenant", "a=b", "--prompt", "a=x"], "give --base or --engine"),
            (["--tenant", "a=b", "--prompt", "c=x"], "no --tenant 'c'"),
            (["--tenant", "a=b", "--prompt", "x"], "expected NAME="),
        ],
    )
    def test_wrong_options(self, arguments, message):
        result = self.run("--base", "b", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())


def test_fusions_beside_fine_tunes(base, tenants, tmp_path, capsys):
    """A fusion reads and writes as the base does, with its own weights; another base is refused."""
    fusion = make_fusion(count=2, base=Checkpoint.open(base).identity())
    path = write_fusion(tmp_path / "fusion.safetensors", fusion)
    prompts = [Prompt("the dog", "mix"), Prompt("a cat", "plain"), Prompt("the dog")]
    found = texts(generate_batch(base, {"mix": path, "plain": tenants["plain"]}, prompts, max_new_tokens=12))
    model, tokenizer = load_checkpoint(base), load_tokenizer(base)
    ids = torch.tensor([tokenizer.encode("the dog")])
    with attach(model, fusion):
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert found[0] == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert found[1] == generate(base, tenants["plain"], "a cat", max_new_tokens=12)
    assert found[0] != found[2]
    words = ["generate", "--base", base, "--tenant", f"mix={path}", "--prompt", "mix=the dog", "--max-new-tokens", 12]
    shown = CliRunner().invoke(application(), [*map(str, words), "--json"])
    assert json.loads(shown.output)[0]["text"] == found[0]
    other = write_fusion(tmp_path / "other.safetensors", make_fusion(count=2))
    with pytest.raises(CheckpointError, match="is not the base that"):
        generate_batch(base, {"mix": other}, prompts[:1])
