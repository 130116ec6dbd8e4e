# SPDX-License-Identifier: Apache-2.0
"""The TensorRT host: engines of a base model whose fine-tunes come and go while they run."""
