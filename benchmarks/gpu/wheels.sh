#!/usr/bin/env bash
# Gathers packages as wheels for a machine without a network: run.sh installs what lies in wheels/.
#
#   benchmarks/gpu/wheels.sh NAME==VERSION ...     (environment: PYTHON_VERSION, default 3.12; MOST_MB, default 60)
#
# Without their dependencies: name those, too, that are missing there. The parts need none. Refuses to leave more than
# MOST_MB megabytes of repository and wheels together.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if (($# == 0)); then
    echo "wheels.sh: name packages, as in: wheels.sh sgd-sai==1.0.3" >&2
    exit 2
fi
most=${MOST_MB:-60}
platforms=()
for glibc in 28 34 27 24 17; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest wheels "$@"
files=$(git ls-files --cached --others --exclude-standard -z | xargs -0 du -c --block-size=1 2>/dev/null | tail -1 | cut -f1)
wheels=$(du --summarize --block-size=1 wheels | cut -f1)
total=$(((files + wheels + 999999) / 1000000))
ls wheels
if ((total > most)); then
    echo "wheels.sh: repository and wheels/ are $total MB, more than $most; take some out of wheels/." >&2
    exit 1
fi
echo "repository and wheels/: $total MB of $most"
