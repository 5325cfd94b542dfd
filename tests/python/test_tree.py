"""The doors between the rooms of the tree, and what the units of the instruction sets export."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .isas import ISAS

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine"
SOURCES = [
    file
    for folder in (ENGINE, ROOT / "bindings")
    for pattern in ("*.cpp", "*.h", "*.cu")
    for file in folder.rglob(pattern)
]

# What a room may include, as beginnings of paths; a file belongs to the first room that fits.
DOORS = {
    "engine/core/": ["core/"],
    "engine/format/": ["core/", "format/"],
    "engine/backend/backend.h": ["core/"],
    "engine/backend/cpu/": ["core/", "backend/backend.h", "backend/cpu/"],
    "engine/backend/cuda/": ["core/", "backend/backend.h", "backend/cuda/"],
    "engine/model/": ["core/", "format/", "model/", "backend/backend.h"],
    "engine/decode/": ["core/", "decode/"],
    "engine/engine.cpp": [
        *("core/", "format/", "model/", "decode/", "decode_defaults.h", "backend/", "engine.h")
    ],
    "engine/timing.cpp": ["core/", "model/", "backend/backend.h", "engine.h"],
    "engine/engine.h": ["core/", "format/", "decode/", "request.h", "scheduler.h"],
    "engine/scheduler.": [
        "core/",
        "decode/",
        "model/",
        "kv_claims.h",
        "prefix_index.h",
        "scheduler.h",
    ],
    "engine/prefix_index.": ["core/", "prefix_index.h"],
    "engine/loop.": ["core/", "engine.h", "loop.h", "request.h"],
    "engine/request.": ["core/", "format/", "decode/", "request.h"],
    "engine/decode_defaults.": ["core/", "format/", "decode/", "decode_defaults.h"],
    "bindings/": [
        *("core/", "format/", "decode/", "decode_defaults.h", "engine.h", "loop.h", "metadata.h"),
        *("gil.h", "grammar.h", "request.h"),
    ],
}
# What no Python file of a folder may import.
SHUT = {
    "convert": {"sbd_engine", "training", "tests"},
    "training": {"sbd_engine", "tests"},
    "tests/reference": {"sbd_engine", "convert", "training"},
}


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, flags=re.MULTILINE)


def allowed(path: str, included: str) -> bool:
    for room, doors in DOORS.items():
        if path.startswith(room):
            return any(included.startswith(door) for door in doors)
    return False


def imports(text: str) -> set[str]:
    """Top-level names of the modules a file imports, ".." for one outside its package."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            found.add("..")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_includes_keep_to_the_doors() -> None:
    count = 0
    for file in SOURCES:
        path = file.relative_to(ROOT).as_posix()
        for included in includes(file.read_text()):
            count += 1
            assert allowed(path, included), f"{path} includes {included}"
    assert count > 100


@pytest.mark.parametrize("folder", SHUT)
def test_imports_keep_to_the_doors(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        crossed = imports(file.read_text()) & (SHUT[folder] | {".."})
        assert not crossed, f"{file.relative_to(ROOT)} imports {crossed}"


def test_the_doors_shut() -> None:
    assert includes('#include "a/b.h"\n// #include "c.h"\n#include <d>') == ["a/b.h"]
    assert allowed("engine/engine.cpp", "backend/cpu/cpu_backend.h")
    for path, included in (
        ("engine/engine.h", "backend/backend.h"),
        ("engine/backend/backend.h", "format/gguf.h"),
        ("engine/decode/ntp.cpp", "backend/backend.h"),
        ("engine/model/transformer.cpp", "backend/cpu/cpu_backend.h"),
        ("engine/backend/cpu/head.cpp", "decode/unmask.h"),
        ("engine/core/error.h", "format/text.h"),
        ("bindings/module.cpp", "model/transformer.h"),
        ("engine/another_room/file.cpp", "core/error.h"),
    ):
        assert not allowed(path, included)
    assert imports("def f():\n    from sbd_engine.engine import Engine") == {"sbd_engine"}
    assert imports("from .. import _core") == {".."}
    assert imports("from .errors import ConvertError\nimport numpy.linalg as n") == {"numpy"}


def unit_flags() -> dict[str, list[str]]:
    """Compiler flags of each instruction set's unit, as engine/CMakeLists.txt sets them."""
    flags: dict[str, str] = {}
    for name, value in re.findall(
        r"set\(((?:AVX|NEON)\w*_FLAGS) (.+)\)", (ENGINE / "CMakeLists.txt").read_text()
    ):
        flags[name] = re.sub(r"\$\{(\w+)\}", lambda match: flags[match[1]], value)
    units = ENGINE.glob("backend/cpu/kernels_*.cpp")
    names = sorted(unit.stem.removeprefix("kernels_") for unit in units)
    return {name: flags.get(f"{name.upper()}_FLAGS", "").split() for name in names}


def test_every_instruction_set_has_its_flags() -> None:
    flags = unit_flags()
    assert list(flags) == ["avx2", "avx2_vnni", "avx512", "avx512_bf16", "neon", "scalar"]
    assert flags["scalar"] == []
    assert set(flags["avx2"]) < set(flags["avx2_vnni"])
    assert set(flags["avx2"]) < set(flags["avx512"]) < set(flags["avx512_bf16"])
    assert flags["neon"] == ["-march=armv8.2-a+dotprod"]


# An inline function that two objects define is linked once, and the copy that stays may be the one
# compiled for instructions the machine lacks. So a unit exports its kernel table and nothing else.
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64")
    or not (shutil.which("g++") and shutil.which("nm")),
    reason="needs g++ and nm on x86-64 or aarch64",
)
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_units_export_only_their_table(isa: str, tmp_path: Path) -> None:
    unit = ENGINE / "backend" / "cpu" / f"kernels_{isa}.cpp"
    compiled = tmp_path / "unit.o"
    # Unoptimised, as then every inline function that is used is emitted.
    command = ["g++", "-std=c++20", "-O0", f"-I{ENGINE}", *unit_flags()[isa], "-c", str(unit)]
    subprocess.run([*command, "-o", str(compiled)], check=True, capture_output=True)
    listing = subprocess.run(["nm", "-C", compiled], check=True, capture_output=True, text=True)
    symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    # Capital letters are global; v, w and u are weak or unique. Undefined ones have no address.
    exported = {line[2] for line in symbols if len(line) == 3 and line[1] in "ABCDGRSTVWiuvw"}
    assert exported == {f"sbd::cpu::{isa}::kernels"}
