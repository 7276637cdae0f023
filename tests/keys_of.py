"""The names in plain values, for comparing what ``--json`` prints with what it printed before."""

from __future__ import annotations

from typing import Any


def keys_of(value: Any) -> Any:
    """Return the keys of nested mappings in their order; of a list those of its first entry; None for other values."""
    if isinstance(value, dict):
        return {name: keys_of(each) for name, each in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [keys_of(value[0])]
    return None
