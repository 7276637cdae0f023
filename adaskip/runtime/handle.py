"""What tools look for on a Hugging Face model, as far as a routed model can stand in for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError, MissingAttributeError


class _NoConfig:
    """What tools find as ``model.config``: whatever they look for there, it says where it is."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else MissingAttributeError("RoutedModel.config", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise MissingAttributeError("RoutedModel.config", name)


class Handle(nn.Module):
    """A module around a Hugging Face model. Nothing is forwarded unseen; what is missing says what to pass instead.

    Args:
        spec: the model.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.backbone: PreTrainedModel = spec.model
        self.spec = spec

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the device of the first decoder layer."""
        return self.spec.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's precision; routers compute in float32."""
        return self.backbone.dtype

    @property
    def config(self) -> Any:
        """Nothing: ``model.backbone.config`` is Hugging Face's, ``model.policy`` is what adaskip follows."""
        # An object, since tools that find no `config` go on without one, and then fail somewhere else or not at all.
        return _NoConfig()

    @property
    def generation_config(self) -> Any:
        """The backbone's own; setting it sets the backbone's."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.backbone.generation_config = value

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, and say how routers are uploaded."""
        raise ConfigError("push_to_hub: write model.save_pretrained(folder), then on a terminal: hf upload REPO FOLDER")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if name.startswith("_") or not hasattr(backbone, name):
                raise
        raise MissingAttributeError(type(self).__name__, name)

    def __copy__(self) -> Handle:
        raise ConfigError("copy: a shallow copy would own the same backbone; write copy.deepcopy(model)")
