# SPDX-License-Identifier: Apache-2.0
"""The demo's table over three seeds: is what `make demo` shows luck? Slow on two cores (five minutes a seed).

python benchmarks/demo_seeds.py --seeds 0 1 2 --output benchmarks/results/demo_seeds.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
from pair import make_pair
from results_file import circumstances, write_result
from run import compare_methods, compress_all, unmet_claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs = [run(seed) for seed in arguments.seeds]
    result = {
        **circumstances("cpu"),
        "runs": runs,
        "mean": summary(runs),
    }
    print(json.dumps(result["mean"], indent=2))
    write_result(arguments.output, result)
    sys.exit(1 if any(run["unmet_claims"] for run in runs) else 0)


def run(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        pair = make_pair(Path(folder) / "pair", seed)
        comparison = compare_methods(pair, list(compress_all(pair, Path(folder) / "deltas").values()))
    rows = {}
    for row in comparison.candidates:
        assert row.task is not None
        assert row.text is not None
        rows[row.name] = {
            "accuracy": row.task.accuracy,
            "kl": row.text.kl,
            "perplexity": row.text.perplexity,
            "projection_bytes": row.projection_bytes,
            "gain_kept": comparison.gain_kept(row),
        }
    return {"seed": seed, "rows": rows, "unmet_claims": unmet_claims(comparison)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range of accuracy and KL of each method."""
    found = {}
    for name in runs[0]["rows"]:
        accuracies = [run["rows"][name]["accuracy"] for run in runs]
        divergences = [run["rows"][name]["kl"] for run in runs]
        found[name] = {
            "accuracy": round(statistics.mean(accuracies), 4),
            "accuracy_range": [round(min(accuracies), 4), round(max(accuracies), 4)],
            "kl": round(statistics.mean(divergences), 5),
        }
    return found


if __name__ == "__main__":
    main()
