"""Settings of the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# The reference's matrices are tiny: more BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Each of several workers has a core of its own, so that their engines have one thread each and do
# not wait for each other's.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if CORES and "PYTEST_XDIST_WORKER" in os.environ:
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {CORES[worker % len(CORES)]})

# For `training`, which is not installed. Behind everything else: the installed package comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))


_SKIPPED = "sbd/skipped"  # in pytest's cache: what the last run skipped, tests and whole files


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """With SBD_NO_SKIPS set, as in CI where everything is installed, a skipped test has failed, but
    for instruction sets that this CPU has not."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and os.environ.get("SBD_NO_SKIPS") and "this CPU" not in str(report.longrepr):
        report.outcome = "failed"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With SBD_ONLY_SKIPPED set, what the last run skipped is all that runs. The C++ tests, which
    are built, take longest and come first."""
    items.sort(key=lambda item: item.path.name != "test_cpp.py")
    if not os.environ.get("SBD_ONLY_SKIPPED"):
        return
    assert config.cache is not None
    skipped = set(config.cache.get(_SKIPPED, []))
    out = [i for i in items if not {i.nodeid, i.nodeid.split("::")[0]} & skipped]
    config.hook.pytest_deselected(items=out)
    items[:] = [i for i in items if i not in set(out)]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    if cache is not None:
        skipped = [report.nodeid for report in terminalreporter.stats.get("skipped", [])]
        cache.set(_SKIPPED, skipped)
