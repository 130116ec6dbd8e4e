# SPDX-License-Identifier: Apache-2.0
"""Token-level gates over LoRAs and deltas of one base: training, baselines, and a look inside."""
