"""Builds the C++ tests and runs them on every instruction set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .isas import ISAS

pytestmark = pytest.mark.xdist_group("cpp")


@pytest.mark.parametrize("isa", [None, *ISAS])
def test_cpp(isa: str | None, binaries: Path) -> None:
    """By default kernels are tested on every instruction set, and what is built on them on the
    best; then what is built on them, on each of the others."""
    forced = {"SBD_ISA": isa, "SBD_LEAVE_KERNELS": "1"} if isa else {"SBD_ISA": ""}
    environment = os.environ | forced
    done = subprocess.run(
        [binaries / "sbd_tests"], env=environment, capture_output=True, text=True, check=False
    )
    if "this CPU does not support it" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_cuda_emulated(binaries: Path) -> None:
    """The CUDA backend's own sources on a GPU in software, its threads in either order at once."""
    runs = [
        subprocess.Popen(
            [binaries / "tests" / "cuda_emulation" / "sbd_cuda_emulated_tests"],
            env={**os.environ, "SBD_EMULATION_ORDER": order},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for order in ("ascending", "descending")
    ]
    output = [run.communicate()[0] for run in runs]
    for run, said in zip(runs, output, strict=True):
        assert run.returncode == 0, said[-5000:]


def test_cpp_refuses_an_unknown_test(binaries: Path) -> None:
    """The runner does not pass by running nothing."""
    done = subprocess.run(
        [binaries / "sbd_tests", "no such test"], capture_output=True, check=False
    )
    assert done.returncode != 0


def test_fuzz(binaries: Path) -> None:
    """A short run; CI runs more under AddressSanitizer, benchmarks/long.sh a million."""
    done = subprocess.run(
        [binaries / "fuzz_gguf", "--iterations", "2000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
