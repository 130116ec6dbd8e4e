#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From two fine-tunes on disk to an answer of each: examples/vllm_serve.sh BASE TUNED_1 TUNED_2 (needs vLLM 0.21.0, docs/vllm.md)
set -euo pipefail
base=$1 port=${PORT:-8000} folder=$(mktemp -d)
deltaweave compress --base "$base" --tuned "$2" -o "$folder/one.safetensors"
deltaweave compress --base "$base" --tuned "$3" -o "$folder/two.safetensors"
vllm serve "$base" --quantization deltaweave --enable-lora --max-loras 2 --served-model-name base --port "$port" \
  --lora-modules one="$folder/one.safetensors" two="$folder/two.safetensors" &
trap 'kill %1' EXIT
until curl --silent --fail "localhost:$port/health"; do kill -0 %1 && sleep 2; done
for model in base one two; do
  curl --silent "localhost:$port/v1/completions" --header 'Content-Type: application/json' \
    --data "{\"model\": \"$model\", \"prompt\": \"What is 17 * 23?\", \"max_tokens\": 64}" && echo
done
