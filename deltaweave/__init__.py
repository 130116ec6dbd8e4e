# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision deltas of fine-tuned language models."""
