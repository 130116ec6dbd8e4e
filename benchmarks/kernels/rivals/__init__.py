# SPDX-License-Identifier: Apache-2.0
"""The contenders of the kernel comparison, what they are measured on, and the report. `compare.py` is the command."""
