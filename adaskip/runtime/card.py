"""Write the model card of a saved policy, or of the model that a plan leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaskip.plan import Target
from adaskip.sites import PARTS
from adaskip.version import __version__

PLACE = "path/to/this/folder"
"""What a card calls the folder that it lies in, until it is known by a name on the Hub."""


def write_card(meta: dict[str, Any], target: Target, parameters: int) -> str:
    """Return the card's text.

    Args:
        meta: the configuration beside it.
        target: what the policy's decisions speak of.
        parameters: of the policy.
    """
    backbone, policy = meta["backbone"], meta["policy"]
    base = _known_as(backbone["name"])
    return f"""---
library_name: adaskip
base_model: {base}
tags: [layer-skipping, {policy["kind"]}]
---

# Layer-skipping {"routers" if policy["kind"] == "learned" else "policy"} for {base}

{_who(policy, target, parameters)} decides {_decides(target)} may leave out,
of each of the {backbone["layers"]} layers: {_UNITS[target.unit]}{_WHEN[target.phase]}.
The backbone is not in this folder and is not changed.

```python
import adaskip

model = adaskip.RoutedModel.from_pretrained("{PLACE}")
```

Backbone: `{backbone["class"]}`, {backbone["layers"]} layers, width {backbone["width"]}; digest `{backbone["weights"]}`.
Group `{target.group}`, scope `{target.scope}`, unit `{target.unit}`, keys and values `{target.kv}`,
phase `{target.phase}`.

## Measured

{_list(meta["facts"])}
{_promise(meta["certificate"])}
Made with adaskip {meta["adaskip"]}.
"""


def write_cut_card(name: str, kept: Sequence[bool], adapted: bool, facts: Mapping[str, Any]) -> str:
    """Return the card's text of an ordinary model that consists of some layers of another one.

    Args:
        name: of the whole model; empty where it was built in memory.
        kept: of each of its layers, whether it stays.
        adapted: whether adapters were merged into what stays.
        facts: what the run measured.
    """
    base = _known_as(name) or "a model built in memory"
    left = [str(layer) for layer, stays in enumerate(kept) if not stays]
    merged = " Low-rank updates that heal this were merged into the others." if adapted else ""
    return f"""---
library_name: transformers
base_model: {base}
tags: [layer-skipping]
---

# {base} without layers {", ".join(left) or "none"}

{len(left)} of {len(kept)} decoder layers were left out, the same for every input.{merged}
It is an ordinary model of its class: load it with `from_pretrained`, or serve it as any other.

## Measured

{_list(facts)}

Made with adaskip {__version__}.
"""


def _known_as(name: str) -> str:
    """Name a model for others, to whom a folder of this machine says nothing."""
    return Path(name).name if Path(name).is_absolute() else name


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()) or "- none recorded"


_UNITS = {
    "block": "all of it",
    "attention": "its attention",
    "mlp": "its MLP",
    "sublayers": "its attention, its MLP, or both",
}


_WHEN = {"both": "", "prefill": ", while the prompt is read", "decode": ", while the answer is generated"}


def _who(policy: dict[str, Any], target: Target, parameters: int) -> str:
    """Say who decides."""
    if policy["kind"] == "learned":
        each = "decoder layer" if len(PARTS[target.unit]) == 1 else "attention and per MLP"
        return f"One small router per {each} ({parameters:,} parameters in all)"
    return f"A policy of the kind `{policy['kind']}` ({parameters:,} parameters)"


def _decides(target: Target) -> str:
    """Say from what is decided, and for which tokens."""
    vision = target.group == "vision"
    if target.scope == "token":
        return f"what each {'vision token' if vision else 'token'}"
    if target.phase == "decode":
        return "from the prompt what the answer's tokens"
    return f"from the prompt what the {'vision tokens' if vision else 'whole sequence'}"


def _promise(certificate: dict[str, Any] | None) -> str:
    """Say what `adaskip calibrate` proved; nothing where it did not run."""
    if certificate is None:
        return ""
    risk, delta, n = (certificate[name] for name in ("risk", "delta", "n"))
    claim = "No threshold could be certified, so every layer runs: the answers are the dense model's."
    if certificate["threshold"] is not None:
        claim = (
            f"Routed and dense greedy answers differ on at most {risk:g} of the inputs, with probability {1 - delta:g} "
            "over the draw of the calibration inputs."
        )
    return f"""
## Guarantee

{claim} Learn-then-Test on {n} inputs (digest `{certificate["data"]["digest"]}`), for inputs from the same distribution.
"""
