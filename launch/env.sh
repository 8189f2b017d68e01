# shellcheck shell=bash
# Sourced by the other scripts: sets the repository's root and this machine's accelerator.

# shellcheck disable=SC2034  # read by the scripts that source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Prints cuda, tpu or cpu. Device files are checked first: nvidia-smi may take a second, but WSL has nothing else.
find_accelerator() {
    if [ -e /dev/nvidiactl ] || [ -e /proc/driver/nvidia/version ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        echo cuda
    elif [ -e /dev/accel0 ] || { [ -d /dev/vfio ] && [ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}" ]; }; then
        echo tpu
    else
        echo cpu
    fi
}

export LLM3_ACCELERATOR=${LLM3_ACCELERATOR:-$(find_accelerator)}
