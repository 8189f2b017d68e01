#!/usr/bin/env bash
# Runs llm3 in several processes on this machine, as one run.
#
#   launch/local.sh -n 2 [-d DEVICES] run --config=configs/quickstart.py --workdir=runs/quickstart
#
#   -n   number of processes
#   -d   devices per process: GPUs (default: all, divided evenly), or simulated CPU devices (default: 1)
#
# Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are passed on to all processes, which save and end together. Output lines of all processes but the
# first begin with their number. The exit status is the first one that llm3/errors.py defines, else the largest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"

fail() {
    printf 'launch/local.sh: %s\n' "$1" >&2
    exit 2
}

processes="" devices=""
while getopts :n:d: option; do
    case $option in
        n) processes=$OPTARG ;;
        d) devices=$OPTARG ;;
        *) fail "-$OPTARG: expected -n PROCESSES, optionally -d DEVICES, then the arguments of python -m llm3" ;;
    esac
done
shift $((OPTIND - 1))
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "-n '$processes': expected a number of processes"
[[ ${devices:-1} =~ ^[1-9][0-9]*$ ]] || fail "-d '$devices': expected a number of devices per process"
[ $# -gt 0 ] || fail "expected the arguments of python -m llm3: run --config=FILE --workdir=DIR"
[ "$LLM3_ACCELERATOR" != tpu ] || fail "a TPU runs one process per host: call python -m llm3 directly; see launch/tpu_vm.sh"

enter_environment

cards=()
if [ "$LLM3_ACCELERATOR" = cuda ]; then
    listed=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
    IFS=, read -r -a cards <<<"${listed// /}"
    devices=${devices:-$((${#cards[@]} / processes))}
    if [ "$devices" = 0 ] || [ $((devices * processes)) -gt ${#cards[@]} ]; then
        fail "-n $processes -d $devices: there are ${#cards[@]} GPUs: $listed"
    fi
fi

port=$("${interpreter[@]}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export LLM3_COORDINATOR=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port LLM3_PROCESSES=$processes

# Each process has its own group, so that Ctrl-C reaches it only from here: a second one would end it without saving.
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
trap 'pass_on HUP' HUP
trap 'pass_on USR1' USR1
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
        "${interpreter[@]}" -m llm3 "$@" </dev/null &
    else
        "${interpreter[@]}" -m llm3 "$@" </dev/null > >(trap '' INT TERM HUP USR1 && exec sed -u "s/^/[$process] /" >&2) 2>&1 &
    fi
    pids+=($!)
done

known="" largest=0
for pid in "${pids[@]}"; do
    # `wait` also returns after a trapped signal; once the process has ended, it always returns its status.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    status=0
    wait "$pid" || status=$?
    case $status in
        2 | 3 | 4 | 5 | 6 | 7 | 75) known=${known:-$status} ;;
        *) largest=$((status > largest ? status : largest)) ;;
    esac
done
exit "${known:-$largest}"
