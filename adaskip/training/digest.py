"""A digest of records: equal where their texts and the contents of their pictures are, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from adaskip.training.pictures import pictures_of
from adaskip.training.records import Record


def digest(records: Sequence[Record]) -> str:
    """Return 32 hexadecimal digits for records in their order.

    >>> digest([{"prompt": "w1", "answer": "w2"}]) == digest([{"prompt": "w1", "answer": "w3"}])
    False
    """
    total = hashlib.sha256()
    for record in records:
        plain = {name: value for name, value in record.items() if name not in ("image", "images")}
        total.update(json.dumps(plain, sort_keys=True, default=str).encode() + b"\n")
        for picture in pictures_of(record):
            content = _content(picture)
            total.update(f"{len(content)} ".encode() + content)
    return total.hexdigest()[:32]


def _content(picture: Any) -> bytes:
    """Return the bytes of a picture's file, or its pixels where it has none."""
    if isinstance(picture, Image.Image):
        return f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    return bytes(picture) if isinstance(picture, bytes | bytearray) else Path(picture).read_bytes()
