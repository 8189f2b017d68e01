#!/usr/bin/env bash
# Makes .venv in the repository's root and installs llm3 in it, with the dependencies of this machine's accelerator.
# Run again, it returns at once if nothing has changed.
#
#   launch/setup.sh [EXTRA ...]      EXTRA: test, hf, eval, wandb, gcs, s3 (see pyproject.toml)
#
#   LLM3_EXTRAS="test hf"            extras, set in the environment
#   LLM3_ACCELERATOR=cpu|cuda|tpu    the accelerator, instead of the detected one
#   PYTHON=python3.12                the interpreter, instead of the first suitable one on PATH
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"
venv=$root/.venv

fail() {
    printf 'launch/setup.sh: %s\n' "$1" >&2
    exit 2
}

# Sets `python` to an interpreter that can make the environment; never the environment's own.
find_python() {
    local path=${PATH//"$venv/bin:"/} candidate found old="" bare=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        found=$(PATH=$path command -v "$candidate") || continue
        if ! "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            old+=" $candidate"
        elif ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
            bare+=" $candidate"
        else
            python=$found
            return
        fi
    done
    [ -z "$bare" ] || fail "no venv module in:$bare. On Debian and Ubuntu: apt-get install python3-venv; or set PYTHON."
    fail "needs Python 3.11 or newer.${old:+ Too old or not working:$old.} Install one, or name one: PYTHON=/path/to/python3"
}

requested=${LLM3_EXTRAS:-}
read -r -a wanted <<<"llm3 ${requested//,/ } $*"
[ "$LLM3_ACCELERATOR" = cpu ] || wanted+=("$LLM3_ACCELERATOR")
find_python

# Two lines: the interpreter and root of the environment, and the digest of the installed project.
identity=$("$python" - "$root" "${wanted[@]:1}" <<'PYTHON'
import hashlib, pathlib, sys, tomllib

root, extras = sys.argv[1], sys.argv[2:]
project = pathlib.Path(root, "pyproject.toml").read_bytes()
known = tomllib.loads(project.decode())["project"]["optional-dependencies"]
if unknown := sorted(set(extras) - set(known)):
    sys.exit(f"launch/setup.sh: no extra named {', '.join(unknown)}; valid: {', '.join(sorted(known))}")
print("python%d.%d" % sys.version_info[:2], root)
print(hashlib.sha256(project).hexdigest())
PYTHON
) || exit 2
made_by=${identity%%$'\n'*}
stamps=$venv/.installed/${identity##*$'\n'}

installed() { # one stamp per extra, so that scripts with different extras do not undo each other
    local extra
    for extra in "${wanted[@]}"; do
        [ -e "$stamps/$extra" ] || return 1
    done
}
if [ "$(cat "$venv/.made-by" 2>/dev/null)" != "$made_by" ]; then
    echo "Making .venv with $python"
    "$python" -m venv --clear "$venv"
    echo "$made_by" >"$venv/.made-by"
elif installed; then
    exit 0
fi

# Stamps are set last, so an interrupted install is repeated. Stamps of another pyproject.toml are removed.
[ -d "$stamps" ] || rm -rf "$venv/.installed"
list=$(IFS=, && echo "${wanted[*]:1}")
echo "Installing llm3${list:+[$list]} for $LLM3_ACCELERATOR: a few minutes, once"
options=(--disable-pip-version-check)
[ -t 1 ] || options+=(--quiet --progress-bar=off)
"$venv/bin/python" -m pip install "${options[@]}" --editable "$root${list:+[$list]}"
mkdir -p "$stamps"
for extra in "${wanted[@]}"; do
    : >"$stamps/$extra"
done
