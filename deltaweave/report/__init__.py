# SPDX-License-Identifier: Apache-2.0
"""A comparison as one self-contained HTML page, and its plots as PNG files."""

from deltaweave.report.page import save_plots, write_report

__all__ = ["save_plots", "write_report"]
