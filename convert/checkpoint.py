"""A Hugging Face checkpoint on disk: its JSON files, and its tensors, a few rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .errors import LISTED, ConvertError, listed

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d+)-of-(?P<parts>\d+)\.safetensors")
MOST_BYTES = 1 << 27  # of a file that is read whole: several times the largest tokenizer.json
MOST_FILES = 1 << 12  # with weights
READ = (".json", ".jinja", ".model", ".txt", ".safetensors")  # endings of a checkpoint's files
# BF16 is the upper half of a float32; numpy has no such type, so its bits are read as they are.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; read, not mapped, so that pages do not pile up in memory."""

    name: str
    path: Path
    dtype: str  # as the file writes it: "BF16"
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """`tensor[start:stop]` in float32."""
        if self.dtype not in DTYPES:
            raise ConvertError(
                f"{self.path.name}: tensor {self.name} is of type {self.dtype}: expected one of "
                f"{', '.join(DTYPES)}; save the checkpoint in one of these"
            )
        dtype = np.dtype(DTYPES[self.dtype])
        row = int(np.prod(self.shape[1:]))
        offset = self.offset + start * row * dtype.itemsize
        count = (stop - start) * row
        values = np.fromfile(self.path, dtype, count, offset=offset)
        if len(values) < count:
            raise ConvertError(
                f"{self.path}: the file was cut short while it was read; convert it once it is "
                "whole"
            )
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    files: list[Path]
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object beside the weights; empty where there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}


def open_checkpoint(sources: Sequence[Path]) -> Checkpoint:
    """Open a checkpoint's folder, or .safetensors files with the JSON files beside them."""
    if not sources:
        raise ConvertError("no checkpoint given: expected a folder or .safetensors files")
    for path in sources:
        if not path.is_dir() and not path.is_file():
            raise ConvertError(f"{path}: no such file or folder")
    if len(sources) == 1 and sources[0].is_dir():
        folder = sources[0]
        if not (folder / "config.json").is_file():
            raise ConvertError(f"{folder}: no config.json: expected a Hugging Face checkpoint")
        _check_links(folder)
        files = _weight_files(folder)
    else:
        for path in sources:
            if path.is_dir() or path.suffix != ".safetensors":
                raise ConvertError(
                    f"{path}: expected one checkpoint folder, or only its .safetensors files"
                )
        folder, files = sources[0].parent, list(sources)
        if not (folder / "config.json").is_file():
            raise ConvertError(f"{folder}: no config.json beside {sources[0].name}")
        _check_links(folder, but=".safetensors")
    _check_shards(files)
    config = read_json(folder / "config.json")
    return Checkpoint(folder, files, config, read_tensors(files))


def file_of(folder: Path, name: str) -> Path:
    """The path of a downloaded folder's file, by a name that may come from one of its others.

    Raises ConvertError where the name or a link leads out of the folder: what else the user has
    must not end up in a model file. A hub cache's folder links to the `blobs` beside it.
    """
    path, homes = folder / name, [folder]
    for parent in folder.absolute().parents:
        if parent.name == "snapshots":
            homes.append(parent.parent / "blobs")
    try:
        real = path.resolve()
        if any(real.is_relative_to(home.resolve()) for home in homes):
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no name of a file
        raise ConvertError(f"{folder}: {name!r:.60}: not to be found: {error}") from None
    raise ConvertError(
        f"{folder}: {name!r:.200} leads out of the folder, to {real}: expected a file of the "
        "checkpoint itself; copy it there if it is"
    )


def _check_links(folder: Path, but: str = "") -> None:
    """That none of the files that may be read is a link to something outside; `but`: a suffix."""
    for pattern in "*", "additional_chat_templates/*":
        for path in sorted(folder.glob(pattern)):
            read = path.suffix in READ and path.suffix != but
            if path.is_symlink() and (read or path.is_dir()):
                file_of(folder, str(path.relative_to(folder)))


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_bytes(path)
        value = json.loads(data.decode())
        if b"\\u" in data:  # which may stand for half a character
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ConvertError(f"{path}: expected at most {MOST_BYTES} bytes, got {size}")
    return path.read_bytes()


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path}: not UTF-8: {error}") from None


def read_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise ConvertError(
                    f"tensor {name} is in both {tensors[name].path.name} and {path.name}"
                )
            tensors[name] = tensor
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks lengths, offsets and shapes against the file's size
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path}: not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: StoredTensor(
            name, path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    # "consolidated" is Mistral's own layout, shipped beside the Hugging Face one.
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    files = [f for f in found if not f.name.startswith(("adapter_", "consolidated"))]
    if len(files) > MOST_FILES:
        raise ConvertError(
            f"{folder}: {len(files)} .safetensors files: expected at most {MOST_FILES}"
        )
    if files:
        return files
    if (folder / "adapter_config.json").is_file():
        raise ConvertError(
            f"{folder}: a LoRA adapter, not a checkpoint: give its base model, and this with --lora"
        )
    pickles = sorted(f.name for s in ("*.bin", "*.pt", "*.pth") for f in folder.glob(s))
    if pickles:
        raise ConvertError(
            f"{folder}: weights only as pickles ({listed(pickles)}): expected .safetensors; load "
            "them with transformers and save_pretrained() them again"
        )
    raise ConvertError(f"{folder}: no .safetensors file")


def _indexed_files(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{folder / INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > MOST_FILES:
        raise ConvertError(
            f"{folder / INDEX}: names {len(names)} weight files: expected at most {MOST_FILES}"
        )
    files = [file_of(folder, name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not _is_file(file)]
    if missing:
        raise ConvertError(
            f"{folder}: missing {len(missing)} of {len(names)} weight files: {listed(missing)}"
        )
    absent = sorted(weight_map.keys() - read_tensors(files).keys())
    if absent:
        raise ConvertError(f"{folder / INDEX}: names tensors that no file has: {listed(absent)}")
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no name that a file could have
        return False


def _check_shards(files: list[Path]) -> None:
    """Shards say in their names how many there are; any number, so it is not counted out."""
    found: dict[tuple[str, str], list[str]] = {}
    for match in filter(None, (SHARD.fullmatch(file.name) for file in files)):
        found.setdefault((match["stem"], match["parts"]), []).append(match["part"])
    for (stem, count), named in sorted(found.items()):
        parts, width = int(count), max(map(len, named))
        there = {int(part) for part in named if 0 < int(part) <= parts}
        if len(there) < parts:
            gaps = islice((i for i in range(1, parts + 1) if i not in there), LISTED)
            names = [f"{stem}-{i:0{width}}-of-{count}.safetensors" for i in gaps]
            raise ConvertError(
                f"missing {parts - len(there)} of {parts} weight files: "
                f"{listed(names, total=parts - len(there))}"
            )
