#!/usr/bin/env bash
# Runs `python -m llm3` in the environment of launch/env.sh. The other scripts and the image start processes with it.
#
#   launch/llm3.sh run --config=configs/quickstart.py --workdir=runs/quickstart
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"

fail() {
    printf 'launch/llm3.sh: %s\n' "$1" >&2
    exit 2
}

enter_environment
exec "${interpreter[@]}" -m llm3 "$@"
