"""The decoder's layers and token groups of any Hugging Face model: the one file that knows model internals.

Nothing here is a table of architectures. Layers are found by structure (the module list of the decoder as long as
``num_hidden_layers``), vision tokens by the placeholder ids that the configuration names, and what cannot be routed
soundly is refused with the reason, before anything is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adaskip.backbone.probe import check_layers, home
from adaskip.backbone.sublayers import Sublayers, find_sublayers
from adaskip.backbone.work import Work, measure_work
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.sites import Unit

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_ROUTABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class BackboneSpec:
    """Describe a model that can be routed.

    Attributes:
        model: the Hugging Face object itself, untouched.
        path: dotted name of the layer list inside it.
        layers: the decoder layers, in order.
        width: hidden size of the decoder.
        reads_ahead: whether it reads both ways what comes without ``token_type_ids``, as some prefix models do.
        outputs: what a layer returns: a tensor (0), or a tuple of this many.
        sublayers: what each layer is made of, where the routing needs to know.
        work: what each layer computes.
        head: FLOPs of the language-model head per position.
    """

    model: PreTrainedModel
    path: str
    layers: tuple[nn.Module, ...] = field(repr=False)
    width: int = 0
    reads_ahead: bool = False
    outputs: int = 0
    sublayers: tuple[Sublayers, ...] = field(default=(), repr=False)
    work: tuple[Work, ...] = field(default=(), repr=False)
    head: float = 0.0

    @property
    def config(self) -> Any:
        """Return the decoder's own configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def vision_ids(self) -> tuple[int, ...]:
        """Return the placeholder token ids of images and videos that the configuration names now; empty without."""
        named = (getattr(self.model.config, key, None) for key in _PLACEHOLDERS)
        return tuple(dict.fromkeys(value for value in named if value is not None))

    @property
    def device(self) -> torch.device:
        """Return the device that the first decoder layer lives on, or is brought to when it runs if it is offloaded."""
        return home(self.layers[0])


@dataclass(frozen=True)
class Tokens:
    """Mark the positions of a chunk that are real, and those that are vision."""

    valid: Tensor  # bool (b t)
    vision: Tensor | None  # bool (b t); None for a model without vision tokens

    @property
    def has_vision(self) -> bool:
        """Return whether any row holds a vision token."""
        return self.vision is not None and bool(self.vision.any())

    def kinds(self, among: Tensor) -> Tensor:
        """Return bool (b k t): a mask for each kind of token (text, and vision if the model has it) in ``among``."""
        among = among & self.valid
        if self.vision is None:
            return among.unsqueeze(1)
        return torch.stack([among & ~self.vision, among & self.vision], dim=1)


def inspect_backbone(model: nn.Module, unit: Unit = "block", kv: str = "absent") -> BackboneSpec:
    """Find the decoder layers of a causal language or image-text-to-text model, and what the routing needs of them.

    Args:
        model: the Hugging Face object.
        unit: what is to be left out of a layer: block, attention, mlp, or sublayers for either of the latter.
        kv: what is to become of the keys and values of what is left out: absent or kept.

    Raises:
        BackboneError: the object is no such model, or routing it would be unsound; says which and why.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"expected a transformers PreTrainedModel, got {name}; "
            "load one with AutoModelForCausalLM or AutoModelForImageTextToText.from_pretrained(...)"
        )
    if model.config.is_encoder_decoder:
        raise BackboneError(f"{name}: an encoder-decoder model cannot be routed; expected a decoder-only model")
    if not model.can_generate():
        raise BackboneError(
            f"{name}: expected a model with a language-model head that can generate; "
            "load it with AutoModelForCausalLM or AutoModelForImageTextToText instead of AutoModel"
        )
    config = model.config.get_text_config(decoder=True)
    path, layers = _find_layers(model, config)
    other = set(getattr(config, "layer_types", None) or ()) - _ROUTABLE_LAYERS
    if other:
        raise BackboneError(
            f"{name}: layers of type {', '.join(sorted(other))} keep something else than keys and values between "
            f"tokens, which a skip would break; expected only {', '.join(sorted(_ROUTABLE_LAYERS))}"
        )
    outputs, reads_ahead = check_layers(model, layers, config.hidden_size)
    needed = unit != "block" or kv == "kept"
    sublayers = find_sublayers(model, layers, config.hidden_size, unit) if needed else ()
    work, head = measure_work(model, layers, _pair_flops(config))
    return BackboneSpec(model, path, layers, config.hidden_size, reads_ahead, outputs, sublayers, work, head)


def inspect_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Find the decoder layers alone; the model may be one without weights.

    Raises:
        BackboneError: there is no one list of them.
    """
    return _find_layers(model, model.config.get_text_config(decoder=True))[1]


def count_head(spec: BackboneSpec) -> float:
    """Count anew the FLOPs of the language-model head per position; nothing may be attached to the model."""
    return measure_work(spec.model, spec.layers, _pair_flops(spec.config))[1]


def size_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Read the number of layers and the width of the language model that a configuration describes."""
    text: Any = config.get_text_config(decoder=True)
    return text.num_hidden_layers, text.hidden_size


def count_positions(config: PreTrainedConfig) -> int | None:
    """Count the positions that prompt and answer share, as a configuration states them; None where it states none."""
    text: Any = config.get_text_config(decoder=True)
    stated: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if stated is None or "factor" not in rope:
        return stated
    # stretched positions: some configurations state how many there are then, some how many there were before
    return max(stated, int(rope["factor"] * (rope.get("original_max_position_embeddings") or stated)))


def _pair_flops(config: Any) -> float:
    """Count what a query and a key cost an ordinary attention: the score, and the value's share in the result."""
    heads = config.num_attention_heads
    # a multiply-add is two FLOPs, once for the score and once for the value
    cost: float = 4.0 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return cost


def _find_layers(model: PreTrainedModel, config: Any) -> tuple[str, tuple[nn.Module, ...]]:
    """Find the outermost list inside the decoder that is as long as the configuration says, and its dotted name."""
    counts = {getattr(config, key, None) for key in ("num_hidden_layers", "decoder_layers", "num_decoder_layers")}
    decoder = model.get_decoder()
    # where `get_decoder` returns something that does not hold the layers, they are looked for one level up
    for part in (decoder, model.base_model):
        inside = f"{next(path for path, module in model.named_modules() if module is part)}."
        lists = [
            (f"{inside}{path}".strip("."), tuple(module))
            for path, module in part.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) in counts
        ]
        outermost = min((path.count(".") for path, _ in lists), default=0)
        lists = [(path, layers) for path, layers in lists if path.count(".") == outermost]
        if len(lists) == 1:
            return lists[0]
    candidates = ", ".join(path for path, _ in lists) or "none"
    raise BackboneError(
        f"{type(model).__name__}: expected one list of {config.num_hidden_layers} decoder layers "
        f"inside {type(decoder).__name__}, found {candidates}"
    )


def read_tokens(spec: BackboneSpec, inputs: dict[str, Any], ids: Tensor | None = None) -> Tokens:
    """Read which tokens of one call's model inputs are real, and which are vision.

    A vision token is one whose id is the placeholder's, or in ``inputs_embeds`` one whose embedding is, as the model
    itself looks for it. Once pictures are merged into the states their tokens count as text, unless ``ids`` or
    ``mm_token_type_ids`` tell them apart.

    Args:
        spec: what the model is made of.
        inputs: keyword arguments of the model's ``forward``.
        ids: long (b t), of the tokens that ``inputs_embeds`` embeds, if they are known.

    Raises:
        DataError: the inputs do not tell what is needed.
    """
    name, axes = "input_ids", "batch, tokens"
    if inputs.get(name) is None:
        name, axes = "inputs_embeds", "batch, tokens, width"
    source = inputs.get(name)
    if source is None:
        raise DataError("model inputs: expected input_ids or inputs_embeds, got neither")
    if source.dim() != axes.count(",") + 1:
        raise DataError(
            f"{name}: expected shape ({axes}), got {tuple(source.shape)}; give every sequence a row of its own"
        )
    shape = source.shape[:2]
    if 0 in shape:
        raise DataError(f"{name}: expected at least one row and one token, got {tuple(shape)}; leave empty prompts out")
    valid = _read_mask(inputs.get("attention_mask"), shape, source.device)
    if not spec.vision_ids:
        return Tokens(valid, None)
    ids = source if name == "input_ids" else ids
    if ids is not None:
        vision = torch.isin(ids, torch.tensor(spec.vision_ids, device=ids.device)).to(source.device)
    elif (types := inputs.get("mm_token_type_ids")) is not None:
        vision = types[:, -shape[1] :] != 0
    else:
        vision = _find_placeholders(spec, source)
    return Tokens(valid, vision & valid)


def _read_mask(mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Return bool (b t): which tokens of this chunk are real; a mask may speak of cached ones before them."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise DataError(
            f"attention_mask: expected shape (batch, tokens), got {kind}; a mask of one's own cannot be cut to the "
            "tokens that run, so pass the tokenizer's"
        )
    if mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        raise DataError(
            f"attention_mask: expected {shape[0]} rows of {shape[1]} tokens, or more with cached ones before them, got "
            f"{tuple(mask.shape)}; pass the mask that the tokenizer made with these tokens"
        )
    return mask[:, mask.shape[1] - shape[1] :].bool()


@torch.no_grad()
def _find_placeholders(spec: BackboneSpec, states: Tensor) -> Tensor:
    """Return bool (b t): which embedded tokens (b t d) are a placeholder."""
    table: Any = spec.model.get_input_embeddings()
    vision = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    for number in spec.vision_ids:
        if number < table.num_embeddings:  # some name an id beyond their vocabulary, which nothing can embed
            placeholder = table(torch.tensor(number, device=table.weight.device)).to(states)
            vision |= (states == placeholder).all(-1)
    return vision


def bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of ``module.forward``, by name."""
    return dict(zip(_parameters(type(module).forward), args, strict=False)) | kwargs if args else kwargs


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def twin(spec: BackboneSpec, keep: Sequence[int] | None = None) -> PreTrainedModel:
    """Build another model on the same weights, with all decoder layers or only with those that a static plan keeps.

    Args:
        spec: what the model is made of; nothing may be attached to it.
        keep: numbers of the layers that stay, ascending.

    Raises:
        ConfigError: no layer is left.
    """
    model = spec.model
    # a copy that finds every tensor in its memo takes it as it is, so that no weight is held twice
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    if keep is None:
        return copied
    if not keep:
        raise ConfigError("twin: expected at least one layer to stay, got none")
    parent, _, name = spec.path.rpartition(".")
    owner = copied.get_submodule(parent)
    layers = nn.ModuleList([getattr(owner, name)[index] for index in keep])
    setattr(owner, name, layers)
    for place, layer in enumerate(layers):
        for module in layer.modules():
            for number in ("layer_idx", "layer_id"):  # the slot of the cache, which is now one of fewer
                if hasattr(module, number):
                    setattr(module, number, place)
    config, count = copied.config.get_text_config(decoder=True), len(spec.layers)
    for key, value in vars(config).items():  # settings given layer by layer, such as layer_types
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, key, [value[index] for index in keep])
    config.num_hidden_layers = len(keep)
    return copied
