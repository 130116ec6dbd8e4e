# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments of `deltaweave compress`, then the same command again: the same bytes in the end."""

import hashlib
import os
import random
import subprocess
import sys
import time

import pytest
from helpers import perturbed, tiny_checkpoint

KILLS = 4
# Libraries do not promise the same bits of two threads' sums from run to run; resuming is what is tested here.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def parts(folder):
    """Finished parts in the folder of an unfinished compression."""
    return len(list(folder.glob("layer-*.safetensors")))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_digest(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", layers=6, hidden=192)
    tuned = perturbed(base, tmp_path / "tuned")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789. " * 200)

    def command(output):
        options = ["--calibration", str(tmp_path / "text.txt"), "--samples", "64", "--sequence-length", "128"]
        pair = ["--base", str(base), "--tuned", str(tuned), "--ratio", "1/4", "-o", str(output)]
        return [sys.executable, "-m", "deltaweave", "compress", *pair, *options]

    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    unfinished = tmp_path / "broken.safetensors.partial"
    subprocess.run(command(whole), check=True, capture_output=True, env=ENVIRONMENT)

    moments, killed_inside = random.Random(0), 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            command(broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        # A layer is finished every few tenths of a second: the kills fall at random places of the next one or two.
        wait_for(lambda process=process, kill=kill: parts(unfinished) > kill or process.poll() is not None)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.wait()
        killed_inside += unfinished.exists()
    assert killed_inside >= 2
    subprocess.run([*command(broken), "--force"], check=True, capture_output=True, env=ENVIRONMENT)
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (whole, broken)}
    assert len(digests) == 1
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*.tmp*"))
