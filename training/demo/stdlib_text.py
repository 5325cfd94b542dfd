"""Short documents from this Python's own standard library (PSF licence)."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "site-packages"}  # not the library, or not code to learn from:
SKIPPED_FOLDERS |= {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
MAX_CHARACTERS = 1200
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_documents() -> list[str]:
    """Short documents from this Python's own standard library (PSF licence), docstrings left out.

    `ast.unparse` gives all code one layout, which leaves a small model less to guess.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            try:
                module = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for text in _documents_of(module):
                if text.isascii() and len(text) <= MAX_CHARACTERS:
                    documents[text] = None
    return list(documents)


def _documents_of(module: ast.Module) -> Iterator[str]:
    """The module's beginning; every function and method; every class, shortened."""
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | _FUNCTION) and node.body:
            if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]  # a docstring is no code
    yield _shortened(module)
    for node in ast.walk(module):
        if isinstance(node, _FUNCTION):
            yield ast.unparse(node)
        elif isinstance(node, ast.ClassDef):
            yield _shortened(node)


def _shortened(node: ast.Module | ast.ClassDef) -> str:
    """`node` with as many leading statements as fit into MAX_CHARACTERS."""
    kept, size = 0, 0
    for statement in node.body:
        size += len(ast.unparse(statement))
        if size > MAX_CHARACTERS * 0.8:
            break
        kept += 1
    if kept == 0:
        return ""
    whole, node.body = node.body, node.body[:kept]
    text = ast.unparse(node)
    node.body = whole
    return text
