"""Models whose routed path agrees with the dense model as often as a test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel, attach
from tests import families
from tests.families import Toy


def drafting(name: str, factor: float, layer: int = 1, **plan: Any) -> tuple[Toy, RoutedModel]:
    """A model and a plan that leaves out one layer, which moves the states by ``factor`` of what it would.

    0: drafts are the dense model's own tokens. A small one: they are so now and then.
    """
    toy = families.make(name, "eager" if name == "gemma2" else "sdpa")  # sdpa lacks its soft cap
    _replace(toy.model, layer, lambda before, after: before + factor * (after - before))
    return toy, attach(toy.model, SkipPlan.static([layer], **plan))


def opposed(name: str) -> tuple[Toy, RoutedModel]:
    """A model whose last layer turns the states round, and a plan without it: the draft's best token is the worst."""
    toy = families.make(name, "sdpa")
    _replace(toy.model, families.LAYERS - 1, lambda before, after: -before)
    return toy, attach(toy.model, SkipPlan.static([families.LAYERS - 1]))


def _replace(model: Any, index: int, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change what a layer returns; where it is skipped it returns what it got, which ``change`` sees twice."""
    from adaskip.backbone.inspect import inspect_backbone

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        if after is before:  # skipped
            return out
        states = change(before, after)
        return (states, *out[1:]) if isinstance(out, tuple) else states

    inspect_backbone(model).layers[index].register_forward_hook(hook, with_kwargs=True)
