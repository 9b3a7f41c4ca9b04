#!/usr/bin/env bash
# Runs everything that is to be known about a GPU in one call, within 8 minutes:
#     benchmarks/gpu.sh [--device cpu --steps 1 --quick] [--out benchmarks/results/gpu]
# Needs torch, torchaudio, numpy, pydantic and safetensors; what else is missing is skipped by name.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
