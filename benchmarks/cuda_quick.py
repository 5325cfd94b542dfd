"""Runs the stages of cuda_stages.py, each in a process of its own with its own time limit, and
prints what they found. Uses nothing but Python itself: what a stage needs and this machine lacks is
that stage's loss alone. benchmarks/cuda_quick.sh says more."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

HERE = Path(__file__).parent
CARRIED = HERE.parent / "build" / "cuda-quick"
_BUILD_S = 150  # at most, where the carried engine does not import
MISSING = 3  # a stage's exit code where something that it needs is not there; says what, last


class Stage(NamedTuple):
    name: str
    limit_s: float
    about: str


FIRST = (
    Stage("device", 15, "the GPU, its driver, what is carried and what that lacks"),
    Stage("tests", 90, "the C++ tests; built here where the carried ones do not start"),
    Stage("forwards", 30, "Llama-3.1-8B bf16, context 1024, of 1 to 64 rows"),
    Stage("profile", 30, "where a forward's time goes, kernel by kernel"),
    Stage("types", 45, "Q8_0 and Q4_K, then Qwen3-8B"),
    Stage("generations", 40, "whole generations at replayed acceptance, batch 1 and 8"),
    Stage("agreement", 80, "logits and texts beside the CPU's"),
    Stage("ncu", 35, "what the counters say of the matmuls"),
    Stage("memcheck", 120, "the linear and attention tests under compute-sanitizer"),
)
SECOND = (
    Stage("sweep", 240, "every setting of the environment beside the usual ones"),
    Stage("sanitizer", 240, "racecheck, initcheck and synccheck of the tests that --words name"),
    Stage("torch", 240, "next-token decoding beside PyTorch's"),
)
STAGES = {stage.name: stage for stage in (*FIRST, *SECOND)}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    results.write_text("")
    log = args.out / "log.txt"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as said:
        environment = install(args.carried, Path(folder) / "site", said, args.dry)
        for name in args.stages:
            left = args.total - (time.monotonic() - began)
            limit = min(args.limit.get(name, STAGES[name].limit_s), left)
            started = time.monotonic()
            ended = run_stage(name, args, limit, folder, environment, said)
            seconds = time.monotonic() - started
            record = {"stage": name, "ended": ended, "seconds": round(seconds, 1)}
            with results.open("a") as out:
                out.write("\n" + json.dumps(record) + "\n")  # a cell may have been cut off
            print(f"{name}: {ended}, {seconds:.1f} s", flush=True)
    import cuda_page

    text = cuda_page.gpu_page(cuda_page.read(results))
    (args.out / "results.md").write_text(text)
    print(f"\n{text}\nwrote {results} and results.md", flush=True)


def arguments() -> Any:
    parser = Parser(
        prog="cuda_quick.sh",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages:\n" + "\n".join(f"  {s.name:12}{s.about}" for s in STAGES.values()),
    )
    first = ",".join(stage.name for stage in FIRST)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", type=stages, default=first, help=f"default: {first}")
    parser.add_argument("--total", type=seconds, default=350, help="seconds for all of them")
    parser.add_argument(
        "--limit",
        type=stage_limit,
        action="append",
        default=[],
        metavar="STAGE=SECONDS",
        help="another time limit of a stage",
    )
    parser.add_argument(
        "--carried", type=Path, default=CARRIED, help="what cuda_prepare.sh built (%(default)s)"
    )
    parser.add_argument("--words", default="linear,attention", help="of tests' names, to sanitize")
    parser.add_argument("--dry", action="store_true", help="without a GPU, tiny")
    parser.add_argument("--tests", type=Path, help="the tests' program, if not the carried one")
    args = parser.parse_args()
    args.limit = dict(args.limit)
    return args


def stages(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(STAGES)}, got {name!r}")
    return names


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def stage_limit(text: str) -> tuple[str, float]:
    name, equals, limit = text.partition("=")
    if not equals or name not in STAGES:
        raise argparse.ArgumentTypeError(f"expected STAGE=SECONDS, got {text!r}")
    return name, seconds(limit)


def install(carried: Path, site: Path, said: Any, dry: bool) -> dict[str, str]:
    """The environment of the stages: with the carried wheels. Where this Python does not take them,
    the engine is built here."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if dry:
        return environment
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *([before] if before else [])])
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]

    def succeeds(command: Sequence[str]) -> bool:
        try:
            return not subprocess.run(
                command,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=site.parent,
                timeout=_BUILD_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return False

    wheels = sorted(str(wheel.absolute()) for wheel in carried.glob("*.whl"))
    if wheels and not succeeds([*command, "--no-index", "--no-compile", *wheels]):
        print("the carried wheels do not install: see log.txt", flush=True)
    imports = [sys.executable, "-c", "import sbd_engine._core"]
    if not succeeds(imports):
        print("no carried engine that imports: building it here", flush=True)
        build = [*command, "--no-index", "--no-build-isolation", str(HERE.parent)]
        succeeds([*build, "-C", "cmake.define.SBD_CUDA=AUTO"])
    return environment


def run_stage(
    name: str, args: Any, limit: float, folder: str, environment: dict[str, str], said: Any
) -> str:
    """How it ended: "ok", or why not."""
    if limit <= 1:
        return "left out: no time was left"
    command: Sequence[str] = [
        sys.executable,
        str(HERE / "cuda_stages.py"),
        name,
        *("--out", str(args.out.absolute()), "--carried", str(args.carried.absolute())),
        *("--words", args.words),
        *(["--tests", str(args.tests.absolute())] if args.tests else []),
        *(["--dry"] if args.dry else []),
    ]
    print(f"\n=== {name}", file=said, flush=True)
    begin = said.tell()
    # Its own group, which ends with it: a stage runs other programs.
    process = subprocess.Popen(
        command,
        stdout=said,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=folder,  # a clone's sbd_engine/ is not the installed one
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code == 0:
        return "ok"
    with open(said.name) as log:
        log.seek(begin)
        lines = [line.strip() for line in log if line.strip()]
    last = lines[-1] if lines else f"exit code {code}"
    return last if code == MISSING else f"failed: {last}"


if __name__ == "__main__":
    main()
