"""The stages of cuda_quick.sh, one a call: a function each, that adds its results, cell by cell, to
results.jsonl in --out. Exit code 3 and a last line that says so where something that it needs is
not there."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Any

from cuda_quick import MISSING

HERE = Path(__file__).parent
SHAPES = HERE / "shapes" / "8b"
BUILT = HERE.parent / "build" / "cuda" / "sbd_cuda_tests"  # where the carried one does not start
LLAMA, QWEN = "llama-3.1-8b", "qwen3-8b"
ROWS = (1, 8, 16, 32, 64)
CONTEXT = 1024
_REPEATS = 15
_PACKAGES = ("numpy", "gguf", "tokenizers", "safetensors", "rich", "typer", "jinja2", "torch")
# In place of 8B: a shape that a CPU computes in milliseconds.
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
# What docs/architecture.md says of each; beside the usual ones.
SETTINGS = (
    "",
    "SBD_CUDA_PREFETCH=4",
    "SBD_CUDA_PREFETCH=8",
    "SBD_CUDA_EVICT_FIRST=1",
    "SBD_CUDA_PREFETCH=8 SBD_CUDA_EVICT_FIRST=1",
    "SBD_CUDA_BLOCKS=1",
    "SBD_CUDA_BLOCKS=3",
    "SBD_CUDA_BLOCKS=4",
    "SBD_CUDA_OVERLAP=0",
    "SBD_CUDA_GRAPHS=0",
)


class Missing(Exception):
    """Something that the stage needs is not on this machine."""


class Run:
    def __init__(self, args: Any) -> None:
        self.stage: str = args.stage
        self.dry: bool = args.dry
        self.device = "cpu" if args.dry else "cuda"
        self.context = 24 if args.dry else CONTEXT
        self.repeats = 1 if args.dry else _REPEATS
        self.words: list[str] = args.words.split(",")
        self.carried: Path = args.carried
        self.tests: Path = args.tests or args.carried / "sbd_cuda_tests"
        self._results = args.out / "results.jsonl"

    def cell(self, **values: Any) -> None:
        with self._results.open("a") as out:
            out.write(json.dumps({"stage": self.stage, **values}) + "\n")

    def config(self, shape: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((SHAPES / f"{shape}.json").read_text())
        return config | _TINY if self.dry else config

    def model(self, shape: str, dtype: str) -> tuple[Any, Any]:
        from sbd_engine.engine import engine_options
        from sbd_engine.random_model import random_model

        n_ctx = self.context + max(ROWS)
        settings = engine_options(self.device, None, n_ctx, "f16")
        return random_model(self.config(shape), dtype, settings)


# ---- without Python packages ----


def device(run: Run) -> None:
    gpu = output(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    )
    commit = run.carried / "commit"
    run.cell(
        gpu="No GPU: a dry run" if run.dry else gpu.strip() or "No GPU",
        system=f"{platform.machine()}, {platform.platform()}, Python {platform.python_version()}",
        cores=len(os.sched_getaffinity(0)),
        nvcc=(re.findall(r"release ([\d.]+)", output("nvcc", "--version")) or ["none"])[0],
        packages={name: version_of(name) for name in _PACKAGES},
        tests_lack=lacking(run.tests),
        commit=commit.read_text().strip() if commit.exists() else "not carried",
    )
    spec = util.find_spec("sbd_engine")
    if spec is None or spec.origin is None:
        raise Missing("missing: sbd_engine is not installed for this Python")
    for extension in Path(spec.origin).parent.glob("_core*.so"):
        run.cell(extension=extension.name, lacks=lacking(extension))
    from sbd_engine import Engine

    with Engine(device=run.device, n_ctx=64) as engine:
        run.cell(device=engine.device)


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def lacking(path: Path) -> str:
    """The libraries that are not found, or too old."""
    if not path.exists():
        return f"{path.name} is not there"
    said = output("ldd", str(path))
    return "; ".join(line.strip() for line in said.splitlines() if "not found" in line)


def output(*command: str) -> str:
    """What a program says; nothing where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr


def tests(run: Run) -> None:
    program = run.tests
    with suppress(OSError):
        program.chmod(program.stat().st_mode | 0o111)  # which a copy may have lost
    try:
        asked = subprocess.run([program, "no such"], capture_output=True, text=True, check=False)
        starts = "no test's name contains" in asked.stderr
    except OSError:
        starts = False
    if not starts:
        print(f"{program} does not start: building the tests here", flush=True)
        program = build_tests()
    word = ["out_of_memory"] if run.dry else []
    done = subprocess.run([program, *word], capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    counts = re.search(r"(\d+) tests, (\d+) failed", done.stdout)
    failed = re.findall(r"^FAILED (\S+)", done.stderr, re.MULTILINE)
    notes = re.findall(r": note: (.*)", done.stderr)
    run.cell(
        tests=int(counts[1]) if counts else 0,
        failed=failed,
        notes=notes,
        ended="" if counts else f"died with exit code {done.returncode}",
    )
    if done.returncode != 0:
        some = ", ".join([*failed[:3], *(["..."] if failed[3:] else [])])
        raise SystemExit(f"{len(failed)} tests failed: {some}")


def build_tests() -> Path:
    if shutil.which("nvcc") is None:
        raise Missing("missing: nvcc, to build the tests")
    build = BUILT.parent
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-DSBD_PYTHON=OFF", "-DSBD_TESTS=ON"]
    for command in (
        ["cmake", "-S", str(HERE.parent), "-B", str(build), *ninja, *options],
        ["cmake", "--build", str(build), "-j", str(os.cpu_count()), "--target", "sbd_cuda_tests"],
    ):
        subprocess.run(command, check=True)
    return BUILT


def memcheck(run: Run) -> None:
    sanitize(run, ["memcheck"])


def sanitizer(run: Run) -> None:
    sanitize(run, ["racecheck", "initcheck", "synccheck"])


def sanitize(run: Run, tools: Sequence[str]) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Missing("missing: compute-sanitizer")
    tested = BUILT if BUILT.exists() else run.tests
    clean = True
    for tool in tools:
        for word in run.words:
            command = [program, "--tool", tool, "--error-exitcode", "9", str(tested), word]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(done.stdout[-4000:] + done.stderr[-2000:], flush=True)
            summary = re.findall(r"ERROR SUMMARY: .*", done.stdout)
            ended = summary[-1] if summary else f"exit code {done.returncode}"
            run.cell(tool=tool, tests=word, clean=done.returncode == 0, ended=ended)
            clean = clean and done.returncode == 0
    if not clean:
        raise SystemExit("a tool found something")


# ---- times ----


def forwards(run: Run) -> None:
    time_rows(run, LLAMA, "bf16", ROWS)


def types(run: Run) -> None:
    for shape, dtype in ((LLAMA, "q8_0"), (LLAMA, "q4_k"), (QWEN, "bf16")):
        time_rows(run, shape, dtype, (1, 32))


def time_rows(run: Run, shape: str, dtype: str, rows: Sequence[int], settings: str = "") -> None:
    """A cell for every number of rows: as `sbd-engine bench` times them, one at a time."""
    from sbd_engine.roofline import bytes_read, floor_ms, measure

    with environment(settings):
        core, work = run.model(shape, dtype)
    machine = measure(core)
    for n in rows:
        (samples,) = core.time_forwards([n], run.context, run.repeats)
        ms = median(samples)
        run.cell(
            **({"settings": settings} if run.stage == "sweep" else {}),
            shape=shape,
            type=dtype,
            context=run.context,
            rows=n,
            ms=ms,
            least_ms=min(samples),
            floor_ms=floor_ms(work, n, run.context, machine),
            read_gb_s=bytes_read(work, run.context) / ms / 1e6,
            peak_gb_s=machine["read_gb_s"],
        )


@contextmanager
def environment(settings: str) -> Iterator[None]:
    """An engine reads them when it is made."""
    wanted = dict(setting.split("=") for setting in settings.split())
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]


def sweep(run: Run) -> None:
    for settings in SETTINGS:
        for dtype, rows in (("bf16", (1, 32, 64)), ("q8_0", (1,))):
            time_rows(run, LLAMA, dtype, rows, settings)


def profile(run: Run) -> None:
    core, _ = run.model(LLAMA, "bf16")
    for rows in (1, 32, 64):
        run.cell(shape=LLAMA, type="bf16", rows=rows, **core.profile_forward(rows, run.context))


def generations(run: Run) -> None:
    from cuda_speed import decoding

    config = run.config(LLAMA)
    batches = (1, 2) if run.dry else (1, 8)
    repeats = 1 if run.dry else 5
    for cell in decoding(config, "bf16", run.device, [run.context], batches, repeats):
        run.cell(shape=LLAMA, type="bf16", **cell)


def torch(run: Run) -> None:
    """Next-token decoding in turn with PyTorch's, in bf16."""
    from cuda_speed import decode
    from peers.process import PeerError, Process
    from peers.worker import Missing as PeerMissing

    from sbd_engine.engine import engine_options
    from sbd_engine.random_model import random_model

    context, tokens = run.context, 8 if run.dry else 256
    n_ctx = context + 256 + 64
    for shape in (LLAMA, QWEN):
        config = run.config(shape)
        options = {"config": config, "device": run.device, "n_ctx": n_ctx}
        try:
            peer = Process("peers.torch_cuda", options, Path(f"{shape}.torch.log"))
        except (PeerMissing, PeerError) as error:
            raise Missing(f"missing: {error}") from None
        core, _ = random_model(config, "bf16", engine_options(run.device, None, n_ctx, "f16"))
        try:
            for _ in range(1 if run.dry else 3):
                run.cell(
                    shape=shape,
                    context=context,
                    tok_s=decode(core, context, 1, "ntp").tok_s,
                    torch_tok_s=peer.call("tok_s", context=context, tokens=tokens),
                    about=peer.about,
                )
        finally:
            peer.close()


# ---- agreement ----


def agreement(run: Run) -> None:
    from cuda_agreement import CASES, compare_tokens, logits_errors

    vocab, prompts = (256, 6) if run.dry else (4096, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = ("f32", "bf16", "q8_0")
        for case, error in logits_errors(run.config(LLAMA), folder, run.device, cases, vocab):
            run.cell(shape=LLAMA, case=case, error=error, bound=CASES[case].bound)
        run.cell(**compare_tokens(folder, run.device, prompts))


# ---- counters ----

_METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
}


def ncu(run: Run) -> None:
    program = shutil.which("ncu")
    if program is None:
        raise Missing("missing: ncu")
    for rows in (1, 32):
        command = [program, "--clock-control", "none", "--csv", "--metrics", ",".join(_METRICS)]
        command += ["--kernel-name", "regex:linear_kernel", "--launch-skip", "20"]
        command += ["--launch-count", "9"]  # two layers and the head
        command += [sys.executable, __file__, "one_forward", "--out", str(run._results.parent)]
        command += ["--words", str(rows), "--carried", str(run.carried)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout[-6000:] + done.stderr[-2000:], flush=True)
        if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
            raise Missing("missing: the right to read the GPU's counters")
        if done.returncode != 0:
            raise SystemExit(f"ncu: exit code {done.returncode}")
        for kernel in counters(done.stdout):
            run.cell(rows=rows, **kernel)


def counters(said: str) -> list[dict[str, Any]]:
    """A kernel each, of ncu's --csv behind what the program itself said."""
    lines = said.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[header:]):
        kernel = kernels.setdefault(row["ID"], {"grid": row["Grid Size"]})
        name = _METRICS.get(row["Metric Name"])
        if name is not None:
            kernel[name] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def one_forward(run: Run) -> None:
    """What ncu looks at: forwards of two layers, kernel by kernel."""
    from sbd_engine.engine import engine_options
    from sbd_engine.random_model import random_model

    config = run.config(LLAMA) | {"num_hidden_layers": 2}
    settings = engine_options(run.device, None, run.context + max(ROWS), "f16")
    with environment("SBD_CUDA_GRAPHS=0"):
        core, _ = random_model(config, "bf16", settings)
    core.time_forwards([int(run.words[0])], run.context, 8)


PARTS: dict[str, Callable[[Run], None]] = {
    part.__name__: part
    for part in (
        *(device, tests, forwards, profile, types, generations, agreement, ncu, memcheck),
        *(sweep, sanitizer, torch, one_forward),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(PARTS))
    for name in ("--out", "--carried"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--words", required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    try:
        PARTS[args.stage](Run(args))
    except (Missing, ImportError) as error:
        print(error if isinstance(error, Missing) else f"missing: {error}", flush=True)
        raise SystemExit(MISSING) from None
    except Exception as error:
        if type(error).__module__.startswith("sbd_engine"):
            print(f"error: {error}", flush=True)
            raise SystemExit(1) from None
        raise


if __name__ == "__main__":
    main()
