"""Conversations to rehearse a recipe on: a few words, and for models that see, a picture of one colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from adaskip.runfiles import write_text

_COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
AMOUNTS = {"train": 48, "validation": 24, "calibration": 40, "test": 40}


def sentences() -> list[str]:
    """Return what is said in the conversations, for a tokenizer to learn."""
    rows = [_row(number, None, 2) for number in range(24)]
    return [turn["content"] if isinstance(turn["content"], str) else "" for row in rows for turn in row["messages"]]


def write_conversations(folder: Path, pictured: bool, every: int = 2) -> None:
    """Write all four splits as JSON lines, where the model sees with a picture in ``every`` row, the others text."""
    (folder / "pictures").mkdir(parents=True)
    if pictured:
        for name, colour in _COLOURS.items():
            Image.new("RGB", (24, 16), colour).save(folder / "pictures" / f"{name}.png")
    begin = 0
    for split, count in AMOUNTS.items():
        rows = [_row(number, "pictures" if pictured else None, every) for number in range(begin, begin + count)]
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        begin += count


def _row(number: int, pictures: str | None, every: int) -> dict[str, Any]:
    """Return the conversation of a number: no two have the same words."""
    colour = [*_COLOURS][number // 2 % len(_COLOURS)]
    if number % every == every - 1:
        asked: Any = f"Case {number}: which colour is the square?"
        if pictures is not None:
            shown = {"type": "image", "image": f"{pictures}/{colour}.png"}
            asked = [shown, {"type": "text", "text": asked}]
        else:
            asked = f"{asked} It is {colour}."
        return _said(asked, colour, "colour")
    return _said(f"Case {number}: say {colour} twice.", f"{colour} {colour}", "echo")


def _said(asked: Any, answer: str, kind: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "kind": kind}
