#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU can say about the CUDA backend, in one call: builds it for
# that GPU, runs its tests there, looks for faults with compute-sanitizer, compares the demo model's
# tokens with the CPU's, and times forwards of 8B shapes with random weights.
# Needs nvcc, CMake and a C++ compiler; nothing is downloaded.
#
#   benchmarks/cuda_suite.sh [BUILD_FOLDER] [SHAPE:TYPE ...]
#
# Shapes: llama-3.1-8b, qwen3-8b, qwen3-0.6b; types: bf16, f16, q8_0, q4_0, f32.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda}
shift || true
subjects=("$@")
[ ${#subjects[@]} -gt 0 ] || subjects=(llama-3.1-8b:bf16 qwen3-8b:bf16 llama-3.1-8b:q8_0 llama-3.1-8b:q4_0)

stage() {
  printf '\n=== %s (%d s so far)\n' "$1" "$SECONDS"
}

stage "build"
mkdir -p "$(dirname "$build")"
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
cmake -S . -B "$build" "${generator[@]}" -DSBD_CUDA=ON -DSBD_PYTHON=OFF -DSBD_TESTS=ON \
  -DCMAKE_CUDA_ARCHITECTURES=native >"$build.log" 2>&1 || { tail -20 "$build.log"; exit 1; }
cmake --build "$build" -j "$(nproc)" --target sbd_cuda_tests sbd_cuda_suite >>"$build.log" 2>&1 ||
  { tail -40 "$build.log"; exit 1; }

stage "tests on the GPU"
"$build/sbd_cuda_tests"

stage "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  # A few tests each: under these tools a kernel takes a hundred times as long.
  for tool in memcheck racecheck initcheck synccheck; do
    for tests in cuda_rows_are cuda_attention_of_several cuda_draws cuda_generates; do
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/sbd_cuda_tests" "$tests" \
        >"$build.$tool.log" 2>&1 || { tail -20 "$build.$tool.log"; exit 1; }
    done
    echo "$tool: clean"
  done
else
  echo "not installed: left out"
fi

stage "tokens of the demo model, GPU beside CPU"
"$build/sbd_cuda_suite" tokens sbd_engine/models/demo.bin

stage "forwards"
for subject in "${subjects[@]}"; do
  "$build/sbd_cuda_suite" time "${subject%:*}" "${subject#*:}"
done
stage "done"
