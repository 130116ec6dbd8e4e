# SPDX-License-Identifier: Apache-2.0
"""The command line: `deltaweave COMMAND`, one file per command."""

from deltaweave.cli.app import main

__all__ = ["main"]
