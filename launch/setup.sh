#!/usr/bin/env bash
# Makes .venv with the pinned packages; does nothing, at once, when it is current.
#   bash launch/setup.sh
#   PYTHON=/path/to/python3.12 bash launch/setup.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.made-from         # says what a complete .venv was made from
unfinished=$venv/.unfinished   # there while packages are being installed
being_made=$root/.venv.making  # there while .venv is being made, which empties it
# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"
# shellcheck source=launch/find_python.sh
source "$root/launch/find_python.sh"

# What decides whether .venv is current. The folder counts because scripts in .venv name it.
made_from() {
    {
        echo "$root"
        "$venv/bin/python" -V
        sha256sum <"$root/requirements.txt"
        sha256sum <"$root/pyproject.toml"
    } 2>&1
}

is_current() {
    [[ -f $stamp && ! -e $unfinished && -x $venv/bin/python ]] &&
        [[ $(made_from) == "$(<"$stamp")" ]]
}

# A .venv of another folder or Python, or one whose installation was cut short, is made anew;
# one whose pins merely changed is brought up to date.
is_usable() {
    [[ ! -e $unfinished ]] && python_behind "$venv/bin/python" >/dev/null &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        { [[ ! -f $stamp ]] || [[ $(head -n 1 "$stamp") == "$root" ]]; }
}

warn_when_disk_is_short() {
    local free_gb
    free_gb=$(df --output=avail -BG "$root" | tail -n 1 | tr -dc '0-9')
    if ((free_gb < 10)); then
        echo "warning: ${free_gb} GB free here; the packages need about 10 GB while they install." >&2
    fi
}

install_packages() {
    cat <<MESSAGE
Installing the packages of requirements.txt and the development tools into .venv.
The first time this downloads some 3 GB, PyTorch with its CUDA libraries most of it, and takes
3 to 10 minutes; .venv then has 6 GB.
MESSAGE
    : >"$unfinished"
    rm -f "$being_made"
    # PIP_USER and PYTHONHOME would send packages, or Python itself, elsewhere.
    if ! (cd "$root" && env -u PYTHONHOME -u PYTHONPATH PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install --requirement requirements.txt \
        --editable ".[dev]"); then
        cat >&2 <<MESSAGE
error: pip could not install the packages; its message is above. Most often:
  no network, or a mirror is needed:   export PIP_INDEX_URL=https://your.mirror/simple
  no space left:                       df -h . (10 GB are needed), TMPDIR=/somewhere/else
Then call this again.
MESSAGE
        return 1
    fi
    made_from >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm "$unfinished"
}

is_link_to_anothers() {
    [[ -L $venv && -f $stamp && $(head -n 1 "$stamp") != "$root" ]]
}

# What somebody else put there is not ours to empty.
is_ours_to_empty() {
    [[ -f $stamp || -e $unfinished || -e $being_made || (! -e $venv && ! -L $venv) ]] && return
    [[ -d $venv ]] && [[ -z $(find "$venv/" -mindepth 1 -print -quit) ]]
}

main() {
    take_no_words "$0" "$@"
    is_current && return
    if is_link_to_anothers; then
        echo "error: .venv is a link to the environment of $(head -n 1 "$stamp"), which installing here" \
            "would take from it. Remove the link and call this again: it makes one for this folder." >&2
        return 1
    fi
    # Two calls at once: the second waits and then finds everything done.
    exec 9>"$root/.venv.lock"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        echo "Waiting for another set-up of this folder to finish."
        flock 9
    fi
    is_current && return
    SECONDS=0
    warn_when_disk_is_short
    if ! is_usable; then
        if ! is_ours_to_empty; then
            echo "error: $venv is in the way: no working environment, and not made by this script, which" \
                "would have to empty it. Move it away and call this again." >&2
            return 1
        fi
        : >"$being_made"
        rm -f "$stamp" # first: nothing of a half deleted .venv may look complete
        make_venv "$venv"
    fi
    install_packages
    echo "Environment ready in .venv after $SECONDS s."
}

main "$@"
