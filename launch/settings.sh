# Settings from the environment, checked before anything uses them as numbers. Sourced.
# shellcheck shell=bash

# refuse WORD...: one line, and the exit status of a refusal, which nothing repeats.
refuse() {
    echo "error: $*" >&2
    exit 2
}

# take_no_words SCRIPT WORD...: of a script without options; --help shows how it begins.
take_no_words() {
    if [[ ${2:-} == --help || ${2:-} == -h ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
        exit 0
    fi
    [[ $# == 1 ]] || refuse "$1 takes no options; $2 was given. --help says more."
}

# require_number NAME VALUE LEAST [MOST]
# The text is looked at first: in (( )) bash would evaluate it, and run commands that stand in it.
require_number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3 || $2 > ${4:-999999})); then
        refuse "$1=$2: must be a whole number from $3 to ${4:-999999}, without leading zeros."
    fi
}

# require_nodes VALUE: a number of nodes, or the range MIN:MAX that torchrun may run on.
require_nodes() {
    if ! [[ $1 =~ ^([1-9][0-9]{0,5})(:([1-9][0-9]{0,5}))?$ ]] ||
        ((${BASH_REMATCH[3]:-${BASH_REMATCH[1]}} < BASH_REMATCH[1])); then
        refuse "NNODES=$1: must be a number of nodes such as 2, or a range such as 2:4."
    fi
}

# require_python COMMAND: another exit status than a refusal's would be tried again, by Slurm too.
require_python() {
    [[ -n $(type -P -- "$1") ]] || refuse "$1 is no program. Make .venv with bash launch/setup.sh," \
        "or set PYTHON to a Python that has this package."
}

# The GPUs that torch will see: those of nvidia-smi's list that CUDA_VISIBLE_DEVICES leaves, up to
# the first that is not there, and none where one is named twice. CUDA shows a process one MIG
# device, however many there are.
count_gpus() {
    local listed gpus device devices taken=()
    listed=$(nvidia-smi --list-gpus 2>/dev/null) || listed=
    gpus=$(grep -c '^GPU ' <<<"$listed") || true
    if [[ ! -v CUDA_VISIBLE_DEVICES ]]; then
        if grep -q '^ *MIG ' <<<"$listed"; then gpus=1; fi
        echo "$gpus"
        return
    fi
    IFS=', ' read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    for device in "${devices[@]}"; do
        if [[ $device =~ ^[0-9]{1,3}$ ]]; then
            device=$((10#$device))
            ((device < gpus)) || break
        elif [[ $device =~ ^(GPU|MIG)- ]]; then
            grep -q -F "(UUID: $device" <<<"$listed" || break
        else
            break
        fi
        if [[ " ${taken[*]} " == *" $device "* ]]; then
            taken=()
            break
        fi
        taken+=("$device")
        [[ $device != MIG-* ]] || break
    done
    echo "${#taken[@]}"
}
