# shellcheck shell=bash
# Sourced by the other scripts: the repository's root, this machine's accelerator, the Python that runs llm3, and what
# jax reads from the environment at its start. All of it can be overridden:
#
#   LLM3_SETUP        shell commands after which `python` has llm3, run on each host: "module load python/3.12 cuda", or
#                     ". ~/miniconda3/etc/profile.d/conda.sh && conda activate llm3"
#   LLM3_PYTHON       the command that runs Python, such as "apptainer exec --nv llm3.sif python" (default:
#                     .venv/bin/python in the repository, or python if LLM3_SETUP is set)
#   LLM3_ACCELERATOR  cpu, cuda or tpu, instead of the detected one

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

# Runs LLM3_SETUP and sets the array `interpreter`. Calls `fail` of the script if the default Python is missing.
enter_environment() {
    if [ -n "${LLM3_SETUP:-}" ]; then
        trap 'echo "launch/env.sh: LLM3_SETUP failed: $LLM3_SETUP" >&2; exit 2' EXIT
        set +u # conda and modules read variables that are not set
        eval "$LLM3_SETUP"
        set -u
        trap - EXIT
        interpreter=(python)
    else
        interpreter=("$root/.venv/bin/python")
    fi
    if [ -n "${LLM3_PYTHON:-}" ]; then
        read -r -a interpreter <<<"$LLM3_PYTHON"
    elif [ -z "${LLM3_SETUP:-}" ] && [ ! -x "${interpreter[0]}" ]; then
        fail "no ${interpreter[0]}: run launch/setup.sh first, or set LLM3_SETUP or LLM3_PYTHON (see launch/env.sh)"
    fi
}

export LLM3_ACCELERATOR=${LLM3_ACCELERATOR:-$(find_accelerator)}

# By default jax takes 75 % of a GPU's memory when it starts, and has no more for the rest of the run. A process of llm3
# has its GPUs for itself; 8 % (6 GB of 80) are left to CUDA, NCCL and cuBLAS, which allocate apart from jax.
# jax refuses to start with both names of this variable. XLA's options for the compiler are set by llm3 itself.
if [ "$LLM3_ACCELERATOR" = cuda ] && [ -z "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then
    export XLA_CLIENT_MEM_FRACTION=0.92
fi
