#!/usr/bin/env bash
# Lint, format, import floors and the tests, and what they cost. `--all`: the slow ones as well.
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
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports"
# Whole files go to one process: tests of a file share what they have compiled.
time "$bin/python" -m pytest -n 2 --dist loadfile "${which[@]}" "$@"
