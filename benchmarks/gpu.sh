#!/usr/bin/env bash
# Everything that needs a GPU, in one go: bash benchmarks/gpu.sh FOLDER
#
# FOLDER gets a log of each part and the suites' JSON. A part that fails or runs into its time limit does not stop the
# others; the last lines name it, and the exit status is then 1. Needs torch, triton, transformers, peft, accelerate,
# pytest and pytest-benchmark; neither the network nor an installation of this project. PYTHON names the interpreter,
# PROCON_GPU_SECONDS the limit for the whole (480).
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash benchmarks/gpu.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
# Python finds these two and not the folder that they are in: its kernels/ would pass for Hugging Face's package of that
# name. For the same reason it starts with -P, which leaves out the current folder.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
ln -s "$PWD/procon" "$PWD/benchmarks" "$packages"
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=(${PYTHON:-python3} -P)
limit=${PROCON_GPU_SECONDS:-480}
failed=()

# part NAME SECONDS COMMAND...: interrupted at its limit, so that pytest still writes what it has.
part() {
    local name=$1 seconds=$2 begin=$SECONDS status=0
    shift 2
    local left=$((limit - SECONDS))
    if [ "$left" -lt 10 ]; then
        status="not started: no time left"
    else
        timeout --signal=INT --kill-after=10 "$((seconds < left ? seconds : left))" "$@" >"$folder/$name.log" 2>&1 </dev/null
        status=$?
    fi
    echo "== $name: status $status, $((SECONDS - begin)) s"
    [ "$status" = 0 ] || failed+=("$name ($status)")
    tail -n 3 "$folder/$name.log" 2>/dev/null
}

# suite NAME SECONDS FILE [PYTEST ARGUMENTS]
suite() {
    local name=$1 seconds=$2 file=$3
    shift 3
    part "$name" "$seconds" "${python[@]}" -m pytest "benchmarks/$file" --benchmark-only --benchmark-json "$folder/$name.json" "$@"
}

# Other test files import packages that this script does without.
mapfile -t marked < <(grep -rl 'mark\.gpu' tests --include 'test_*.py')
part tests 180 "${python[@]}" -m pytest -m gpu "${marked[@]}"

PROCON_BENCHMARK_COMPILE=kernels suite training_step_7b 75 bench_training_step.py -k Llama-2-7B-lora
suite rms_norm_penalty 60 bench_rms_norm_penalty.py
suite projection_penalty 60 bench_projection_penalty.py
suite host_overhead 40 bench_host_overhead.py

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
if [ -n "$sanitizer" ]; then
    # Without PyTorch's pool each tensor is an allocation of its own, and an access just beyond it shows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PROCON_BENCHMARK_SIZE=smoke part sanitizer 75 "$sanitizer" --error-exitcode 9 \
        "${python[@]}" -m pytest benchmarks/bench_{projection,rms_norm}_penalty.py --benchmark-only \
        -k "pass_through or ours"
else
    echo "== sanitizer: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
fi

part tune 90 "${python[@]}" -m benchmarks.tune --sizes 1024 2048 4096 8192
suite anchors 60 bench_anchors.py
suite anchor_sources 60 bench_anchor_sources.py
PROCON_BENCHMARK_COMPILE=kernels suite training_step 120 bench_training_step.py -k "not Llama-2-7B-lora"
suite training_step_compiled 120 bench_training_step.py -k Llama-3.2-1B-lora

echo "== $SECONDS s, results in $folder"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
