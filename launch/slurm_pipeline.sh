#!/usr/bin/env bash
# Submits the stages of a config as a chain of jobs and prints their ids. A job starts when the one before it succeeds.
# If a job fails, the jobs after it are cancelled; if it is preempted, it is requeued, and the jobs after it wait.
#
#   CONFIG=configs/quickstart.py WORKDIR=runs/quickstart launch/slurm_pipeline.sh [options of sbatch] [-- arguments of run]
#
#   STAGES="pretrain posttrain finetune"    in this order; "posttrain,finetune" is one job
#
# The resources of each job are set at the top of launch/slurm.sbatch, which also lists the variables that it reads; logs
# are in WORKDIR/slurm, or in ./slurm if WORKDIR is a URL.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    printf 'launch/slurm_pipeline.sh: %s\n' "$1" >&2
    exit 2
}

[ -n "${CONFIG:+${WORKDIR:-}}" ] || fail "set CONFIG and WORKDIR: CONFIG=FILE WORKDIR=DIR $0"
if [ -z "${LLM3_SETUP:-}${LLM3_PYTHON:-}" ] && [ ! -x "$root/.venv/bin/python" ]; then
    fail "no .venv in $root: run launch/setup.sh first, or set LLM3_SETUP or LLM3_PYTHON (see launch/env.sh)"
fi
command -v sbatch >/dev/null || fail "no sbatch here: run this on a SLURM cluster"
[[ $CONFIG = /* ]] || CONFIG=$PWD/$CONFIG
[[ $WORKDIR = /* || $WORKDIR = *://* ]] || WORKDIR=$PWD/$WORKDIR
logs=$WORKDIR/slurm
[[ $WORKDIR != *://* ]] || logs=$PWD/slurm
read -r -a stages <<<"${STAGES:-pretrain posttrain finetune}"
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift

cd "$root"
mkdir -p "$logs"
export CONFIG WORKDIR STAGES
previous=""
for STAGES in "${stages[@]}"; do
    job=(--parsable --job-name="llm3-$STAGES" --output="$logs/%x-%j.log")
    # Without the second option, a job after a failed one would wait forever.
    [ -z "$previous" ] || job+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    previous=$(sbatch "${job[@]}" ${options[@]+"${options[@]}"} launch/slurm.sbatch "$@")
    previous=${previous%%;*} # drop the name of the cluster
    echo "$STAGES: job $previous"
done
