"""Finds the parts of a GGUF file, and puts them together."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from resting.benchmarks.assets import wheels
from resting.benchmarks.errors import AssetError, first_line

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.IGNORECASE)
"""How llama.cpp names a part, before the suffix."""


def is_gguf(path: Path) -> bool:
    """Whether the name is one of a GGUF file, in any case of its letters."""
    return path.suffix.lower() == ".gguf"


def parts_of(path: Path) -> list[Path]:
    """Return the files that `path` is one of, in their order; itself where it is whole.

    Raises
    ------
    AssetError
        If a part is not there.
    """
    named = PART.fullmatch(path.stem)
    if named is None:
        return [path]
    count = int(named["count"])
    parts = [path.with_name(f"{named['stem']}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise AssetError(f"{path} is one of {count} parts, and {part.name} is not there; allowed: all parts")
    return parts or [path]


def stem_of(path: Path) -> str:
    """Return the file's name without suffix and without the number of a part."""
    named = PART.fullmatch(path.stem)
    return named["stem"] if named else path.stem


def sha256_of(path: Path) -> str:
    """Hash a GGUF, with all its parts."""
    parts = parts_of(path)
    if len(parts) == 1:
        return wheels.sha256_of(path)
    return hashlib.sha256(" ".join(wheels.sha256_of(part) for part in parts).encode()).hexdigest()


def value(reader: Any, key: str, default: Any = None) -> Any:
    """Return a value of the metadata, or `default` where there is none."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def put_together(path: Path, target: Path) -> None:
    """Let `target` be the whole GGUF: a link to a file that is whole, a new file of all parts else.

    Raises
    ------
    AssetError
        If the parts are not those of one file.
    """
    import gguf

    parts = parts_of(path)
    readers = []
    for part in parts:
        try:
            readers.append(gguf.GGUFReader(part))
        except Exception as error:
            raise AssetError(f"{part.name} cannot be read: {first_line(error)}") from error
    count = int(value(readers[0], "split.count", 1) or 1)
    if count != len(parts) and (count > 1 or len(parts) > 1):
        raise AssetError(f"it says that it has {count} parts, and its name says {len(parts)}")
    if count == 1:
        target.symlink_to(path.resolve())
        return
    _check(parts, readers)
    _write(readers, target)


def _check(parts: list[Path], readers: list[Any]) -> None:
    total = value(readers[0], "split.tensors.count")
    for number, (part, reader) in enumerate(zip(parts, readers)):
        said = value(reader, "split.no"), value(reader, "split.count"), value(reader, "split.tensors.count")
        if said != (number, len(parts), total):
            raise AssetError(f"{part.name} says it is part {said[0]} of {said[1]}, of {said[2]} tensors in all")
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    if total is not None and len(names) != total:
        raise AssetError(f"its parts hold {len(names)} tensors and say that there are {total}")
    if len(set(names)) != len(names):
        raise AssetError("two of its parts hold the same tensor")


def _write(readers: list[Any], target: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(target, str(value(readers[0], "general.architecture")))
    for field in readers[0].fields.values():
        if not field.name.startswith(("GGUF.", "split.")) and field.name != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
