#!/usr/bin/env bash
# All GPU tests and a selection of all benchmarks in one call of at most ten minutes (one H100 needs less).
#
#     scripts/gpu_check.sh              # records go to benchmarks/gpu.jsonl, what was printed to benchmarks/gpu_check.log
#     OUT=/tmp/run scripts/gpu_check.sh # ... to /tmp/run
#     PARTS="tests kernels" scripts/gpu_check.sh
#     PARTS="tests quik" TESTS="test_int8 test_split_cuda" TESTS_LIMIT=60 scripts/gpu_check.sh
#
# Runs from the source, installs nothing, and needs no network. A part that fails or runs out of its time does not stop
# the others; the exit code is then 1 and the last lines say which it was. Tests that time nothing run side by side, one
# process a file, and beside them every benchmark once in small, so that its kernels are compiled when it is timed; the
# few that time something (test_timing.py) have the GPU for themselves afterwards. Other people's kernels compile and
# tune for minutes; PARTS=peers measures those that are installed, in a call of its own.
set -uo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo" || exit 1
out="${OUT:-benchmarks}"
records="$out/gpu.jsonl"
python="${PYTHON:-python3}"
parts=" ${PARTS:-tests sanitizer kernels quik blocks decode prefill mixtral bits experts throughput opt throughput-175 memory} "
mkdir -p "$out" || exit 1
spare="$(mktemp -d)" || exit 1
trap 'rm -rf "$spare"' EXIT
export PYTHONPATH="$repo/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1

"$python" - <<'PY' || exit 1
import importlib.util
import sys

missing = [name for name in ("torch", "triton", "typer", "rich", "pytest") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_check: not installed here: {', '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit("gpu_check: torch sees no CUDA device")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY

tests_limit="${TESTS_LIMIT:-200}"
timing_limit=15
sanitizer_limit=25
# Name, seconds, and arguments of `bitwright bench`.
benchmarks=(
    "kernels 50 kernels --tokens 1,16,32,64,128,256,300,512,2048,8192 --scheme w4a16-g128 --peer dense --peer tinygemm"
    "quik 60 kernels --shape 12288x4096 --shape 22016x4096 --shape 10240x8192 --shape 57344x8192 --tokens 1,2048,8192
        --scheme w4a4-o256 --scheme w8a8 --scheme w4a4-o256-24 --scheme w8a8-24 --peer dense"
    "blocks 30 prefill --model llama-2-70b --model llama-2-7b --layers 2 --prompt 1x2048
        --scheme w4a4-o256 --scheme w4a4-o256-24"
    "decode 40 decode --model llama-2-7b --model llama-2-70b --model mixtral-8x7b --batch 1,4,16"
    "prefill 20 prefill --model llama-2-7b --prompt 1x512 --prompt 1x2048"
    "mixtral 15 prefill --model mixtral-8x7b --layers 2 --prompt 1x512 --prompt 1x2048"
    "bits 26 kernels --shape 22016x4096 --shape 8192x8192 --tokens 1,16,64,2048 --scheme w2a16-g128
        --scheme w3a16-g128 --scheme w8a16-g128 --scheme w4a16-g32 --scheme w4a16-g64 --scheme w4a16-g128-asym
        --peer dense"
    "experts 20 kernels --shape 28672x4096 --shape 4096x14336 --experts 8 --top-k 2 --tokens 1,16,64,512"
    "throughput 27 throughput --model opt-66b --context 2048 --largest 64"
    "opt 22 decode --model opt-175b --scheme w3a16-g128 --no-baseline"
    "throughput-175 28 throughput --model opt-175b --scheme w3a16-g128 --scheme w4a16-g128 --context 512 --largest 64"
    "memory 12 memory --model llama-2-7b --model llama-2-70b --model opt-175b --model mixtral-8x7b
        --scheme 16-bit --scheme w4a16-g128 --scheme w3a16-g128 --scheme w2a16-g128"
    "peers 500 kernels --tokens 1,16,32,64,128"
)

wanted() { [[ "$parts" == *" $1 "* ]]; }

# limited SECONDS COMMAND...: interrupted when they are over, so that Python says where it was. The shell makes what it
# starts in the background deaf to that; env undoes it.
limited() { timeout --signal=INT --kill-after=15 "$1" env --default-signal=INT "${@:2}"; }

failed=()
logs=()
# outcome NAME CODE LIMIT LOG: the last lines of a log, and whether all went well.
outcome() {
    logs+=("$4")
    tail -n 15 "$4"
    (($2 == 124 || $2 == 137)) && echo "gpu_check: $1 ran out of its $3 s"
    (($2 == 0)) || failed+=("$1 ($2)")
}

# tiny SECONDS PREFIX...: tests/gpu/tiny.py, every tensor in an allocation of its own.
tiny() {
    PYTHONPATH="$PYTHONPATH:$repo/tests" PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$1" "${@:2}" "$python" -m gpu.tiny
}

# Every benchmark that is wanted, in small, until $1 seconds are over. Whatever fails here fails again when it counts.
warm() {
    local lane end=$((SECONDS + $1))
    wanted sanitizer && tiny "$1" &>"$spare/tiny.log" &
    # Compiling takes one core each; more at a time would need more memory than the GPU has left beside the tests.
    for lane in 0 1 2; do
        warm_lane "$lane" 3 "$end" >"$spare/warm$lane.log" 2>&1 &
    done
    wait
}

# warm_lane I N END: benchmarks I, I + N, ..., one after the other.
warm_lane() {
    local i words
    for ((i = $1; i < ${#benchmarks[@]}; i += $2)); do
        read -rd '' -a words <<<"${benchmarks[i]}"
        wanted "${words[0]}" && [[ "${words[2]}" != memory ]] && ((SECONDS < $3)) || continue
        [[ "${words[2]}" == decode || "${words[2]}" == prefill ]] && words+=(--layers 2)
        [[ "${words[0]}" == quik ]] && words+=(--tokens 1,2048) # more tokens need no other kernels, but memory
        limited $(($3 - SECONDS)) "$python" -m bitwright.cli bench "${words[@]:2}" --repeats 1 \
            --records "$spare/warm$1.jsonl"
    done
}

# tested NAME SECONDS: one file of tests, its output to a log of its own. Inductor would start a pool of compilers.
tested() {
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 limited "$2" "$python" -m pytest -m gpu -p no:cacheprovider \
        --tb=short --durations=10 "tests/gpu/$1.py" >"$out/$1.log" 2>&1
}

if wanted tests; then
    echo "== tests (at most $tests_limit s)"
    began=$SECONDS
    warm $tests_limit &
    warming=$!
    names=() running=()
    for file in tests/gpu/test_*.py; do
        name="$(basename "$file" .py)"
        [[ "$name" == test_timing || " ${TESTS:-$name} " != *" $name "* ]] && continue
        tested "$name" $tests_limit &
        names+=("$name") running+=($!)
    done
    for i in "${!names[@]}"; do
        code=0
        wait "${running[i]}" || code=$?
        echo "-- ${names[i]}: exit code $code"
        outcome "${names[i]}" "$code" "$tests_limit" "$out/${names[i]}.log"
    done
    spent=$((SECONDS - began))
    wait "$warming"
    echo "== tests: $spent s, kernels compiled after $((SECONDS - began)) s"
    if [[ " ${TESTS:-test_timing} " == *" test_timing "* ]]; then
        echo "== test_timing (at most $timing_limit s)"
        code=0
        tested test_timing $timing_limit || code=$?
        outcome test_timing "$code" "$timing_limit" "$out/test_timing.log"
    elif ((${#names[@]} == 0)); then
        failed+=("TESTS=\"$TESTS\" names no file of tests/gpu")
    fi
fi

# Reads and writes beyond the end of a tensor, by NVIDIA's checker, which comes with CUDA's toolkit and not with PyTorch.
if wanted sanitizer; then
    checker="${SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)}"
    if [[ -n "$checker" ]]; then
        echo "== sanitizer (at most $sanitizer_limit s)"
        began=$SECONDS code=0
        tiny "$sanitizer_limit" "$checker" --error-exitcode 9 >"$out/sanitizer.log" 2>&1 || code=$?
        outcome sanitizer "$code" "$sanitizer_limit" "$out/sanitizer.log"
        echo "== sanitizer: exit code $code after $((SECONDS - began)) s"
    else
        echo "== sanitizer: compute-sanitizer is not installed here; left out"
    fi
fi

for line in "${benchmarks[@]}"; do
    read -rd '' -a words <<<"$line"
    name="${words[0]}" limit="${words[1]}" code=0 began=$SECONDS
    wanted "$name" || continue
    echo "== $name (at most $limit s)"
    limited "$limit" "$python" -m bitwright.cli bench "${words[@]:2}" --records "$records" >"$out/$name.log" 2>&1 ||
        code=$?
    outcome "$name" "$code" "$limit" "$out/$name.log"
    echo "== $name: exit code $code after $((SECONDS - began)) s"
done

# One file of logs, each under its name.
for log in "${logs[@]}"; do
    echo "== $(basename "$log" .log)"
    cat "$log"
done >"$out/gpu_check.log"
((${#logs[@]})) && rm -f "${logs[@]}"

if ((${#failed[@]})); then
    echo "gpu_check: failed: ${failed[*]}"
    exit 1
fi
echo "gpu_check: all parts passed; records in $records"
