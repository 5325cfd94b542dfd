"""What a machine's GPU says of this engine: whether it agrees with the CPU, how long forwards of 8B
shapes take beside what its memory allows, how much faster Set Block Decoding makes whole
generations, and next-token decoding beside PyTorch's.

Every part adds its results to cuda_suite.json in --work-dir, so parts may run one at a time.
`benchmarks/cuda_suite.sh` runs all of them, after the C++ tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cuda_page
from cuda_agreement import compare_tokens, logits_errors
from cuda_speed import decode, decoding
from options import DOCS, Parser, integers, run, some_of
from peers.process import PeerError, Process
from peers.worker import Missing
from report import print_table

from sbd_engine import Engine
from sbd_engine.engine import engine_options
from sbd_engine.random_model import random_model

SHAPES = Path(__file__).parent / "shapes" / "8b"
TYPES = ("bf16", "f16", "q8_0", "q4_0")
_TORCH_CONTEXT, _TORCH_TOKENS = 1024, 256


def main() -> None:
    args = arguments()
    path = args.work_dir / "cuda_suite.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    with Engine(device=args.device, n_ctx=64) as engine:
        device = engine.device
    if report.get("device") != device or report.get("rounds") != args.rounds:
        report = {"device": device, "rounds": args.rounds}
    for part in args.parts:
        print(f"{part}, on {device}", file=sys.stderr, flush=True)
        report[part] = PARTS[part](args)
        path.write_text(json.dumps(report, indent=1) + "\n")
    for table in cuda_page.tables(report):
        print_table(table)
    print(f"wrote {path}", file=sys.stderr)
    if args.write_docs:
        (DOCS / "results-gpu.md").write_text(cuda_page.page(report))


def arguments() -> Any:
    parser = Parser(__doc__ or "", rounds=21)
    names = sorted(path.stem for path in SHAPES.glob("*.json"))
    parser.add_argument("--parts", type=some_of(list(PARTS)), default=",".join(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--shapes", type=some_of(names), default=",".join(names))
    parser.add_argument("--types", type=some_of(TYPES), default="bf16,q8_0,q4_0")
    parser.add_argument("--context", type=integers(1), default="256,1024,4096,32768")
    parser.add_argument("--batch", type=integers(1), default="1,4,16", help="of decoding")
    return parser.parse_args()


def agreement(args: Any) -> dict[str, Any]:
    return {
        "logits": {
            shape: logits_errors(_config(shape), args.work_dir, args.device)
            for shape in args.shapes
        },
        "tokens": compare_tokens(args.work_dir, args.device),
    }


def forwards(args: Any) -> list[dict[str, Any]]:
    """`sbd-engine bench` of every shape and type."""
    reports = []
    for shape in args.shapes:
        for dtype in args.types:
            command = [sys.executable, "-m", "sbd_engine", "bench"]
            command += ["--config", str(SHAPES / f"{shape}.json"), "--type", dtype, "--json"]
            command += ["--device", args.device, "--repeats", str(args.rounds)]
            command += ["--context", ",".join(map(str, args.context))]
            # From another folder than a clone's root, whose sbd_engine/ is not the installed one.
            done = subprocess.run(command, capture_output=True, text=True, cwd=args.work_dir)
            if done.returncode != 0:
                raise RuntimeError(f"{shape}, {dtype}: {done.stderr.strip()}")
            reports.append({"shape": shape, "type": dtype, **json.loads(done.stdout)})
    return reports


def generations(args: Any) -> list[dict[str, Any]]:
    return [
        {"shape": shape, "type": dtype, **result}
        for shape in args.shapes
        for dtype in args.types[:1]
        for result in decoding(
            _config(shape), dtype, args.device, args.context, args.batch, args.rounds
        )
    ]


def torch(args: Any) -> list[dict[str, Any]]:
    """Next-token decoding in turn with PyTorch's, in bf16."""
    results = []
    n_ctx = _TORCH_CONTEXT + _TORCH_TOKENS + 64
    for shape in args.shapes:
        config = _config(shape)
        options = {"config": config, "device": args.device, "n_ctx": n_ctx}
        try:
            peer = Process("peers.torch_cuda", options, args.work_dir / f"{shape}.torch.log")
        except (Missing, PeerError) as error:
            results.append({"shape": shape, "missing": str(error)})
            continue
        settings = engine_options(args.device, None, n_ctx, "f16")
        core, _ = random_model(config, "bf16", settings)
        ours, theirs = [], []
        try:
            for _ in range(3):
                ours.append(decode(core, _TORCH_CONTEXT, 1, {"decoder": "ntp"}).tok_s)
                theirs.append(peer.call("tok_s", context=_TORCH_CONTEXT, tokens=_TORCH_TOKENS))
        finally:
            peer.close()
        results.append(
            {
                "shape": shape,
                "context": _TORCH_CONTEXT,
                "about": peer.about,
                "tok_s": median(ours),
                "torch_tok_s": median(theirs),
            }
        )
    return results


PARTS: dict[str, Callable[[Any], Any]] = {
    "agreement": agreement,
    "forwards": forwards,
    "generations": generations,
    "torch": torch,
}


def _config(shape: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SHAPES / f"{shape}.json").read_text())
    return config


if __name__ == "__main__":
    run(main)
