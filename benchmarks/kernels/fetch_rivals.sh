#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fetches the rivals' packages for Python 3.12 on x86-64 into a folder (default .rivals/packages, which git must ignore).
# Of vLLM's wheel only the LoRA kernels are kept. usage: fetch_rivals.sh [FOLDER]
set -euo pipefail
folder=${1:-.rivals/packages}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
platforms=(--implementation cp --abi cp312 --abi abi3 --abi none)
for tag in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
mkdir -p "$folder"/{vllm,humming,gemlite}
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" \
  -d "$work" vllm==0.21.0 humming-kernels==0.1.19
unzip -qo "$work"/vllm-*.whl 'vllm/lora/ops/triton_ops/*' 'vllm-*.dist-info/METADATA' -d "$folder/vllm"
unzip -qo "$work"/humming_kernels-*.whl -d "$folder/humming"
python3 -m pip wheel -q --no-deps --wheel-dir "$work" gemlite==0.6.0.post2
unzip -qo "$work"/gemlite-*.whl -d "$folder/gemlite"
