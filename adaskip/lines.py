"""Text that people and other programs wrote: read line by line, and refused in one sentence when it is no UTF-8."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from adaskip.errors import DataError

SHOWN = 20  # faults that one error lists
_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_GZIP = b"\x1f\x8b"
_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Repeating(dict[str, Any]):
    """Hold a JSON object in which keys appear twice; ``repeated`` names them."""

    repeated: tuple[str, ...] = ()


def json_lines(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    r"""Yield number, value and fault of each line that is not blank; the value of a line with a fault is None.

    The file is UTF-8, with or without a byte order mark, gzipped or not. A line ends at ``\n``, ``\r\n`` or ``\r``
    alone: U+2028, U+2029 and U+0085 may stand inside a JSON string.

    Raises:
        DataError: the file cannot be opened, is compressed otherwise, is binary or in UTF-16.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(_raw_lines(file, path), 1):
                if line.strip():
                    yield number, *_value(line, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); copy the file anew") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def own_lines(text: str) -> list[str]:
    r"""Split what this package wrote itself, lines that end with ``\n`` or ``\r\n``; nothing else ends one."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def listed(faults: Iterable[str], what: str) -> str:
    """Return one error text for all faults found: a single one as it is, else the first twenty, one a line."""
    faults = [*faults]
    if len(faults) == 1:
        return faults[0]
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "\n  ".join([f"{what}: {len(faults)} faults", *faults[:SHOWN], *more])


def _opened(path: Path) -> BinaryIO:
    """Open a file for its bytes, unpacked where it is gzipped, whatever its name."""
    with path.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")


def _raw_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    head = file.read(1024)
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            raise DataError(f"{path}: is {name}; expected UTF-8. Open it in an editor and save as UTF-8")
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise DataError(f"{path}: is compressed ({name}); expected text, one JSON object a line. Unpack it first")
    if b"\0" in head:
        raise DataError(
            f"{path}: holds zero bytes, so it is binary, or UTF-16; expected text, one JSON object a line. "
            "If it is text, save as UTF-8"
        )
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    for line in file:
        yield from line.rstrip(b"\r\n").split(b"\r")


def _value(line: bytes, number: int) -> tuple[Any, str | None]:
    """Return the value of a line, or why it has none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, before = line[error.start], line[: error.start].decode("utf-8")[-20:]
        return None, (
            f"byte 0x{byte:02x} after {before!r} is not UTF-8 (Windows-1252 or another encoding?); "
            "open the file in an editor and save as UTF-8"
        )
    try:
        return json.loads(text, object_pairs_hook=_object), None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        reason = getattr(error, "msg", None) or str(error)
        whole = text.strip() in ("[", "{") or (number == 1 and text.lstrip().startswith("["))
        hint = "; a JSON document over several lines is not read" if whole else ""
        return None, f"not JSON ({reason}); expected one object a line{hint}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) == len(pairs):
        return mapping
    names = [name for name, _ in pairs]
    repeating = Repeating(mapping)
    repeating.repeated = tuple(name for name in mapping if names.count(name) > 1)
    return repeating
