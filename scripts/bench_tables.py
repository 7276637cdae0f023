"""Write the tables of benchmarks/README.md from what `make bench` leaves: python scripts/bench_tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "benchmarks"
BLOCK = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
COLUMNS = ["phase", "batch", "path", "skip", "dense_s", "routed_s", "ideal_s", "speedup", "kv"]
RATIOS = ["efficiency", "overhead", "control"]


def ratio(row: dict[str, Any], name: str) -> str:
    """The estimate with its interval; a dash where it does not apply."""
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def table(path: Path) -> str:
    """One file's rows as Markdown, under what was measured and where."""
    found = json.loads(path.read_text(encoding="utf-8"))
    around, told = found["environment"], {k: v for k, v in found["settings"].items() if v is not None}
    lines = [
        f"### `{path.name}`",
        "",
        f"{', '.join(f'{key} {value}' for key, value in told.items())}; on {around['device']}, {around['threads']} "
        f"threads, torch {around['packages'].get('torch')}, transformers {around['packages'].get('transformers')}.",
        "",
        "| " + " | ".join([*COLUMNS, *RATIOS, "rounds"]) + " |",
        "|" + " --- |" * (len(COLUMNS) + len(RATIOS) + 1),
    ]
    for row in found["results"]:
        row["kv"] = row["kv_bytes"] / row["dense_kv_bytes"]
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        lines.append("| " + " | ".join([*cells, *(ratio(row, name) for name in RATIOS), str(row["rounds"])]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the block between the two comments."""
    readme = FOLDER / "README.md"
    tables = "\n".join(table(path) for path in sorted(FOLDER.glob("bench-*.json")))
    text = readme.read_text(encoding="utf-8")
    readme.write_text(BLOCK.sub(lambda block: block[1] + tables + block[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
