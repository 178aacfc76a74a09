#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest: bash tests/run.sh tests/unit -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh puzzles,formats,report,remote,dev

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# The tests that need a GPU run where there is one; all others run on the CPU, the same everywhere.
if [ -z "${ILVR_TEST_GPU:-}" ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
fi
ruff check .
ruff format --check .
exec python -m pytest "$@"
