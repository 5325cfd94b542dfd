#!/usr/bin/env bash
# What a GPU says of the CUDA backend, in 350 seconds: whether it computes what the CPU does, how
# long forwards and generations of 8B shapes take beside what its memory allows, and where the time
# goes. The most telling stage comes first, each has its own time limit, none ends the others, and
# every result is in a file the moment it is there. Nothing is fetched: cuda_prepare.sh built it.
#
#   benchmarks/cuda_quick.sh --out FOLDER [--stages NAMES] ...      (--help lists all)
#
# Stages, in this order: device tests forwards profile types generations agreement ncu memcheck; for
# a second call sweep (of the settings in docs/architecture.md), sanitizer and torch. With --dry the
# whole of it on a machine without a GPU, tiny: the CPU and the emulated GPU in its place.
set -uo pipefail
cd "$(dirname "$0")/.."
unset PYTHONSAFEPATH # the scripts of this folder import each other
exec "${PYTHON:-python3}" benchmarks/cuda_quick.py "$@"
