"""Rounds of a fuzzer, in a process that may end in any way.

A round gets random numbers of its own, by the seed and its number, and must end in a result or in
one of the errors that it may: one line, within seconds. `--only N` repeats one round alone,
`--first N` goes on from one.
"""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random

MOST_SECONDS = 2.0  # of the processor: what else the machine does is nobody's fault
HANGS_AFTER = 30  # seconds by the clock
MOST_CHARACTERS = 1200  # of an error


def fuzz(
    one: Callable[[Random], object], errors: tuple[type[Exception], ...], most_mib: int = 1024
) -> int:
    """Runs a fuzzer's command line. one: a round. errors: what it may raise. most_mib: what all
    rounds together may take. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first round's number")
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    first, count = (given.first, given.rounds) if given.only is None else (given.only, 1)
    number = mmap.mmap(-1, 8)  # of the round, shared with the child; -1 behind the last
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _rounds(one, errors, most_mib, given.seed, range(first, first + count), number)
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    last = int.from_bytes(number[:8], "little", signed=True)
    if last >= 0:  # 1 where it hung
        print(f"round {last} (repeat with --only) ended the process: exit code {code}")
    return 0 if code == 0 else 1


def _rounds(
    one: Callable[[Random], object],
    errors: tuple[type[Exception], ...],
    most_mib: int,
    seed: int,
    numbers: range,
    shared: mmap.mmap,
) -> int:
    kinds: Counter[str] = Counter()
    failed, slowest, slowest_round = 0, 0.0, 0
    for number in numbers:
        shared[:8] = number.to_bytes(8, "little")
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        began = time.process_time()
        problem = ""
        try:
            one(Random(f"{seed} {number}"))
            kinds["done"] += 1
        except errors as error:
            kinds[type(error).__name__] += 1
            text = str(error)
            if "\n" in text.strip() or len(text) > MOST_CHARACTERS or not text:
                problem = f"no error of one line: {text[:300]!r} ({len(text)} characters)"
        except BaseException:
            problem = traceback.format_exc()
        seconds = time.process_time() - began
        if seconds > slowest:
            slowest, slowest_round = seconds, number
        if seconds > MOST_SECONDS and not problem:
            problem = f"{seconds:.1f} s"
        if problem:
            failed += 1
            print(f"round {number} (repeat with --only): {problem}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    shared[:8] = (-1).to_bytes(8, "little", signed=True)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(
        f"{len(numbers)} rounds: {dict(kinds.most_common())}, {failed} failed; slowest "
        f"{1e3 * slowest:.0f} ms (round {slowest_round}), most memory {mib} MiB, of a child "
        f"process {children} MiB"
    )
    if mib > most_mib:
        print(f"expected at most {most_mib} MiB")
    return int(failed > 0 or mib > most_mib)
