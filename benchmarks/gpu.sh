#!/usr/bin/env bash
# Everything that needs a GPU, the most telling first: bash benchmarks/gpu.sh FOLDER [PART...]
#
# FOLDER gets a log of each part, its results, and NAME.part.json: how it ended. `python -m benchmarks.draw` makes
# tables and plots of them, there or on another machine. A part that fails or runs into its time limit does not stop the
# others; the last lines name it, and what is left, and the exit status is then 1. What is left runs when the same
# command is given again: a part with results is not repeated, unless the limit of the whole cut it short. To repeat
# one, delete its NAME.part.json. Results of another card or of other kernels belong into another folder.
#
# Needs torch, triton, transformers, peft, accelerate, jinja2, tqdm, xxhash, pytest and pytest-benchmark, some of its
# tests also datasets; neither the network nor an installation of this project. PYTHON names the interpreter,
# PROCON_GPU_SECONDS the limit for the whole (480). Without a GPU or torch the exit status is 2.
set -uo pipefail

parts=(tests clone rms_norm_penalty projection_penalty training_step_7b tune host_overhead sanitizer training_step
    training_step_compiled anchors anchor_sources)

if [ $# -lt 1 ]; then
    echo "usage: bash benchmarks/gpu.sh FOLDER [PART...]; parts: ${parts[*]}" >&2
    exit 2
fi
asked=("${@:2}")
for name in "${asked[@]}"; do
    if [[ " ${parts[*]} " != *" $name "* ]]; then
        echo "there is no part '$name'; parts: ${parts[*]}" >&2
        exit 2
    fi
done
python=(${PYTHON:-python3} -P)
case $("${python[@]}" -c 'import torch; print(torch.cuda.is_available())' 2>/dev/null) in
    True) ;;
    False)
        echo "there is no GPU that torch can use: run this on a machine with one" >&2
        exit 2
        ;;
    *)
        echo "${PYTHON:-python3} has no torch: name a Python that has it, as in" \
            "PYTHON=/path/to/venv/bin/python bash benchmarks/gpu.sh" >&2
        exit 2
        ;;
esac
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
state="${card:-no NVIDIA card}, kernels $(cat kernels/*.py | cksum | cut -d ' ' -f 1)"
if [ -e "$folder/state" ] && [ "$(cat "$folder/state")" != "$state" ]; then
    echo "$1 has results of: $(cat "$folder/state"); here are: $state. Give another folder" >&2
    exit 2
fi
echo "$state" >"$folder/state"

# Python finds these two and not the folder that they are in: its kernels/ would pass for Hugging Face's package of that
# name. For the same reason it starts with -P, which leaves out the current folder.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
ln -s "$PWD/procon" "$PWD/benchmarks" "$packages"
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
limit=${PROCON_GPU_SECONDS:-480}
failed=()
left_over=()

# record NAME STATUS SECONDS LIMIT FINISHED WHY
record() {
    printf '{"status": %s, "seconds": %d, "limit": %d, "finished": %s, "why": "%s"}\n' "${@:2}" >"$folder/$1.part.json"
}

# due NAME: it is asked for, and not finished. A part that failed before still makes this command fail.
due() {
    local before
    [ ${#asked[@]} -eq 0 ] || [[ " ${asked[*]} " == *" $1 "* ]] || return 1
    before=$(sed -n 's/^{"status": \([0-9]*\),.*"finished": true.*/\1/p' "$folder/$1.part.json" 2>/dev/null)
    [ -n "$before" ] || return 0
    echo "== $1: finished before, status $before"
    [ "$before" = 0 ] || failed+=("$1 ($before)")
    return 1
}

# part NAME SECONDS RESULT COMMAND...: interrupted at its limit, so that pytest still writes what it has. RESULT is the
# file without which nothing came of it. With less than half of its time left a part would only take what the next
# command needs: it is not started.
part() {
    local name=$1 seconds=$2 result=$folder/$3 begin=$SECONDS left=$((limit - SECONDS)) status=0 finished=false why=
    shift 3
    due "$name" || return 0
    if [ "$left" -lt 10 ] || [ $((2 * left)) -lt "$seconds" ]; then
        echo "== $name: not started, $left s are left"
        left_over+=("$name")
        [ -e "$folder/$name.part.json" ] || record "$name" null 0 "$seconds" false "not started: no time was left"
        return
    fi
    local allowed=$((seconds < left ? seconds : left))
    rm -f "$folder/$name".{json,xml,log,part.json}
    timeout --signal=INT --kill-after=20 "$allowed" "$@" >"$folder/$name.log" 2>&1 </dev/null
    status=$?
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        why="stopped by its limit of $allowed s"
    fi
    if [ "$status" = 0 ] || { [ -e "$result" ] && { [ -z "$why" ] || [ "$allowed" = "$seconds" ]; }; }; then
        finished=true
    fi
    record "$name" "$status" $((SECONDS - begin)) "$allowed" "$finished" "$why"
    echo "== $name: status $status, $((SECONDS - begin)) s${why:+, $why}"
    if [ "$status" != 0 ]; then
        [ "$finished" = true ] || left_over+=("$name")
        failed+=("$name ($status)")
    fi
    tail -n 3 "$folder/$name.log"
}

# suite NAME SECONDS FILE [PYTEST ARGUMENTS]
suite() {
    local name=$1 seconds=$2 file=$3
    shift 3
    part "$name" "$seconds" "$name.json" "${python[@]}" -m pytest "benchmarks/$file" -p no:cacheprovider \
        --benchmark-only --benchmark-json "$folder/$name.json" --junitxml "$folder/$name.xml" "$@"
}

# Other test files import packages that this script does without. Compilation for the GPU takes most of the time.
mapfile -t marked < <(grep -rl 'pytest\.mark\.gpu' tests --include 'test_*.py')
workers=()
"${python[@]}" -c 'import xdist' 2>/dev/null && workers=(-n 4)
part tests 150 tests.xml "${python[@]}" -m pytest -m gpu "${workers[@]}" -p no:cacheprovider \
    --continue-on-collection-errors --junitxml "$folder/tests.xml" "${marked[@]}"

suite clone 30 bench_clone.py
suite rms_norm_penalty 150 bench_rms_norm_penalty.py
suite projection_penalty 60 bench_projection_penalty.py
PROCON_BENCHMARK_COMPILE=kernels suite training_step_7b 90 bench_training_step.py -k Llama-2-7B-lora
part tune 120 tune.json "${python[@]}" -m benchmarks.tune --json "$folder/tune.json" --sizes 4096 2048 8192 1024
suite host_overhead 40 bench_host_overhead.py

if sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer); then
    # Without PyTorch's pool each tensor is an allocation of its own, and an access just beyond it shows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PROCON_BENCHMARK_SIZE=smoke part sanitizer 75 sanitizer.log \
        "$sanitizer" --error-exitcode 9 "${python[@]}" -m pytest \
        benchmarks/bench_{projection,rms_norm}_penalty.py --benchmark-only -p no:cacheprovider -k "pass_through or ours"
elif due sanitizer; then
    echo "== sanitizer: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
    record sanitizer null 0 75 false "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
fi

PROCON_BENCHMARK_COMPILE=kernels suite training_step 120 bench_training_step.py -k "not Llama-2-7B-lora"
suite training_step_compiled 120 bench_training_step.py -k Llama-3.2-1B-lora
suite anchors 60 bench_anchors.py
suite anchor_sources 60 bench_anchor_sources.py

echo "== $SECONDS s, results in $folder"
[ ${#failed[@]} -eq 0 ] || printf 'failed: %s\n' "${failed[@]}"
[ ${#left_over[@]} -eq 0 ] || echo "left, give the command again: ${left_over[*]}"
[ ${#failed[@]} -eq 0 ] && [ ${#left_over[@]} -eq 0 ]
