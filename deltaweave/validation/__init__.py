# SPDX-License-Identifier: Apache-2.0
"""Whether what is deployed still is the fine-tune: measured on prompts, held against thresholds."""

from deltaweave.validation.junit import write_junit
from deltaweave.validation.measure import Measurement, PromptScore, measure
from deltaweave.validation.prompts import Prompt, load_prompts
from deltaweave.validation.subject import EngineSubject, ModelSubject, Outputs, Subject
from deltaweave.validation.thresholds import METRICS, Check, Limits, Metric, Thresholds
from deltaweave.validation.validate import Validation, validate, validate_subject

__all__ = [
    "METRICS",
    "Check",
    "EngineSubject",
    "Limits",
    "Measurement",
    "Metric",
    "ModelSubject",
    "Outputs",
    "Prompt",
    "PromptScore",
    "Subject",
    "Thresholds",
    "Validation",
    "load_prompts",
    "measure",
    "validate",
    "validate_subject",
    "write_junit",
]
