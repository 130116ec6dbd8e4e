# SPDX-License-Identifier: Apache-2.0
"""A verdict as JUnit XML, which CI systems show: one test case a limit."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from deltaweave.formats.container import write_atomically, write_pieces
from deltaweave.validation.validate import Validation

__all__ = ["write_junit"]

# What XML 1.0 cannot hold, in names that come from files.
CONTROL = {code: None for code in range(32) if code not in (9, 10, 13)}


def write_junit(path: str | Path, validation: Validation) -> Path:
    """Writes the file: whole, or not at all; an older one is replaced.

    Raises:
        DeltaweaveError: it cannot be written.
    """
    path = Path(path)
    name = f"validation of {validation.subject}".translate(CONTROL)
    counts = {"tests": str(len(validation.checks)), "failures": str(len(validation.broken)), "errors": "0"}
    suites = ElementTree.Element("testsuites", {"name": "deltaweave", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": name, **counts})
    for check in validation.checks:
        label = f"{check.metric} {check.sign} {check.limit:g}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"{name}.{check.reference}", "name": label})
        if not check.passed:
            ElementTree.SubElement(case, "failure", {"message": str(check), "type": "threshold"})
    content = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda write: write_pieces(write, [content], []))
    return path
