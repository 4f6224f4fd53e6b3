# shellcheck shell=bash
# Finds a Python 3.12 and makes a virtual environment with it. Sourced by setup.sh.

wanted=3.12

# Prints the interpreter behind a command when it is a working Python 3.12, else fails.
# Asking it is the only sure way: pyenv's python3.12 exists even where no 3.12 is installed.
# A virtual environment's python names the one it was made from, so that an active .venv is not
# used to make itself anew.
python_behind() {
    "$1" -c '
import sys
if sys.version_info[:2] != tuple(map(int, sys.argv[1].split("."))) or sys.maxsize < 2**32:
    sys.exit(1)
print(getattr(sys, "_base_executable", "") or sys.executable)' "$wanted" 2>/dev/null
}

# Prints every command that may be a Python 3.12, best first, one per line.
python_candidates() {
    type -aP "python$wanted" || true
    local pyenv_root candidate
    pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo ~/.pyenv)}
    for candidate in "$pyenv_root/versions/$wanted".*/bin/python; do
        [[ ! -x $candidate ]] || echo "$candidate"
    done | sort --version-sort --reverse
    type -aP python3 || true
    type -aP python || true
}

# Prints the Python 3.12 to use, or fails when there is none.
find_python() {
    local candidate found
    if [[ -n ${PYTHON:-} ]]; then
        python_behind "$PYTHON" && return
        echo "error: PYTHON=$PYTHON is not a working Python $wanted." \
            "Unset PYTHON, or set it to one (a command or a path)." >&2
        return 2
    fi
    while read -r candidate; do
        if found=$(python_behind "$candidate"); then
            echo "$found"
            return
        fi
    done < <(python_candidates)
    return 1
}

explain_missing_python() {
    cat >&2 <<MESSAGE
error: no Python $wanted found (tried: python$wanted, pyenv, other python3, uv).
Any one of these gives you one; then call this again:
  Ubuntu 24.04:             sudo apt-get install python$wanted python$wanted-venv
  Debian, others, pyenv:    pyenv install $wanted          (https://github.com/pyenv/pyenv)
  Debian, others, uv:       uv python install $wanted      (https://docs.astral.sh/uv)
  installed elsewhere:      PYTHON=/path/to/python$wanted bash launch/setup.sh
MESSAGE
}

# Keeps the folder itself, which may be a link to a larger disk.
empty_folder() {
    [[ ! -d $1 ]] || find "$1/" -mindepth 1 -delete
}

# Makes the virtual environment $1, with pip in it, from whatever this machine offers.
make_venv() {
    local venv=$1 python status=0
    python=$(find_python) || status=$?
    if ((status == 0)); then
        make_venv_with "$python" "$venv"
    elif ((status == 1)) && command -v uv >/dev/null; then
        echo "No Python $wanted installed; asking uv for one."
        empty_folder "$venv"
        uv venv --seed --python "$wanted" "$venv" && return
        explain_missing_python
        return 1
    else
        ((status == 2)) || explain_missing_python
        return 1
    fi
}

# Debian and Ubuntu leave ensurepip out of Python unless python3.12-venv is installed, which takes
# root; there pip comes from uv, or from the package index by our own few lines.
make_venv_with() {
    local python=$1 venv=$2
    echo "Making ${venv##*/} with $python"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv --clear "$venv" && return
    fi
    if command -v uv >/dev/null; then
        echo "This Python has no ensurepip; using uv."
        empty_folder "$venv"
        uv venv --seed --python "$python" "$venv" && return
    fi
    echo "This Python has no ensurepip; fetching pip from the package index."
    if "$python" -m venv --clear --without-pip "$venv" &&
        "$venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/fetch_pip.py"; then
        return
    fi
    cat >&2 <<MESSAGE
error: $python cannot make a virtual environment. Any one of these helps; then call this again:
  Debian, Ubuntu:           sudo apt-get install python$wanted-venv
  without root:             install uv (https://docs.astral.sh/uv)
MESSAGE
    return 1
}
