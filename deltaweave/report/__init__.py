# SPDX-License-Identifier: Apache-2.0
"""A comparison as one self-contained HTML page, and its plots as PNG files."""

from deltaweave.report.page import require_absent, save_plots, write_report

__all__ = ["require_absent", "save_plots", "write_report"]
