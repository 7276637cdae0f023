"""The model card of saved routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_card(meta: dict[str, Any], parameters: int) -> str:
    """The card's text.

    Args:
        meta: the configuration beside it.
        parameters: of all routers.
    """
    backbone, router = meta["backbone"], meta["router"]
    # a card is for others, to whom a folder of this machine says nothing
    base = Path(backbone["name"]).name if Path(backbone["name"]).is_absolute() else backbone["name"]
    facts = (
        "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in meta["facts"].items()) or "- none recorded"
    )
    return f"""---
library_name: adaskip
base_model: {base}
tags: [layer-skipping, router]
---

# Layer-skipping routers for {base}

One small router per decoder layer ({parameters:,} parameters in all) decides {_decides(router)} may leave out,
of each of the {backbone["layers"]} layers: {_UNITS[router["unit"]]}.
The backbone is not in this folder and is not changed.

```python
import adaskip

model = adaskip.RoutedModel.from_pretrained("path/to/this/folder")
```

Backbone: `{backbone["class"]}`, {backbone["layers"]} layers, width {backbone["width"]}; digest `{backbone["weights"]}`.
Group `{router["group"]}`, scope `{router["scope"]}`, unit `{router["unit"]}`, keys and values `{router["kv"]}`.

## Measured

{facts}
{_promise(meta["certificate"])}
Made with adaskip {meta["adaskip"]}.
"""


_UNITS = {"block": "all of it", "attention": "its attention", "mlp": "its MLP"}


def _decides(router: dict[str, Any]) -> str:
    vision = router["group"] == "vision"
    if router["scope"] == "token":
        return f"what each {'vision token' if vision else 'token'}"
    return f"from the prompt what the {'vision tokens' if vision else 'whole sequence'}"


def _promise(certificate: dict[str, Any] | None) -> str:
    if certificate is None:
        return ""
    risk, delta, n = (certificate[name] for name in ("risk", "delta", "n"))
    what = "No threshold could be certified, so every layer runs: the answers are the dense model's."
    if certificate["threshold"] is not None:
        what = (
            f"Routed and dense greedy answers differ on at most {risk:g} of the inputs, with probability {1 - delta:g} "
            "over the draw of the calibration inputs."
        )
    return f"""
## Guarantee

{what} Learn-then-Test on {n} inputs (digest `{certificate["data"]["digest"]}`), for inputs from the same distribution.
"""
