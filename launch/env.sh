# shellcheck shell=bash
# Sourced by the other scripts: sets the repository's root, this machine's accelerator, and the allocator settings.

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

# On a CPU, glibc by default returns each large buffer of a step to the kernel, and the next step faults it in again.
# Keeping the pages makes a step about a quarter faster. The settings must be set before the process starts.
if [ "$LLM3_ACCELERATOR" = cpu ]; then
    export MALLOC_ARENA_MAX=1
    export MALLOC_MMAP_MAX_=0
    export MALLOC_TOP_PAD_=268435456       # 256 MiB
    export MALLOC_TRIM_THRESHOLD_=34359738368 # 32 GiB
fi
