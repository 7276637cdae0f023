"""The attributes that tools look for on a Hugging Face model, and what to use for those a routed model has not."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError, MissingAttributeError
from adaskip.runtime.hub import push


class _NoConfig:
    """Stand where tools look for ``model.config``, and say of whatever they look for there where it is."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else MissingAttributeError("RoutedModel.config", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise MissingAttributeError("RoutedModel.config", name)


class Handle(nn.Module):
    """Wrap a Hugging Face model. Nothing is forwarded silently: what is missing says what to use instead.

    Args:
        spec: the model.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.backbone: PreTrainedModel = spec.model
        self.spec = spec

    @property
    def device(self) -> torch.device:
        """Return where inputs belong: the device of the first decoder layer."""
        return self.spec.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the backbone's precision; routers compute in float32."""
        return self.backbone.dtype

    @property
    def config(self) -> Any:
        """Refuse: ``model.backbone.config`` is Hugging Face's, ``model.policy`` is what adaskip follows."""
        # An object that refuses, since tools that find no `config` go on without one, and fail elsewhere or not at all.
        return _NoConfig()

    @property
    def generation_config(self) -> Any:
        """Return the backbone's own; setting it sets the backbone's."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.backbone.generation_config = value

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload routers",
    ) -> str:
        """Upload the policy and its model card, not the backbone; return the repository's address.

        Args:
            repo_id: ``user/name``; made where there is none.
            private: whether a new repository is; None: as the account's settings say.
            revision: branch to upload to, made where there is none; None: the main branch.
            commit_message: of the commit.

        Raises:
            ConfigError: no name of a repository, or a policy that cannot be saved.
            CheckpointError: the Hub refuses, or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repo_id, private=private, revision=revision, message=commit_message)

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
