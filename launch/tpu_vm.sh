#!/usr/bin/env bash
# Runs llm3 on all workers of a TPU VM slice, or of several: copies this tree, installs it, and starts one process per
# worker. When run again, after a preemption or with new code, it stops the current run, which saves, and resumes it.
#
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh run --config=configs/quickstart.py --workdir=/mnt/runs/quickstart
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh log     # follow a run after a lost connection
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh stop
#   TPU="pair-0 pair-1" ZONE=us-east5-a launch/tpu_vm.sh run --config.mesh.across_hosts=data ...
#
# The slices of the last line are one run. They must be made as one, so that they know of each other: by `gcloud compute
# tpus queued-resources create pair --node-count=2 --node-prefix=pair ...`.
#
# All workers must be able to write to the workdir: gs://BUCKET/RUN, or a folder on Filestore. The token cache is in the
# home of each worker, which builds its own; with LLM3_CACHE_DIR=/mnt/cache, they share one.
# shellcheck disable=SC2016  # the workers expand the single-quoted scripts
set -euo pipefail

# Fill in, or set in the environment:
TPU=${TPU:-}                # the name of the slice, or the names of all slices, separated by spaces
ZONE=${ZONE:-}              # their zone
PROJECT=${PROJECT:-}        # their project (default: gcloud's)
DIRECTORY=${DIRECTORY:-llm3} # the tree's directory in the home of each worker
LLM3_CACHE_DIR=${LLM3_CACHE_DIR:-} # the token cache (default: in the home of each worker)

fail() {
    printf 'launch/tpu_vm.sh: %s\n' "$1" >&2
    exit 2
}

[ -n "${TPU:+$ZONE}" ] || fail "set TPU and ZONE: TPU=NAME ZONE=ZONE $0 run --config=FILE --workdir=DIR"
command -v gcloud >/dev/null || fail "no gcloud here: install Google Cloud's command line"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r -a slices <<<"$TPU"
where=("--zone=$ZONE" --worker=all)
[ -z "$PROJECT" ] || where+=("--project=$PROJECT")

on_all_slices() { # runs a command of gcloud for each slice, whose name takes the place of SLICE, all at once
    local slice pid pids=() status=0
    for slice in "${slices[@]}"; do
        gcloud compute tpus tpu-vm "${@/#SLICE/$slice}" "${where[@]}" &
        pids+=($!)
    done
    trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM # background jobs do not hear Ctrl-C
    for pid in "${pids[@]}"; do
        wait "$pid" || status=$((status == 0 ? $? : status))
    done
    trap - INT TERM
    return "$status"
}

on_all_workers() { # runs a script with DIRECTORY as $0 and the other arguments as "$@"
    local script=$1
    shift
    on_all_slices ssh SLICE --command="$(printf '%q ' bash -euc "$script" "$DIRECTORY" "$@")"
}

stop='
    pid=$(cat "$0/run.pid" 2>/dev/null) || exit 0
    grep -q llm3 "/proc/$pid/cmdline" 2>/dev/null || exit 0 # it has ended, and another process may have its pid
    echo "$HOSTNAME: stopping process $pid, which saves"
    kill -TERM "$pid"
    tail --pid="$pid" -f /dev/null'
install='
    mkdir -p "$0"
    tar -xzf llm3.tar.gz -C "$0"
    LLM3_ACCELERATOR=tpu "$0/launch/setup.sh" gcs'
start='
    cd "$0"
    export LLM3_ACCELERATOR=tpu LLM3_CACHE_DIR=$1
    shift
    : >run.log # before `tail` looks for it
    setsid nohup launch/llm3.sh "$@" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    tail --pid=$! -n +1 -f run.log
    wait $!'
log='tail --pid="$(cat "$0/run.pid")" -n +1 -f "$0/run.log"'

case ${1:-} in
    stop) on_all_workers "$stop" ;;
    log) on_all_workers "$log" ;;
    run)
        archive=$(mktemp -d)
        trap 'rm -rf "$archive"' EXIT
        tar -czf "$archive/llm3.tar.gz" -C "$root" llm3 configs launch pyproject.toml README.md LICENSE
        on_all_workers "$stop"
        on_all_slices scp "$archive/llm3.tar.gz" SLICE:
        on_all_workers "$install"
        on_all_workers "$start" "$LLM3_CACHE_DIR" "$@"
        ;;
    *) fail "expected run, log or stop" ;;
esac
