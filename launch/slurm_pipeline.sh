#!/usr/bin/env bash
# The stages of a config as a chain of jobs: each starts when the one before it has ended well, and those behind one that
# failed are cancelled. One that is preempted is requeued, and those behind it wait. Prints the numbers of the jobs.
#
#   CONFIG=configs/quickstart.py WORKDIR=runs/quickstart launch/slurm_pipeline.sh [options of sbatch] [-- arguments of run]
#
#   STAGES="pretrain posttrain finetune"    in this order; "posttrain,finetune" is one job
#
# What each job asks for stands at the top of launch/slurm.sbatch; logs are in WORKDIR/slurm.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    printf 'launch/slurm_pipeline.sh: %s\n' "$1" >&2
    exit 2
}

[ -n "${CONFIG:+${WORKDIR:-}}" ] || fail "set CONFIG and WORKDIR: CONFIG=FILE WORKDIR=DIR $0"
[ -x "$root/.venv/bin/python" ] || fail "no .venv in $root: run launch/setup.sh first"
command -v sbatch >/dev/null || fail "no sbatch here: this is for a machine of a SLURM cluster"
[[ $CONFIG = /* ]] || CONFIG=$PWD/$CONFIG
[[ $WORKDIR = /* ]] || WORKDIR=$PWD/$WORKDIR
read -r -a stages <<<"${STAGES:-pretrain posttrain finetune}"
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift

cd "$root"
mkdir -p "$WORKDIR/slurm"
export CONFIG WORKDIR STAGES
previous=""
for STAGES in "${stages[@]}"; do
    job=(--parsable --job-name="llm3-$STAGES" --output="$WORKDIR/slurm/%x-%j.log")
    # Without the second option, a job behind one that failed would wait for ever.
    [ -z "$previous" ] || job+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    previous=$(sbatch "${job[@]}" ${options[@]+"${options[@]}"} launch/slurm.sbatch "$@")
    previous=${previous%%;*} # behind it, the name of a cluster
    echo "$STAGES: job $previous"
done
