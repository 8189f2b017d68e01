#!/usr/bin/env bash
# Runs llm3 in several processes on this machine, which act as one run.
#
#   launch/local.sh -n 2 [-d DEVICES] run --config=configs/quickstart.py --workdir=runs/quickstart
#
#   -n   processes
#   -d   devices of each: of the GPUs (default: all, divided evenly), or as many fake ones of a CPU (default: 1)
#
# Ctrl-C and SIGTERM are passed on to all of them: they save and end together. Lines of the processes after the first
# begin with their number. The exit status is what one of them says of itself (llm3/errors.py), else the largest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"
python=$root/.venv/bin/python

fail() {
    printf 'launch/local.sh: %s\n' "$1" >&2
    exit 2
}

processes="" devices=""
while getopts :n:d: option; do
    case $option in
        n) processes=$OPTARG ;;
        d) devices=$OPTARG ;;
        *) fail "-$OPTARG: expected -n PROCESSES, perhaps -d DEVICES, then what python -m llm3 is called with" ;;
    esac
done
shift $((OPTIND - 1))
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "-n '$processes': expected a number of processes"
[[ ${devices:-1} =~ ^[1-9][0-9]*$ ]] || fail "-d '$devices': expected a number of devices of each process"
[ $# -gt 0 ] || fail "expected what python -m llm3 is called with: run --config=FILE --workdir=DIR"
[ -x "$python" ] || fail "no $python: run launch/setup.sh first"
[ "$LLM3_ACCELERATOR" != tpu ] || fail "a TPU takes one process a host: python -m llm3 alone; see launch/tpu_vm.sh"

cards=()
if [ "$LLM3_ACCELERATOR" = cuda ]; then
    listed=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
    IFS=, read -r -a cards <<<"${listed// /}"
    devices=${devices:-$((${#cards[@]} / processes))}
    if [ "$devices" = 0 ] || [ $((devices * processes)) -gt ${#cards[@]} ]; then
        fail "-n $processes -d $devices: there are ${#cards[@]} GPUs: $listed"
    fi
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export LLM3_COORDINATOR=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port LLM3_PROCESSES=$processes

# Each process is a group of its own, so that Ctrl-C reaches it once, from here. A second one ends it without saving.
set -m
# shellcheck disable=SC2317  # called by the traps
pass_on() {
    local pid
    for pid in $(jobs -pr); do
        kill "-$1" "$pid" 2>/dev/null || true
    done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM
pids=()
for ((process = 0; process < processes; process++)); do
    export LLM3_PROCESS=$process
    if [ ${#cards[@]} -gt 0 ]; then
        mine=$(IFS=, && echo "${cards[*]:process*devices:devices}")
        export CUDA_VISIBLE_DEVICES=$mine
    else
        export JAX_NUM_CPU_DEVICES=${devices:-1}
    fi
    if [ "$process" = 0 ]; then
        "$python" -m llm3 "$@" </dev/null &
    else
        "$python" -m llm3 "$@" </dev/null > >(trap '' INT TERM && exec sed -u "s/^/[$process] /" >&2) 2>&1 &
    fi
    pids+=($!)
done

said="" largest=0
for pid in "${pids[@]}"; do
    # `wait` also returns when a signal has been passed on; that of a process that has ended gives its status, always.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    status=0
    wait "$pid" || status=$?
    case $status in
        2 | 3 | 4 | 5 | 75) said=${said:-$status} ;;
        *) largest=$((status > largest ? status : largest)) ;;
    esac
done
exit "${said:-$largest}"
