#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run of at most 9 minutes: build, tests, numerics, CUDA graphs and streams,
# speed, compute-sanitizer. The most informative parts come first; each part's result is written when it ends, so a run
# that is cut off leaves what it had; the last thing written is a summary of one page.
#
#     OUT=folder benchmarks/gpu_check.sh            on a machine with a GPU; needs no network
#     OUT=folder benchmarks/gpu_check.sh --cpu      the same parts on a CPU, CUDA kernels in the emulator: tests the script
#
# Needs python3 with torch, triton, numpy, pybind11, scikit-build-core and pytest, and nvcc, cmake and ninja on PATH; for
# other packages of the tests that are missing, what stand_ins/ has.
# Writes summary.txt, log.txt, each part's output in parts/, numerics.json and .md, speed.json, .csv and .md, and tests.xml
# into $OUT, each under another name until it is whole. To keep a run, copy what README quotes to
# benchmarks/results/<device>/<commit>/.
# Exits with the number of parts that failed.
set -u

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$repo/runs/gpu_check}
python=${PYTHON:-python3}
seconds=${GPU_CHECK_SECONDS:-530}
architectures=${MMFAST_CUDA_ARCHS:-90a-real}
device=cuda
if [ "${1:-}" = --cpu ]; then device=cpu; fi

mkdir -p "$out/parts" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
start=$SECONDS
log=$out/log.txt
summary=$out/summary.txt
failed=0
: >"$log"
{
    echo "mmfast GPU check, $(date -u '+%Y-%m-%d %H:%M') UTC, commit $(git -C "$repo" rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
} >"$summary"

# added FILE MORE: FILE with MORE at its end, which is never seen half written
added() { cat "$1" "$2" >"$1.new" && mv "$1.new" "$1"; }

# part NAME SECONDS COMMAND...: runs it for at most so long, and for no longer than is left; logs what it prints, and
# adds a line to the summary: its verdict, its time and the lines that it marked with "RESULT: ".
part() {
    local name=$1 limit=$2
    shift 2
    local left=$((seconds - (SECONDS - start)))
    if [ "$left" -lt 5 ]; then
        echo "$name: not run, no time left" >>"$summary"
        failed=$((failed + 1))
        return 1
    fi
    # how long a CPU takes says nothing of a GPU
    if [ "$limit" -gt "$left" ] || [ "$device" = cpu ]; then limit=$left; fi
    local began=$SECONDS text=$work/part.txt code=0 verdict=ok
    timeout --kill-after=5 "$limit" "$@" >"$text" 2>&1 || code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        verdict="STOPPED after $limit s"
    elif [ "$code" -ne 0 ]; then
        verdict="FAILED ($code)"
    fi
    {
        echo "==== $name: $verdict, $((SECONDS - began)) s"
        tail -c 60000 "$text"
        echo
    } >"$work/logged.txt"
    {
        echo "$name: $verdict, $((SECONDS - began)) s"
        sed -n 's/^RESULT: /    /p' "$text"
        if [ "$code" -ne 0 ]; then tail -n 6 "$text" | cut -c1-200 | sed 's/^/    | /'; fi
    } >"$work/told.txt"
    cp "$work/logged.txt" "$out/parts/.new" && mv "$out/parts/.new" "$out/parts/${name// /-}.txt"
    added "$log" "$work/logged.txt"
    added "$summary" "$work/told.txt"
    if [ "$code" -ne 0 ]; then failed=$((failed + 1)); fi
    return "$code"
}

machine() {
    "$python" --version
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' || return 1
    local stand_in
    for stand_in in "$repo"/benchmarks/stand_ins/*.py; do
        # sought, not imported, which takes seconds
        if ! "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$(basename "$stand_in" .py)'))"; then
            cp "$stand_in" "$work/stand_ins/"
            echo "stand-in: $stand_in"
        fi
    done
    if [ "$device" = cpu ]; then
        echo "RESULT: the parts on a CPU"
        return 0
    fi
    nvcc --version | tail -n 2
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sed 's/^/RESULT: /'
}

build() {
    cd "$repo" || return 1
    "$python" -m pip install --no-build-isolation --no-deps --no-index --quiet --target "$work/site" \
        -C "build-dir=$work/build" -C cmake.define.MMFAST_CUDA=ON -C "cmake.define.MMFAST_CUDA_ARCHS=$architectures" . || return 1
    echo "RESULT: built for $architectures"
}

check() { "$python" "$repo/benchmarks/gpu_check.py" --device "$device" "$@"; }

# the commands of mmfast, in a folder from which the checkout is not imported; their last lines are the result
mmfast() {
    local lines=$1
    shift
    cd "$work" || return 1
    "$python" -m mmfast "$@" >"$work/command.txt" 2>&1
    local code=$?
    cat "$work/command.txt"
    grep -E "$lines" "$work/command.txt" | sed 's/^/RESULT: /'
    return "$code"
}

numerics() {
    local chosen=(--backend cuda --backend triton --seconds 35)
    if [ "$device" = cpu ]; then chosen=(adversarial --cases '*hinge*' --backend cuda --dtype float16); fi
    mmfast 'PASSED|FAILED|INCOMPLETE' validate --device "$device" "${chosen[@]}" --out "$out/numerics.json" --out "$out/numerics.md"
}

speed() {
    local chosen=(adversarial --modes "forward+backward" --compile none)
    if [ "$device" = cpu ]; then chosen=(adversarial --cases 'dcgan-hinge*' --rounds 5 --compile none); fi
    mmfast '^geometric mean|^worst' bench --device "$device" "${chosen[@]}" \
        --json "$out/speed.json" --csv "$out/speed.csv" --markdown "$out/speed.md"
}

tests() {
    cd "$repo" || return 1
    local only=cuda-cuda of=tests
    if [ "$device" = cpu ]; then only="cuda-cpu and float16 and hinge" of=tests/test_adversarial.py; fi
    # ended in time, pytest tells of the tests that were run
    timeout --signal=INT "${1:-3600}" "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors \
        --junitxml="$out/tests.xml" -k "$only or triton-cuda" "$of" >"$work/tests.txt" 2>&1
    tail -n 60 "$work/tests.txt"
    local last
    last=$(grep -E '[0-9]+ (passed|failed|error)' "$work/tests.txt" | tail -n 1)
    echo "RESULT: ${last:-no test was run}"
    [[ "$last" == *passed* && "$last" != *failed* && "$last" != *error* ]]
}

sanitizer() { compute-sanitizer --tool "$1" --error-exitcode 9 "$python" "$repo/benchmarks/gpu_check.py" --device cuda small; }

export repo out work device python architectures
export -f machine build check mmfast numerics speed tests sanitizer
export PYTHONUNBUFFERED=1
# compiled for this run alone
export TRITON_CACHE_DIR=$work/triton

mkdir "$work/stand_ins"
export PYTHONPATH=$work/stand_ins${PYTHONPATH:+:$PYTHONPATH}
part machine 30 bash -c machine
if [ "$device" = cuda ]; then
    part build 150 bash -c build || { cat "$summary"; exit "$failed"; }
    export PYTHONPATH=$work/site:$PYTHONPATH
fi
part correct 60 bash -c 'check small'
part numerics 60 bash -c numerics
if [ "$device" = cuda ]; then part "graphs and streams" 35 bash -c 'check graph'; fi
part losses 30 bash -c 'check losses'
part recurrent 45 bash -c 'check recurrent'
part decoders 50 bash -c 'check decoders'
if [ "$device" = cuda ]; then
    if command -v compute-sanitizer >/dev/null; then
        part memcheck 35 bash -c 'sanitizer memcheck'
        part racecheck 30 bash -c 'sanitizer racecheck'
    else
        echo "memcheck, racecheck: not run, compute-sanitizer is not on PATH" >>"$summary"
    fi
fi
part tests 75 bash -c "tests $([ "$device" = cuda ] && echo 65)"
part cudnn 35 bash -c 'check cudnn --seconds 22'
part speed 50 bash -c speed

{
    echo
    if [ "$failed" -eq 0 ]; then echo "every part passed"; else echo "$failed parts failed"; fi
    echo "in $((SECONDS - start)) s"
} >>"$summary"
cat "$summary"
exit "$failed"
