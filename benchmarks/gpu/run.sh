#!/usr/bin/env bash
# Measures on one GPU within nine minutes, part after part in the order of their worth.
#
#   benchmarks/gpu/run.sh [--rehearse] [OUTPUT [PART:SECONDS ...]]
#
# OUTPUT        folder of the JSON files and the log; default: $OUT, else runs/gpu
# PART:SECONDS  one of the parts below, or the whole path of a script, and its time; default: all parts below
# --rehearse    tiny sizes on the CPU, without limits of time
#
# Each part is a process, which writes its JSON with every result. One that fails or is cut off stops none of the
# others. Time that a part leaves goes to the next. Packages from wheels/ (see wheels.sh) are installed for the parts.
# What an earlier run left of the same parts goes to OUTPUT/before first, so that it does not pass for this run's.
set -uo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath --no-symlinks "$python")
parts=(correctness:90 step_times:95 peak_memory:50 quality:255 first_step:25 engines:25)
known=" ${parts[*]%:*} "

help() {
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "Parts: ${parts[*]}"
}

usage() {
    { echo "run.sh: $1" && help; } >&2
    exit 2
}

rehearse=
[[ ${1:-} == --help ]] && help && exit
if [[ ${1:-} == --rehearse ]]; then
    rehearse=--rehearse
    shift
fi
output=${1:-${OUT:-$root/runs/gpu}}
[[ $output == -* ]] && usage "$output is no option; the only one is --rehearse, and it comes first"
shift $(($# > 0))
(($# > 0)) && parts=("$@")
for part in "${parts[@]}"; do
    name=${part%:*}
    [[ $part =~ :(0|[1-9][0-9]{0,5})$ ]] || usage "$part is no PART:SECONDS, of at most 6 digits"
    [[ $name == /* && -f $name ]] || [[ $name =~ ^[a-z_]+$ && $known == *" $name "* ]] || usage "there is no part $name"
done

mkdir -p "$output" || exit
output=$(cd "$output" && pwd)
exec 9>>"$output/log.txt" || exit
flock --nonblock --conflict-exit-code 9 9 2>/dev/null # where nothing can be locked, nothing is refused
(($? == 9)) && usage "another run still writes into $output"
cd "$root" || exit
for part in "${parts[@]}"; do
    old=$output/${part%:*}.json
    [[ $part != /* && -f $old ]] && mkdir -p "$output/before" && mv "$old" "$output/before/"
done
exec > >(tee --ignore-interrupts "$output/log.txt") 2>&1
log=$!
work=$(mktemp -d)
child=
text=

# Whoever fetches the log when this script has ended finds all of it.
finish() {
    [[ $text ]] && kill "$text" 2>/dev/null
    rm -rf "$work"
    exec >&- 2>&-
    wait_until 2 "$log"
}

# Until a process ($2) has ended, at most so many seconds ($1).
wait_until() {
    local last=$((SECONDS + $1))
    while ((SECONDS < last)) && [[ $2 ]] && kill -0 "$2" 2>/dev/null; do sleep 0.1; done
}

stop() {
    echo "== ended by a signal"
    [[ $child ]] && kill "$child" 2>/dev/null
    exit "$1"
}

trap finish EXIT
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1

failed=0
wheels=("$root"/wheels/*.whl)
if [[ -f ${wheels[0]} ]]; then
    if "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "${wheels[@]}"; then
        export PYTHONPATH=$PYTHONPATH:$work/site
    else
        echo "== wheels/ cannot be installed here: what needs them is left out"
        failed=1
    fi
fi

# While the first part checks numbers, and before anything is timed, processors that are idle make the tokens.
if [[ " ${parts[*]}" == *" quality:"* ]]; then
    "$python" -m benchmarks.gpu.text $rehearse >"$work/text" 2>&1 &
    text=$!
fi

deadline=0
for part in "${parts[@]}"; do
    name=${part%:*}
    [[ $name == correctness ]] || wait_until $((deadline - SECONDS)) "$text"
    deadline=$((deadline + ${part##*:}))
    [[ $rehearse ]] && deadline=$((SECONDS + 3600))
    if [[ $name == quality ]]; then
        wait_until $((deadline - SECONDS)) "$text"
        cat "$work/text"
    fi
    left=$((deadline - SECONDS))
    command=("$python" -m "benchmarks.gpu.$name")
    [[ $name == /* ]] && command=("$python" "$name")
    echo "== $name: $left seconds"
    begun=$SECONDS
    if ((left < 1)); then
        status=124
    else
        timeout --kill-after=5 "$left" "${command[@]}" --output "$output" --seconds "$left" $rehearse &
        child=$!
        wait "$child"
        status=$?
        child=
    fi
    case $status in
        0) how=complete ;;
        124 | 137) how="cut off" ;;
        *) how="failed ($status)" ;;
    esac
    ((status == 0)) || failed=$((failed + 1))
    echo "== $name: $how after $((SECONDS - begun)) seconds"
done
echo "== ${#parts[@]} parts, $failed failed or cut off; the page of these results:"
echo "   python -m benchmarks.gpu.report ${output@Q}"
((failed == 0))
