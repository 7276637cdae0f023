"""Name values of JSON as their writer would call them, and say why one is no text that a model can read."""

from __future__ import annotations

import json
import math
from typing import Any

_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def named(value: Any) -> str:
    """Return a value with its type, for an error.

    >>> named(7), named(None)
    ('7 (a number)', 'null')
    """
    return "null" if value is None else f"{short(value)} ({_KINDS.get(type(value), type(value).__name__)})"


def short(value: Any) -> str:
    """Return how Python writes a value, cut at 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def text_fault(value: Any) -> str | None:
    """Return why a value is no text that a model can read; None where it is one.

    >>> text_fault(" "), text_fault("w1")
    ('is empty; expected text', None)
    """
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return "is a list of messages; expected text. Put the whole conversation, answers too, into a field messages"
    if not isinstance(value, str):
        plain = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
        hint = f': write "{json.dumps(value)}", in quotes' if plain else ""
        return f"is {named(value)}; expected text{hint}"
    if not value.strip():
        return "is empty; expected text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, {value[error.start]!r} (a lone surrogate); mend the program that wrote it"
    return None
