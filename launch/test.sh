#!/usr/bin/env bash
# Checks lint, format and import contracts, then runs and times the tests. `--all`: the slow tests as well.
#
#   launch/test.sh [--all] [arguments of pytest ...]      e.g. launch/test.sh tests/report -n 0
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"

"$root/launch/setup.sh" test
cd "$root"
which=(-m "not slow")
if [ "${1:-}" = --all ]; then
    which=()
    shift
fi
bin=$root/.venv/bin
# Many tests start Python: without byte code, each start compiles llm3, and each worker all tests.
unset PYTHONDONTWRITEBYTECODE
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports"
"$bin/mypy"
# --dist loadfile: tests of a file share compiled functions, so they run in one process.
time "$bin/python" -m pytest -n 2 --dist loadfile "${which[@]}" "$@"
