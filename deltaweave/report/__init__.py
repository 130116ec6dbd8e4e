# SPDX-License-Identifier: Apache-2.0
"""Comparisons and validations as self-contained HTML pages, and their plots as PNG files."""

from deltaweave.report.page import save_plots, write_report
from deltaweave.report.render import require_absent
from deltaweave.report.validation import validation_plots, write_validation

__all__ = ["require_absent", "save_plots", "validation_plots", "write_report", "write_validation"]
