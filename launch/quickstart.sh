#!/usr/bin/env bash
# Installs missing dependencies, then runs configs/quickstart.py: pretrain, posttrain, finetune, and the report.
# Run again, it resumes, or says that nothing is left to do. With LLM3_SETUP or LLM3_PYTHON (see launch/env.sh), it runs
# in that environment and installs nothing.
#
#   launch/quickstart.sh [DIR] [arguments of `python -m llm3 run` ...]
#
#   DIR: the workdir of the run (default: runs/quickstart in the repository), e.g.
#   launch/quickstart.sh /tmp/quickstart --config.stages.finetune.steps=50
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"

dir=$root/runs/quickstart
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    dir=$1
    shift
    [[ $dir = /* || $dir = *://* ]] || dir=$PWD/$dir
fi

[ -n "${LLM3_SETUP:-}${LLM3_PYTHON:-}" ] || "$root/launch/setup.sh" serve
cd "$root"
exec "$root/launch/llm3.sh" run --config=configs/quickstart.py --workdir="$dir" "$@"
