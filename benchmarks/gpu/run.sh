#!/usr/bin/env bash
# Measures on one GPU within nine minutes, part after part in the order of their worth.
#
#   benchmarks/gpu/run.sh [--rehearse] [OUTPUT [PART:SECONDS ...]]
#
# OUTPUT        folder of the JSON files and the log; default: $OUT, else runs/gpu
# PART:SECONDS  a file beside this one, or the whole path of a script, and its time; default: the parts below
# --rehearse    tiny sizes on the CPU, without limits of time
#
# Each part is a process, which writes its JSON with every result. One that fails or is cut off stops none of the
# others. Time that a part leaves goes to the next. Packages from wheels/ (see wheels.sh) are installed for the parts.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath --no-symlinks "$python")
parts=(correctness:90 step_times:95 peak_memory:50 quality:255 first_step:25 engines:25)

usage() {
    echo "run.sh: $1" >&2
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

rehearse=
if [[ ${1:-} == --rehearse ]]; then
    rehearse=--rehearse
    shift
fi
output=${1:-${OUT:-$root/runs/gpu}}
[[ $output == -* ]] && usage "$output is no option; the only one is --rehearse, and it comes first"
shift $(($# > 0))
(($# > 0)) && parts=("$@")
for part in "${parts[@]}"; do
    [[ $part =~ ^.+:[0-9]+$ ]] || usage "$part is no PART:SECONDS"
    [[ -f $root/benchmarks/gpu/${part%:*}.py || -f ${part%:*} ]] || usage "there is no part ${part%:*}"
done

mkdir -p "$output" || exit
output=$(cd "$output" && pwd)
cd "$root" || exit
exec > >(tee "$output/log.txt") 2>&1
work=$(mktemp -d)
child=
trap 'rm -rf "$work"' EXIT
trap '[[ $child ]] && kill "$child"; exit 143' INT TERM
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1

wheels=("$root"/wheels/*.whl)
if [[ -f ${wheels[0]} ]]; then
    # shellcheck disable=SC2015 # both are to end it
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "${wheels[@]}" &&
        export PYTHONPATH=$PYTHONPATH:$work/site || exit
fi

# While the first part checks numbers, and before anything is timed, processors that are idle make the tokens.
text=
if [[ " ${parts[*]}" == *" quality:"* ]]; then
    "$python" -m benchmarks.gpu.text $rehearse >"$work/text" 2>&1 &
    text=$!
fi

deadline=0
failed=0
for part in "${parts[@]}"; do
    name=${part%:*}
    deadline=$((deadline + ${part##*:}))
    left=$((deadline - SECONDS))
    [[ $rehearse ]] && left=3600
    if [[ $name == quality ]]; then
        wait "$text" || cat "$work/text"
    fi
    command=("$python" -m "benchmarks.gpu.$name")
    [[ -f $name ]] && command=("$python" "$name")
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
echo "   python -m benchmarks.gpu.report $output"
((failed == 0))
