#!/usr/bin/env bash
# Lint, format, import floors and all tests, with the slow ones.
#
#   launch/test.sh [arguments of pytest ...]      e.g. launch/test.sh tests/test_report.py -m 'not slow' -n 0
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"

"$root/launch/setup.sh" test
cd "$root"
bin=$root/.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports"
# Whole files go to one process: tests of a file share what they have compiled.
exec "$bin/python" -m pytest -n 2 --dist loadfile "$@"
