#!/usr/bin/env bash
# Fetches what the kernels are compared with into .peers/, which travels to the GPU as it is:
# three wheels, and of SGLang's only the Triton sources. About 16 MB; nothing of it is ever committed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
platforms=()
for glibc in 34 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

fetch() {  # folder, requirements...
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$@"
}

rm -rf .peers
mkdir -p .peers/sources
fetch .peers tokenspeed-flashmla==1.0.0.post20260615 sgl-deep-gemm==0.1.2 apache-tvm-ffi==0.1.9
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
fetch "$whole" sglang==0.5.23
ops=sglang/kernels/ops
unzip -q "$whole"/sglang-*.whl -d .peers/sources \
  $ops/attention/decode_attention.py $ops/attention/score_mod.py \
  $ops/moe/fused_moe_triton_kernels.py $ops/moe/moe_fused_gate.py
du -sh .peers
