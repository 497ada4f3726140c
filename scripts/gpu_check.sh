#!/usr/bin/env bash
# All GPU tests and a selection of all benchmarks in one call of at most ten minutes (one H100 needs less).
#
#     scripts/gpu_check.sh              # records go to benchmarks/gpu.jsonl
#     OUT=/tmp/run scripts/gpu_check.sh # ... to /tmp/run/gpu.jsonl
#     PARTS="tests kernels" scripts/gpu_check.sh
#
# Runs from the source, installs nothing, and needs no network. A part that fails or runs out of its time does not stop
# the others; the exit code is then 1 and the last lines say which it was. Other people's kernels compile and tune for
# minutes; PARTS=peers measures those that are installed, in a call of its own.
set -uo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo" || exit 1
out="${OUT:-benchmarks}"
records="$out/gpu.jsonl"
python="${PYTHON:-python3}"
parts="${PARTS:-tests kernels bits experts memory decode prefill}"
mkdir -p "$out" || exit 1
export PYTHONPATH="$repo/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

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

failed=()
# part NAME SECONDS COMMAND...
part() {
    local name="$1" limit="$2" code=0 began=$SECONDS
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" || code=$?
    ((code == 124 || code == 137)) && echo "gpu_check: $name ran out of its $limit s"
    ((code == 0)) || failed+=("$name ($code)")
    echo "== $name: exit code $code after $((SECONDS - began)) s"
}
bench() {
    part "$1" "$2" "$python" -m bitwright.cli bench "${@:3}" --records "$records"
}

part tests 150 "$python" -m pytest -m gpu -p no:cacheprovider tests/gpu
bench kernels 160 kernels --tokens 1,16,64,256,2048 --scheme w4a16-g128 \
    --peer dense --peer tinygemm
bench bits 60 kernels --shape 22016x4096 --shape 8192x8192 --tokens 1,16,64,2048 \
    --scheme w2a16-g128 --scheme w3a16-g128 --scheme w8a16-g128 --peer dense
bench experts 35 kernels --shape 28672x4096 --shape 4096x14336 --experts 8 --top-k 2 --tokens 1,16,64,512
bench memory 20 memory --model llama-2-7b --model llama-2-70b --model opt-175b --model mixtral-8x7b \
    --scheme 16-bit --scheme w4a16-g128 --scheme w3a16-g128 --scheme w2a16-g128
bench decode 95 decode --model llama-2-7b --model llama-2-70b --model opt-175b --model mixtral-8x7b --batch 1,16
bench prefill 60 prefill --model llama-2-7b --prompt 1x512 --prompt 1x2048
bench peers 500 kernels --shape 4096x4096 --shape 22016x4096 --shape 8192x8192 --tokens 1,16,64,256,2048

if ((${#failed[@]})); then
    echo "gpu_check: failed: ${failed[*]}"
    exit 1
fi
echo "gpu_check: all parts passed; records in $records"
