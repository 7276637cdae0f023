"""What a backbone's configuration says of its size: counted on a model without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from adaskip.backbone.inspect import inspect_layers
from adaskip.errors import BackboneError


@dataclass(frozen=True)
class Footprint:
    """Hold the sizes that memory and work of a training step follow from."""

    parameters: int  # of the whole model, towers included
    decoder: int  # of the decoder layers
    active: int  # of these, those that one token meets: of a mixture, the experts that it takes part in
    layers: int
    width: int
    attention: int  # heads times their width
    inner: int  # width inside the MLP, of a mixture of all experts that a token takes part in
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]  # name, inputs and outputs of the linear modules of all decoder layers
    stored: torch.dtype | None  # of the weights, where the configuration says it

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Count the parameters of adapters of this rank, on modules of these names or on all linear ones."""
        chosen = [(i, o) for name, i, o in self.linears if not targets or name.split(".")[-1] in targets]
        return sum(rank * (inputs + outputs) for inputs, outputs in chosen)


def measure_footprint(config: PreTrainedConfig) -> Footprint:
    """Count a model's sizes by building it on the ``meta`` device, where weights take no memory.

    Raises:
        BackboneError: it cannot be built, or its decoder layers are not found.
    """
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
    except Exception as error:  # whatever a configuration does not like
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"{config.model_type}: cannot be built from its configuration ({first})") from error
    text: Any = config.get_text_config(decoder=True)
    layers = inspect_layers(model)
    decoder, active = 0, 0.0
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    taken = getattr(text, "num_experts_per_tok", None) or 1
    for layer in layers:
        for name, weight in layer.named_parameters():
            decoder += weight.numel()
            active += weight.numel() * (taken / experts if ".experts." in f".{name}." else 1.0)
    mixed = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    heads = text.num_attention_heads
    return Footprint(
        parameters=sum(weight.numel() for weight in model.parameters()),
        decoder=decoder,
        active=round(active),
        layers=len(layers),
        width=text.hidden_size,
        attention=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        inner=taken * mixed if experts > 1 else text.intermediate_size,
        vocabulary=text.vocab_size,
        linears=tuple(
            (name, module.in_features, module.out_features)
            for layer in layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ),
        stored=getattr(config, "dtype", None),
    )
