"""For which GPUs the CUDA backend is built: those that nvidia-smi names, all where asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_NVCC = shutil.which("nvcc") is not None

pytestmark = pytest.mark.xdist_group("build")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: CMake's look at the compilers takes 10 s, and is kept."""
    return tmp_path_factory.mktemp("build")


def configure(folder: Path, wanted: str, gpus: str | None) -> subprocess.CompletedProcess[str]:
    """CMake's answer on a machine with these GPUs; None: without NVIDIA's tools."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + (f"printf '{gpus}'\n" if gpus else "exit 9\n"))
    tool.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja"]
    return subprocess.run(
        [*command, "-DSBD_PYTHON=OFF", f"-DSBD_CUDA={wanted}"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (None, "left out, no GPU"),
        ("7.5\\n", "left out, no GPU of compute capability 8.0 or newer"),
        ("9.0\\n8.6\\n9.0\\n", "for 90-real;86-real" if HAS_NVCC else "left out, no nvcc"),
        ("99.0\\n", "for 90-virtual" if HAS_NVCC else "left out, no nvcc"),
    ],
)
def test_auto(gpus: str | None, expected: str, folder: Path) -> None:
    done = configure(folder, "AUTO", gpus)
    assert done.returncode == 0, done.stderr
    assert f"CUDA backend: {expected}" in done.stdout


@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
def test_each_file_of_kernels_is_compiled_alone(folder: Path) -> None:
    """Whichever CMake: from 3.31 on it would join them, as it joins C++ files."""
    assert configure(folder, "ON", None).returncode == 0
    kernels = {str(path) for path in (ROOT / "engine/backend/cuda").glob("*.cu")}
    compiled = json.loads((folder / "build/compile_commands.json").read_text())
    assert kernels == {one["file"] for one in compiled if one["file"].endswith(".cu")}


def test_on_is_for_all_and_off_for_none(folder: Path) -> None:
    done = configure(folder, "ON", None)
    if HAS_NVCC:
        assert done.returncode == 0, done.stderr
        assert "CUDA backend: for 80-real;86-real;89-real;90-real" in done.stdout
        assert "90-virtual\n" in done.stdout
    else:
        assert "SBD_CUDA is ON, but no nvcc was found" in done.stderr
    assert "CUDA" not in configure(folder, "OFF", "9.0").stdout
    done = configure(folder, "yes", None)
    assert done.returncode != 0
    assert "SBD_CUDA is yes: expected ON, OFF or AUTO" in done.stderr
