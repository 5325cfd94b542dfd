"""Checkpoints that several test files read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint, to read only."""
    pytest.importorskip("transformers")
    return write_checkpoint(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def llama_copy(llama: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return Path(shutil.copytree(llama, tmp_path / "copy" / "model"))
