# SPDX-License-Identifier: Apache-2.0
"""How close a candidate is to its fine-tune, measured the same way wherever it is asked."""

from deltaweave.evaluation.compare import Candidate, Comparison, compare
from deltaweave.evaluation.tasks import Task, TaskScore, complete_tokens, load_tasks, score_task
from deltaweave.evaluation.text import TextScore, TextTotals, load_text, score_text, token_slices

__all__ = [
    "Candidate",
    "Comparison",
    "Task",
    "TaskScore",
    "TextScore",
    "TextTotals",
    "compare",
    "complete_tokens",
    "load_tasks",
    "load_text",
    "score_task",
    "score_text",
    "token_slices",
]
