# SPDX-License-Identifier: Apache-2.0
"""The command line: what works, and that whatever goes wrong is one line and exit status 2."""

import errno
import importlib
import inspect
import json
import shutil
import subprocess
import sys

import pytest
from deltaweave.converter import DEFAULT_RECIPE, CompressionOptions
from deltaweave.formats import Delta
from helpers import perturbed, tiny_checkpoint
from safetensors import SafetensorError

import deltaweave.cli.compress as compress_cli
from deltaweave import __version__
from deltaweave.cli import main
from deltaweave.cli.app import COMMANDS as LISTED

# The packages export functions under these modules' names.
compress_module = importlib.import_module("deltaweave.converter.compress")
layers_module = importlib.import_module("deltaweave.converter.layers")
apply_module = importlib.import_module("deltaweave.converter.apply")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, tuned, delta) made once by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_checkpoint(folder / "base")
    tuned = perturbed(base, folder / "tuned")
    delta = folder / "d.safetensors"
    assert run("compress", *pair(base, tuned), "-o", delta, *QUICK) == 0
    return base, tuned, delta


QUICK = ("--recipe", "triple", "--ratio", "3/4", "--calibration", "none")


def pair(base, tuned):
    return "--base", base, "--tuned", tuned


def run(*words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code


def refused(capsys, *words):
    """Runs a command that must fail; returns its one line."""
    capsys.readouterr()
    assert run(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def failed(capsys, *words):
    """The same for a command that fails at work: bars of its progress stand before the one line."""
    capsys.readouterr()
    assert run(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in captured.err
    return lines[-1]


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("name", [name for name in LISTED if name != "gate"])
def test_listed_as_it_says_of_itself(name):
    command = getattr(importlib.import_module(f"deltaweave.cli.{name}"), f"{name}_command")
    assert " ".join(inspect.getdoc(command).split("\n\n")[0].split()) == LISTED[name]


def test_gate_is_listed_as_it_says_of_itself():
    assert importlib.import_module("deltaweave.cli.gate").gate_app.info.help == LISTED["gate"]


def test_help_and_inspect_are_quick(made):
    """Nothing that takes seconds to import is imported to list commands, to miss one, or to read a file's header."""
    code = "import sys; from deltaweave.cli import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(sys.modules))"
    for words, status, told in (
        (["--help"], 0, "compress"),
        (["frobnicate"], 2, "frobnicate"),
        ([], 2, "compress"),
        (["inspect", str(made[2]), "--json"], 0, "alpha"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        assert "'torch'" not in done.stdout and "'transformers'" not in done.stdout
        assert told in done.stdout + done.stderr


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"deltaweave {__version__}\n"
    for command in ("compress", "inspect", "verify", "apply", "generate", "compare"):
        assert run(command, "--help") == 0
        assert "Example" in capsys.readouterr().out


def test_bits_are_chosen_under_one_budget_unless_another_recipe_is_asked_for(made, tmp_path):
    delta = tmp_path / "d.safetensors"
    assert run("compress", *pair(*made[:2]), "-o", delta, "--ratio", "3/4", "--calibration", "none") == 0
    with Delta.open(delta) as opened:
        assert opened.header.method["recipe"]["name"] == CompressionOptions().recipe.name == DEFAULT_RECIPE == "optimal"


def test_inspect_json_has_the_bytes_that_are_there(made, capsys):
    assert run("inspect", made[2], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"]["file"] == made[2].stat().st_size
    projections = [record for record in found["records"] if record["kind"] == "factored"]
    assert len(projections) == 14
    assert sum(record["bytes"] for record in projections) == found["bytes"]["projections"]
    assert all(0 < record["alpha"] < record["ratio"] <= 0.75 for record in projections)


def test_verify_passes_and_says_what_it_looked_at(made, capsys):
    assert run("verify", made[2], *pair(*made[:2]), "--json") == 0
    checks = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in checks] == ["integrity", "base", "fine-tune"]
    assert all(check["passed"] for check in checks)


def test_verify_finds_a_flipped_bit(made, tmp_path, capsys):
    damaged = bytearray(made[2].read_bytes())
    damaged[-300] ^= 4
    (tmp_path / "bad.safetensors").write_bytes(damaged)
    assert run("verify", tmp_path / "bad.safetensors") == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_finds_another_fine_tune_and_another_base(made, tmp_path, capsys):
    other = perturbed(made[0], tmp_path / "other", seed=7)
    assert run("verify", made[2], *pair(made[0], other)) == 1
    assert "the file states" in capsys.readouterr().out.replace("\n", " ")
    assert run("verify", made[2], "--base", tiny_checkpoint(tmp_path / "base", seed=9)) == 1
    assert "tensors are not" in capsys.readouterr().out.replace("\n", " ")


def test_apply_writes_a_folder(made, tmp_path):
    assert run("apply", made[2], "--base", made[0], "-o", tmp_path / "dense") == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "dense").iterdir()
    }


def test_dry_run_writes_nothing(made, tmp_path, capsys):
    assert run("compress", *pair(*made[:2]), "-o", tmp_path / "d.safetensors", *QUICK, "--dry-run", "--json") == 0
    costs = json.loads(capsys.readouterr().out)
    with Delta.open(made[2]) as delta:
        assert costs["projection_bytes"] == delta.byte_count().projections
    assert costs["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_wanted_quality_is_told_try_by_try(made, tmp_path, capsys):
    words = ("--recipe", "optimal", "--max-kl", "0.05", "--calibration", "none", "--sequence-length", "64")
    delta = tmp_path / "d.safetensors"
    assert run("compress", *pair(*made[:2]), "-o", delta, *words, "--dry-run") == 0
    assert "3 tries assumed; at most 6" in capsys.readouterr().out
    assert not delta.exists()
    assert run("compress", *pair(*made[:2]), "-o", delta, *words) == 0
    said = capsys.readouterr().out
    assert "KL wanted: at most 0.05 nats a token" in said
    assert said.count("written") == 1
    assert run("compress", *pair(*made[:2]), "-o", delta, *words, "--force", "--json") == 0
    quality = json.loads(capsys.readouterr().out)["method"]["quality"]
    assert quality["chosen"]["kl"] <= quality["max_kl"] == 0.05
    assert f"{quality['chosen']['kl']:.3g} +-" in said


def test_bytes_on_the_command_line(made, tmp_path, capsys):
    words = ("--max-bytes", "60kB", "--calibration", "none", "--recipe", "optimal", "--json")
    assert run("compress", *pair(*made[:2]), "-o", tmp_path / "d.safetensors", *words) == 0
    assert 50_000 < json.loads(capsys.readouterr().out)["bytes"]["projections"] <= 60_000


def test_shrunk_bands_are_told(made, tmp_path, capsys):
    words = ("--bands", "8:8,3:32,2:*", "--ratio", "0.6", "--calibration", "none", "--dry-run")
    assert run("compress", *pair(*made[:2]), "-o", tmp_path / "d.safetensors", *words) == 0
    assert "their ranks shrink in" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bands", "9:1"), "9 bits, expected one of"),
        (("--bands", "8:x"), "'8:x' is not BITS:RANK"),
        (("--ratio", "much"), "--ratio much: expected a number"),
        (("--ratio", "0"), "ratio: Input should be greater than 0"),
        (("--ratio", "1/100000"), "have a budget of"),
        (("--ratio", "1/100000", "--recipe", "triple"), "has a budget of"),
        (("--ratio", "1/4", "--max-kl", "0.1"), "ratio and max_kl are budgets of one thing"),
        (("--max-bytes", "lots"), "'lots' is no size"),
        (("--max-bytes", "9GB"), "max_bytes 9000000000: the projections take"),
        (("--max-kl", "-1"), "max_kl: Input should be greater than 0"),
        (("--max-kl", "0.1", "--bands", "16:full"), "leave nothing to it"),
        (("--held-out", "mine.txt"), "is measured on only where the recipe has a max_kl"),
        (("--max-kl", "0.1", "--held-out", "gone.txt"), "gone.txt: not readable"),
        (("--recipe", "bitdelta", "--max-kl", "0.1"), "--max-kl 0.1: bitdelta has one size"),
        (("--recipe", "bitdelta", "--ratio", "1/4"), "--ratio 1/4: bitdelta has one size"),
        (("--recipe", "quadruple"), "low-rank, bitdelta or a YAML file"),
        (("--recipe", "gone.yaml"), "gone.yaml: not readable"),
        (("--calibration", "gone.txt", "--ratio", "3/4"), "gone.txt: not readable"),
        (("--samples", "0"), "--samples"),
        (("--nonsense",), "No such option: --nonsense"),
        (("--embeddings", "tiny"), "--embeddings"),
    ],
)
def test_bad_options(made, tmp_path, capsys, options, message):
    assert message in refused(capsys, "compress", *pair(*made[:2]), "-o", tmp_path / "d.safetensors", *options)
    assert not (tmp_path / "d.safetensors").exists()


def test_missing_folder(made, tmp_path, capsys):
    line = refused(capsys, "compress", *pair(tmp_path / "gone", made[1]), "-o", tmp_path / "d.safetensors")
    assert f"{tmp_path / 'gone'}: not a folder" in line


def test_existing_output(made, capsys):
    before = made[2].read_bytes()
    assert "exists (--force replaces it)" in refused(capsys, "compress", *pair(*made[:2]), "-o", made[2], *QUICK)
    assert made[2].read_bytes() == before


def test_wrong_base(made, tmp_path, capsys):
    other = tiny_checkpoint(tmp_path / "other", seed=3)
    line = refused(capsys, "apply", made[2], "--base", other, "-o", tmp_path / "dense")
    assert "is not the base that" in line
    assert not (tmp_path / "dense").exists()


def test_unsupported_architecture(made, tmp_path, capsys):
    shutil.copytree(made[1], tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    line = refused(capsys, "compress", *pair(made[0], tmp_path / "tuned"), "-o", tmp_path / "d.safetensors")
    assert "architecture 'gpt2' is not supported" in line


def test_damaged_delta(made, tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(made[2].read_bytes()[:-1])
    assert "cut.safetensors" in refused(capsys, "inspect", tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/file"), "/disk/file: no space left"),
        (MemoryError(), "out of memory"),
    ],
)
def test_interruptions_are_one_line(made, tmp_path, capsys, monkeypatch, failure, message):
    monkeypatch.setattr(compress_cli, "compress", raising(failure))
    assert message in refused(capsys, "compress", *pair(*made[:2]), "-o", tmp_path / "d.safetensors", *QUICK)


@pytest.mark.parametrize("at", [1, 3, 8])
def test_ctrl_c_at_work_leaves_no_output_and_is_resumed(made, tmp_path, capsys, monkeypatch, at):
    original, calls = layers_module.compress_stage, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(layers_module, "compress_stage", interrupted)
    out = tmp_path / "d.safetensors"
    words = ("compress", *pair(*made[:2]), "-o", out, *QUICK)
    assert failed(capsys, *words).startswith("error: interrupted; finished layers are kept")
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors.partial"]
    assert run(*words) == 0
    assert out.read_bytes() == made[2].read_bytes()
    assert not (tmp_path / "d.safetensors.partial").exists()


def test_full_disk_while_the_output_is_written(made, tmp_path, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("deltaweave.formats.container.os.fsync", raising(full))
    words = ("compress", *pair(*made[:2]), "-o", tmp_path / "d.safetensors", *QUICK)
    assert failed(capsys, *words).endswith("cannot be written (No space left on device)")
    assert not (tmp_path / "d.safetensors").exists()
    monkeypatch.undo()
    assert run(*words) == 0


def test_full_disk_while_the_card_is_written(made, tmp_path, capsys, monkeypatch):
    """The delta is whole by then; the card is there or not, never cut."""
    full = OSError(errno.ENOSPC, "No space left on device")
    original = compress_module.package.__globals__["write_card"]

    def write_card(*arguments):
        monkeypatch.setattr("deltaweave.formats.container.os.fsync", raising(full))
        original(*arguments)

    monkeypatch.setattr("deltaweave.converter.packaging.write_card", write_card)
    out = tmp_path / "d.safetensors"
    line = failed(capsys, "compress", *pair(*made[:2]), "-o", out, *QUICK)
    assert line == f"error: {tmp_path / 'd.md'}: cannot be written (No space left on device)"
    assert out.read_bytes() == made[2].read_bytes()
    assert not (tmp_path / "d.md").exists()


@pytest.mark.parametrize(
    ("function", "failure", "message"),
    [
        ("tuned_tensor", KeyboardInterrupt(), "error: interrupted"),
        # What safetensors makes of a full disk.
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        ("save_file", OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_apply_that_fails_at_work_leaves_nothing(made, tmp_path, capsys, monkeypatch, function, failure, message):
    monkeypatch.setattr(apply_module, function, raising(failure))
    assert message in failed(capsys, "apply", made[2], "--base", made[0], "-o", tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


def test_apply_keeps_an_existing_folder(made, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(capsys, "apply", made[2], "--base", made[0], "-o", tmp_path)
    assert line == f"error: {tmp_path}: exists (--force replaces it)"
    assert (tmp_path / "notes.txt").read_text() == "mine"


COMMANDS = {
    "inspect": (),
    "verify": (),
    "apply": ("--base", "BASE", "-o", "OUT"),
    "generate": ("--base", "BASE", "--prompt", "dog"),
    "compare": ("--base", "BASE", "--tuned", "TUNED"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "header", "checkpoint"])
def test_every_command_names_a_delta_that_is_none(made, tmp_path, capsys, command, damage):
    whole, bad = made[2].read_bytes(), tmp_path / "bad.safetensors"
    content = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"this is no delta, whatever its name says " * 9,
        "header": whole[:8] + b"[" + whole[9:],
        "checkpoint": (made[0] / "model.safetensors").read_bytes(),
    }
    if damage != "missing":
        bad.write_bytes(content[damage])
    places = {"BASE": made[0], "TUNED": made[1], "OUT": tmp_path / "out"}
    assert "bad.safetensors" in failed(capsys, command, bad, *(places.get(word, word) for word in COMMANDS[command]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train",), "No such command 'train'"),
        (("compress", "--base", "b", "--tuned", "t"), "--output"),
        (("apply", "d.safetensors", "-o", "out"), "--base"),
        (("inspect",), "'delta'"),
        (
            ("generate", "d.safetensors", "--base", "b", "--prompt", "x", "--max-new-tokens", "many"),
            "'--max-new-tokens'",
        ),
    ],
)
def test_what_is_wrong_with_a_command_is_named(capsys, words, message):
    assert message in refused(capsys, *words)


def test_a_dry_run_makes_no_folder(made, tmp_path, capsys):
    words = ("--ratio", "3/4", "--samples", "4", "--sequence-length", "32", "--dry-run")
    assert run("compress", *pair(*made[:2]), "-o", tmp_path / "new" / "d.safetensors", *words) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_trace(made, capsys):
    assert run("compress", *pair(*made[:2]), "-o", made[2], *QUICK, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
