"""What several test files share: checkpoints to read, and how many threads torch has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbd_engine import Engine

from .checkpoints import write_checkpoint
from .tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SBD model, to read only."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No mask token, no chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("plain"), sbd=False, chat=False)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model) as engine:
        yield engine


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
