"""Show a policy that asks for it what the vision tower's class token attends to, as the tower runs within a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from adaskip.backbone.tower import find_tower_layer, watch_class_token

if TYPE_CHECKING:
    from adaskip.runtime.forward import Runtime


class Sight:
    """Watch one layer of the vision tower. An object, so that its hooks are copied together with the model.

    Args:
        runtime: of the model; its request under way gets what is seen.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def install(self) -> list[Any]:
        """Return the handles of the hooks that were put on the tower's layer.

        Raises:
            BackboneError: the model has no tower that can be read.
        """
        spec = self.runtime.spec
        layer = find_tower_layer(spec.model, spec.layers, type(self.runtime.policy).__name__)
        return [
            layer.register_forward_pre_hook(self._begin),
            layer.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, layer: nn.Module, args: Any) -> None:
        request, options = self.runtime.request, self.runtime.state.options
        seen = options.tower if request is None else request.seen
        if seen is not None and (request or options).mode != "dense":
            self.runtime.state.here.watching.enter_context(watch_class_token(layer, seen))

    def _end(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.runtime.state.here.watching.close()
