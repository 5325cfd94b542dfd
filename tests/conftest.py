"""Settings of the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# The reference's matrices are tiny: more BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# For `training`, which is not installed. Behind everything else: the installed package comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """With SBD_NO_SKIPS set, as in CI where everything is installed, a skipped test has failed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("SBD_NO_SKIPS"):
        report.outcome = "failed"
    return report
