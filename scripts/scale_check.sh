#!/usr/bin/env bash
# Train random-weight bases of the 8B and 70B shapes on 1, 2, 4 ... of this machine's GPUs, whole, sharded and sharded in
# 4 bits; kill a run and let it go on; write a table.
#
#     scripts/scale_check.sh OUT --rows gsm8k/train.jsonl --tokenizer models/SmolLM2-135M-Instruct [--shapes 8b 70b]
#
# OUT needs 16 GB for the 8B weights and 141 GB for the 70B ones, or --depth LAYERS. On CPUs: --shapes tiny --cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/scale_check.py "$@"
