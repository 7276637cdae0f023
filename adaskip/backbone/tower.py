"""What the class token of a vision tower attends to, seen while the tower runs, whatever kernel computes it.

tower        cls patch patch patch patch       one picture, four patches: the class token's line of the attention
attention     .9   .1    .4    .2    .4         weights, summed over two heads
prompt       text  v     v     v     v  text   each patch becomes a vision token, in order: .1 .4 .2 .4 are theirs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.backbone.attention import AttentionCall, intercept_attention
from adaskip.errors import BackboneError, DataError

_CLASS_TOKENS = ("class_embedding", "cls_token")
_DEPTHS = ("num_hidden_layers", "depth")


def find_tower_layer(model: PreTrainedModel, layers: Sequence[nn.Module], reader: str) -> nn.Module:
    """Find the layer of the vision tower whose states become vision tokens.

    Args:
        model: the Hugging Face object.
        layers: its decoder's layers.
        reader: who wants to read the class token's attention there; for errors.

    Raises:
        BackboneError: it has no vision tower, several, or one without a class token.
    """
    name, config = type(model).__name__, getattr(model.config, "vision_config", None)
    counts = {getattr(config, key, None) for key in _DEPTHS} - {None}
    decoder = {module for layer in layers for module in layer.modules()}
    towers = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts and decoder.isdisjoint(module)
    ]
    if len(towers) != 1:
        raise BackboneError(
            f"{name}: {reader} reads the attention of one vision tower, and {len(towers)} were found; "
            "choose another policy"
        )
    classes = [key for key, _ in model.named_parameters() if key.rpartition(".")[2] in _CLASS_TOKENS]
    if not classes:
        raise BackboneError(
            f"{name}: {reader} ranks vision tokens by what the tower's class token attends to, and this tower has no "
            "class token; choose another policy, such as adaskip.policies.FastV()"
        )
    return towers[0][_read_place(model.config, len(towers[0]))]


def _read_place(config: Any, depth: int) -> int:
    """Return which of the tower's layers gives the states that the model takes; of several the last."""
    place = getattr(config, "vision_feature_layer", None)
    chosen = [depth if place is None else place] if not isinstance(place, list | tuple) else list(place)
    # counted as lists of states are: 0 is what enters the first layer, 1 what leaves it
    return max(0, *(value - 1 if value >= 0 else depth + value for value in chosen))


@contextmanager
def watch_class_token(layer: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Note what the class token attends to in this layer of a tower, summed over heads: float32 (p n) a call.

    Args:
        layer: of the tower.
        seen: gets it; p are the pictures of the call, n the class token and the patches behind it.

    Raises:
        BackboneError: on leaving, if the layer did not ask transformers' attention interface for its kernel.
    """

    def visit(call: AttentionCall) -> Any:
        queries, keys = call.query.shape[2], call.key.shape[2]
        if call.mask is None:  # a tower without one reads both ways
            everything = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.query.device)
            shown = replace(call, mask=everything)
        else:
            shown = call
        with torch.no_grad():
            seen.append(shown.weights(torch.zeros(1, dtype=torch.long, device=call.query.device)).sum((1, 2)))
        return call.run()

    with intercept_attention([layer], visit):
        yield


def spread_attention(seen: Sequence[Tensor], vision: Tensor) -> Tensor:
    """Return the class token's attention at the vision tokens of a batch, float32 (b t); 0 elsewhere.

    Args:
        seen: what `watch_class_token` saw of the batch's pictures, in order.
        vision: bool (b t), the tokens that the patches have become, in order.

    Raises:
        DataError: a picture has another number of patches than of vision tokens.

    >>> vision = torch.tensor([[False, True, True], [True, True, False]])
    >>> spread_attention([torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.7, 0.1]])], vision)
    tensor([[0.0000, 0.1000, 0.4000],
            [0.7000, 0.1000, 0.0000]])
    """
    tokens, every = int(vision.sum()), torch.cat([scores.flatten() for scores in seen]) if seen else torch.zeros(0)
    patches = torch.cat([scores[:, 1:].flatten() for scores in seen]) if seen else every
    for found in (patches, every):  # a model may take the class token along, which then has its attention to itself
        repeats = tokens // max(1, len(found))
        rows = vision[:: max(1, repeats)]  # of beams and samples: their tower ran once
        if len(found) * repeats == tokens and torch.equal(rows.repeat_interleave(repeats, 0), vision):
            everywhere = torch.zeros(rows.shape, device=vision.device)
            everywhere[rows] = found.to(vision.device)
            return everywhere.repeat_interleave(repeats, 0)
    raise DataError(
        f"vision tokens: expected one for each patch of the vision tower, got {tokens} for {len(patches)} patches; "
        "pass the processor's pixel_values along with the prompt, and where a model merges patches or cuts pictures "
        "up, choose a policy that reads no tower, such as adaskip.policies.FastV()"
    )
