"""Every kind of policy for a target, and the table of what each does that docs/policies.md has.

`python -m tests.policies` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import adaskip
from adaskip.errors import ConfigError
from adaskip.plan import KV, Group, Phase, Scope, Target, Unit
from adaskip.policy import HOMES, Policy, as_policy
from tests import families

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"
BLOCK = re.compile(r"(<!-- capabilities -->\n).*?(<!-- /capabilities -->)", re.DOTALL)
_FIELDS: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in (("scope", Scope), ("unit", Unit), ("group", Group), ("kv", KV), ("phase", Phase))
}

POLICIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "delask": lambda target: adaskip.policies.DeLask(0.5, 1, Target(**target)),
    "fastv": lambda target: adaskip.policies.FastV(2, 0.5, _by_token(target)),
    "learned": lambda target: adaskip.RouterConfig(**target),
    "path_bank": lambda target: adaskip.policies.PathBank(_halved(target, [[1], [3], [1, 2]]), 1, Target(**target)),
    "pyramid_drop": lambda target: adaskip.policies.PyramidDrop(ratio=0.5, target=_by_token(target)),
    "skip_it": lambda target: adaskip.policies.SkipIt(1.0, 1, target=Target(**target)),
    "skip_vision": lambda target: adaskip.policies.SkipVision(
        0.25, 0.25, target=_by_token({"unit": "sublayers"} | target)
    ),
    "static": lambda target: adaskip.SkipPlan(skip=_halved(target, [[1, 3]])[0], **target),
    "token_plan": lambda target: adaskip.policies.TokenPlan(
        _halved(target, [[1], [2, 3], []]), _halved(target, [[3], [1, 2]]), 1, _by_token(target)
    ),
}
"""Every kind of `adaskip.policy.HOMES`, for a target; one that decides by the token does so where nothing is said."""


def _by_token(target: dict[str, Any]) -> Target:
    return Target(**{"scope": "token"} | target)


def _halved(target: dict[str, Any], paths: list[list[int]]) -> list[list[Any]]:
    """Return paths of layers, where halves of layers are decided apart some halves of these."""
    if target.get("unit") != "sublayers":
        return paths
    return [[f"{layer}.{('attention', 'mlp')[layer % 2]}" for layer in path] for path in paths]


def targets(kind: str) -> Iterator[Target]:
    """Yield every target that policies of a kind take."""
    for values in product(*_FIELDS.values()):
        try:
            yield as_policy(POLICIES[kind](dict(zip(_FIELDS, values, strict=True)))).target
        except ConfigError:
            continue


def fit(policy: Policy) -> str:
    """Return how an attached policy learns, by what it keeps: weights with a gradient, or buffers that are saved."""
    if any(True for _ in policy.parameters()):
        return "by gradient"
    return "by a fit" if policy.state_dict() else "no"


def row(kind: str) -> str:
    """Return a kind's line: what it can leave out, whether it learns, what of, and whether it saves compute."""
    taken = list(targets(kind))
    columns = [
        ", ".join(value for value in values if any(getattr(target, name) == value for target in taken))
        for name, values in _FIELDS.items()
    ]
    toy = families.make("llava", "eager")
    model = adaskip.attach(toy.model, POLICIES[kind](next(_choices(taken))))
    known = model.policy.known(len(model.spec.layers))
    saves = "no" if known is not None and bool(known.all()) else "yes"
    return f"| {' | '.join([f'`{kind}`', *columns, fit(model.policy), model.policy.needs, saves])} |"


def _choices(taken: list[Target]) -> Iterator[dict[str, Any]]:
    for target in taken:
        yield {name: getattr(target, name) for name in _FIELDS}


def table() -> str:
    """Return the whole table."""
    names = ["kind", *_FIELDS, "learns", "needs", "saves compute"]
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*head, *map(row, HOMES)]) + "\n"


def filled(page: str) -> str:
    """Return the page with its table made anew."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
