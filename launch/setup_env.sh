#!/usr/bin/env bash
# Creates .venv in the repository root and installs the project with the pinned versions.
# Idempotent: does nothing when constraints.txt and setup.py have not changed since the last time.
# Usage: source launch/setup_env.sh EXTRAS     e.g. EXTRAS=puzzles,formats,report,remote,dev
# ILVR_PIP_ARGS adds arguments to every pip call (an index of your own, --no-cache-dir, ...).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
EXTRAS="${1:-puzzles,formats,report,remote,dev}"
cd "$ROOT"

find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    return 1
}

STAMP="$(cat constraints.txt setup.py launch/setup_env.sh | sha256sum | cut -c1-16)"
MARK=".venv/.ilvr-$STAMP-$(echo "$EXTRAS" | tr ',' '_')"
if [ ! -f "$MARK" ]; then
    PYTHON_FOUND="$(find_python)"
    command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || {
        echo "setup: needs a C++ compiler (c++ or g++) on the PATH" >&2
        exit 1
    }
    echo "setup: installing into $ROOT/.venv with $PYTHON_FOUND (once; a few minutes on a slow line)"
    [ -x .venv/bin/python ] || "$PYTHON_FOUND" -m venv .venv
    # torch first: deepspeed's build looks for it. No operator is compiled here (DS_BUILD_OPS=0).
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${ILVR_PIP_ARGS:-} -c constraints.txt torch setuptools
    # shellcheck disable=SC2086
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check ${ILVR_PIP_ARGS:-} \
        -c constraints.txt -e ".[$EXTRAS]"
    touch "$MARK"
    echo "setup: done"
fi
export PATH="$ROOT/.venv/bin:$PATH"
