"""Cut one path's layers out as an ordinary model on the same weights.

Nothing of adaskip is left in it, so whatever speeds up a Hugging Face model works on it: static caches, which no routed
model can have, `torch.compile`, and with both of them decoding as a CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.backbone.inspect import twin
from adaskip.backbone.probe import ROWS, dense_pass
from adaskip.errors import BackboneError, ConfigError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel

_CLOSE = 1e-3


def cut(model: RoutedModel, path: Sequence[bool] | Tensor | SkipPlan | None = None) -> PreTrainedModel:
    """Return the layers of one path as a model of their own, of the backbone's class, frozen and in ``eval()``.

    It shares the backbone's weights, and takes no memory but its caches' and, where the model has adapters, that of the
    weights into which they are merged; ``model`` stays as it is. What it answers is what the routed model answers along
    this path. `adaskip.generate.plain.save_plain` saves it, where its configuration can say which layers it has.

    Args:
        model: blocks of which whole rows leave out (unit ``block``, group ``all``).
        path: whether each layer runs: a `SkipPlan`, an answer's ``path``, a column of ``model.routing.keep``;
            None: the one that the model's policy knows beforehand, such as a plan's.

    Raises:
        ConfigError: no such path, or one that leaves more of a layer than nothing.
        BackboneError: the model's layers do something else when they stand elsewhere, adapters cannot be merged into
            its weights, or it was detached.
    """
    model._check_attached()
    keep = _path(model, path)
    layers = keep.nonzero().flatten().tolist()
    if not layers:
        raise ConfigError("cut: expected at least one layer to stay, got a path without any")
    _check_injected(model, layers)
    plain: PreTrainedModel = twin(_unrouted(model).spec, layers).requires_grad_(False).eval()
    fixed = keep[:, None].expand(-1, ROWS)
    state = model.runtime.state
    with state.aside(), state.using(mode="skip", fixed=fixed):
        routed = dense_pass(model.backbone).logits
    gap = (dense_pass(plain).logits - routed).abs().max()
    if not gap <= _close(model) * routed.abs().max():
        raise BackboneError(
            f"cut: {type(plain).__name__}: on plain tokens its logits differ by {float(gap):.2g} from those of the "
            "routed model, so its layers depend on the place where they stand; use the routed model"
        )
    return plain


def _close(model: RoutedModel) -> float:
    """Return how far logits may differ, of the largest: merged weights are rounded anew."""
    rounding = 0.0 if model.adapters is None else 8 * torch.finfo(model.backbone.dtype).eps
    return max(_CLOSE, rounding)


def _path(model: RoutedModel, path: Sequence[bool] | Tensor | SkipPlan | None) -> Tensor:
    """Return the path, bool (l); refuse one that no layers can be cut out by."""
    runtime, layers = model.runtime, len(model.spec.layers)
    if path is None and runtime.known is not None:
        path = runtime.known
    if path is None:
        raise ConfigError("cut: routers choose a path for every prompt; say which, such as path=answer.path")
    target = path if isinstance(path, SkipPlan) else model.target
    if (target.unit, target.group, target.phase) != ("block", "all", "both"):
        raise ConfigError(
            f"cut: with unit {target.unit!r}, group {target.group!r} and phase {target.phase!r} a part of every layer "
            "still runs or may run, so none can be cut out; expected unit 'block', group 'all' and phase 'both'"
        )
    if isinstance(path, SkipPlan):
        return path.keep(layers)
    keep = torch.as_tensor(path).cpu()
    if keep.dtype != torch.bool or keep.shape != (layers,):
        raise ConfigError(
            f"cut: expected a path of {layers} booleans, got {keep.dtype} of shape {tuple(keep.shape)}; a batch has "
            "one path a row: model.routing.keep[:, row]"
        )
    return keep


def _check_injected(model: RoutedModel, layers: list[int]) -> None:
    """Refuse to cut layers after which the model adds pictures to the states: they would be added elsewhere."""
    vision = getattr(model.backbone.config, "vision_config", None)
    count = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if missing := [index for index in range(count) if index not in layers]:
        raise BackboneError(
            f"cut: {type(model.backbone).__name__} adds its pictures to the states after each of its first {count} "
            f"layers, so none of these can be cut out; the path leaves out {', '.join(map(str, missing))}"
        )


def _unrouted(model: RoutedModel) -> RoutedModel:
    """Return a copy on the same weights, but for those that adapters are merged into, with its routers taken off."""
    double = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    double.patches.frozen = []  # the weights are the routed model's, and stay frozen
    if double.adapters is not None:
        double.adapters.merge()
    double.detach()
    return double
