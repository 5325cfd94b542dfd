#!/usr/bin/env bash
# Builds what benchmarks/cuda_quick.sh runs, on a machine that has nvcc and need not have a GPU: the
# C++ tests and a wheel, for one GPU and one Python, and gguf's wheel.
#
#   benchmarks/cuda_prepare.sh [FOLDER]
#
# Into FOLDER (build/cuda-quick without; at most 20 MiB). PYTHON is a Python of the version that the
# GPU's machine has, with its headers (python3.12 where it is not set): a wheel is for one version.
# ARCHITECTURE is the GPU's, 90-real where it is not set (H100, H200).
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/cuda-quick}
python=${PYTHON:-python3.12}
architecture=${ARCHITECTURE:-90-real}
build=build/cuda-prepare
most_kib=$((20 * 1024))

say() {
  echo "error: $1" >&2
  exit 2
}

command -v nvcc >/dev/null || say "no nvcc was found: put it on PATH"
headers=$("$python" -c 'import os, sysconfig
path = sysconfig.get_path("include")
print(path if os.path.exists(os.path.join(path, "Python.h")) else "")') ||
  say "PYTHON=$python does not run: expected the Python of the GPU's machine, such as a 3.12"
[ -n "$headers" ] || say "PYTHON=$python has no Python.h: install its headers"

rm -rf "$folder"
mkdir -p "$folder" build
# One build of the kernels for both. The wheel's own tools come from the package registry.
"$python" -m pip wheel -q --no-deps -w "$folder" . -C build-dir="$build" \
  -C build.targets='_core;sbd_cuda_tests' -C cmake.define.SBD_CUDA=ON -C cmake.define.SBD_TESTS=ON \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture" >build/cuda-prepare.log 2>&1 ||
  { tail -40 build/cuda-prepare.log >&2 && say "the build failed: see build/cuda-prepare.log"; }
strip -o "$folder/sbd_cuda_tests" "$build/sbd_cuda_tests"
"$python" -m pip download -q --no-deps --only-binary=:all: -d "$folder" 'gguf>=0.10'
git describe --always --dirty --abbrev=12 >"$folder/commit" 2>/dev/null || echo unknown >"$folder/commit"

du -k "$folder"/*
kib=$(du -sk "$folder" | cut -f1)
[ "$kib" -le "$most_kib" ] || say "$folder: $kib KiB, expected at most $most_kib"
echo "$folder: $kib KiB, for $("$python" -V) and $architecture"
