#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU can say about the CUDA backend, in one call: builds it for
# that GPU, runs its tests there, looks for faults with compute-sanitizer, compares it with the CPU,
# and times forwards and generations of 8B shapes with random weights (cuda_suite.py).
#
#   benchmarks/cuda_suite.sh [--write-docs] [PART ...]
#
# Parts, all of them without: tests sanitizer agreement forwards generations torch. The first two
# need nvcc, CMake and a C++ compiler; the others sbd-engine built with CUDA for PYTHON, which is
# installed into build/cuda-venv where PYTHON is not set; the last one PyTorch and transformers.
# Results go to build/benchmarks/cuda_suite.json, and with --write-docs to docs/results-gpu.md.
set -euo pipefail
cd "$(dirname "$0")/.."

docs=()
[[ ${1:-} == --write-docs ]] && docs=("$1") && shift
parts=("$@")
[ $# -gt 0 ] || parts=(tests sanitizer agreement forwards generations torch)
build=build/cuda

stage() {
  printf '\n=== %s (%d s so far)\n' "$1" "$SECONDS"
}

# The rest of the arguments as a command, whose output is shown only where it fails.
quiet() {
  local log=$1
  shift
  mkdir -p build
  "$@" >"$log" 2>&1 || { tail -40 "$log" && exit 1; }
}

build_tests() {
  [ -n "${built:-}" ] && return
  stage "build"
  local generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  quiet $build.log cmake -S . -B $build "${generator[@]}" -DSBD_PYTHON=OFF -DSBD_TESTS=ON
  grep 'CUDA backend' $build.log
  grep -q 'CUDA backend: for' $build.log || exit 1
  quiet $build.log cmake --build $build -j "$(nproc)" --target sbd_cuda_tests
  built=yes
}

tests() {
  build_tests
  stage "tests on the GPU"
  $build/sbd_cuda_tests
}

sanitizer() {
  build_tests
  stage "compute-sanitizer"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "not installed: left out"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    quiet $build.$tool.log compute-sanitizer --tool $tool --error-exitcode 9 $build/sbd_cuda_tests
    echo "$tool: clean"
  done
}

install() {
  if [ -z "${PYTHON:-}" ]; then
    stage "install"
    python3 -m venv build/cuda-venv
    PYTHON=$PWD/build/cuda-venv/bin/python
    quiet $build-venv.log "$PYTHON" -m pip install .
  fi
}

python_parts=()
for part in "${parts[@]}"; do
  case $part in
    tests | sanitizer) ;;
    agreement | forwards | generations | torch) python_parts+=("$part") ;;
    *)
      echo "error: $part: expected tests, sanitizer, agreement, forwards, generations or torch" >&2
      exit 2
      ;;
  esac
done
for part in "${parts[@]}"; do
  if [[ $part == tests || $part == sanitizer ]]; then $part; fi
done
if [ ${#python_parts[@]} -gt 0 ]; then
  install
  stage "${python_parts[*]}"
  "$PYTHON" benchmarks/cuda_suite.py --parts "$(IFS=, && echo "${python_parts[*]}")" "${docs[@]}"
fi
stage "done"
