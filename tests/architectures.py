"""The table in docs/architectures.md, generated from what the contract suite runs: `python -m tests.architectures`."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from adaskip.backbone.inspect import inspect_backbone
from adaskip.errors import BackboneError
from tests.families import (
    REFUSED,
    TEXT,
    TOKEN_ATTENTION_REFUSED,
    TOKEN_REFUSED,
    UNIT_REFUSED,
    VISION,
    make,
    make_refused,
)

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BLOCK = re.compile(r"(<!-- architectures -->\n).*?(<!-- /architectures -->)", re.DOTALL)


def reason(model_type: str, unit: str = "block") -> str:
    """Why `attach` refuses a model of this type, in its own words but without the class name."""
    try:
        inspect_backbone(make_refused(model_type) if unit == "block" else make(model_type).model, unit)
    except BackboneError as refusal:
        text = re.split(r"; (?:not routable|expected)|(?<=.), expected", str(refusal).split(": ", 1)[1])[0]
        text = re.sub(r"^unit '\w+': decoder layer \d+", "a layer", text.split("; use ")[0])
        text = re.sub(r"layers of type .* keep", "its layers keep", text)
        text = re.sub(r"expected one list of .*", "it has no single list of decoder layers as long as it says", text)
        return re.sub(
            r"decoder layer \d+ turns .*", "its layers work on states of another shape than (rows, tokens, width)", text
        )
    raise AssertionError(f"{model_type} is not refused")


def table() -> str:
    """Markdown: supported language and vision-language models, then the refused ones by reason."""
    refused = defaultdict(list)
    for model_type in REFUSED:
        refused[reason(model_type)].append(model_type)
    rows = [
        ("language models, group `all`", sorted(TEXT)),
        ("vision-language models, groups `all` and `vision`", sorted(VISION)),
        *((f"refused: {why}", sorted(types)) for why, types in refused.items()),
    ]
    for unit, families in UNIT_REFUSED.items():
        without = defaultdict(list)
        for model_type in families:
            without[reason(model_type, unit)].append(model_type)
        rows += [(f"unit `{unit}` refused: {why}", sorted(types)) for why, types in without.items()]
    rows.append(("scope `token` refused: its attention has a mask or places of its own", sorted(TOKEN_REFUSED)))
    why = "scope `token` with unit `attention` refused: its attention is handed its states three times"
    rows.append((why, sorted(TOKEN_ATTENTION_REFUSED)))
    lines = ["| | model types |", "|---|---|"]
    lines += [f"| {title} ({len(types)}) | {', '.join(types)} |" for title, types in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + table() + found[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
