"""One tiny dense pass that shows whether a model's layers can be left out.

Ten plain tokens go through the untouched model while its decoder layers and its cache are watched. What is seen
decides, not the name of the architecture: every layer must be called once, in order, turn states into states of the
same shape, look only back, and keep nothing between tokens but its own keys and values.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from adaskip.errors import BackboneError

ROWS, TOKENS = 2, 5
_SLICED = {"attention_mask", "causal_mask", "position_ids", "position_embeddings", "alibi", "padding_mask"}
"""Arguments of a layer that are cut to the rows and tokens that run."""

SUFFIX = {"token_type_ids": torch.ones(ROWS, TOKENS, dtype=torch.long)}
"""What tells a prefix model that the plain tokens are no part of what it reads both ways."""


def check_layers(model: PreTrainedModel, layers: tuple[nn.Module, ...], width: int) -> tuple[int, bool]:
    """Check that layers can be left out; return what they return, and whether they look ahead.

    They return a tensor (0), or a tuple of this many. Looking ahead is judged on inputs without ``token_type_ids``. A
    model on device ``meta`` is not run: 0.

    Raises:
        BackboneError: leaving one of these layers out would be unsound; says why.
    """
    if home(layers[0]).type == "meta":
        return 0, False
    name = type(model).__name__
    parameters = inspect.signature(type(model).forward).parameters
    caches = "past_key_values" in parameters
    if not caches and "use_cache" in parameters:
        raise BackboneError(f"{name}: it remembers earlier tokens in something else than a KV cache; not routable")
    watch = _look(model, layers, caches)
    ahead = bool(watch.ahead)
    if ahead and "token_type_ids" in parameters:  # a prefix model reads its prompt both ways, what follows is causal
        watch = _look(model, layers, caches, **SUFFIX)
    for fault in watch.faults(width, caches):
        raise BackboneError(f"{name}: {fault}; not routable")
    return watch.outputs, ahead


def reads_ahead(model: PreTrainedModel, layers: tuple[nn.Module, ...]) -> bool:
    """Return whether a layer looks ahead where the inputs have no ``token_type_ids``."""
    return bool(_look(model, layers, False, use_cache=False).ahead)


def _look(model: PreTrainedModel, layers: tuple[nn.Module, ...], caches: bool, **more: Any) -> _Watch:
    watch = _Watch(model, layers)
    with watch:
        dense_pass(model, **more, **({"past_key_values": ToldCache(watch.store), "use_cache": True} if caches else {}))
    return watch


@torch.no_grad()
def dense_pass(model: PreTrainedModel, **more: Any) -> Any:
    """Run the model in ``eval()`` on ten plain tokens and return its output; its modes are put back afterwards.

    Raises:
        BackboneError: it cannot read them; says why.
    """
    ids = plain_tokens(model)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    inputs |= {name: value.to(ids.device) if isinstance(value, Tensor) else value for name, value in more.items()}
    training = {module: module.training for module in model.modules()}
    try:
        return model.eval()(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(
            f"{type(model).__name__}: it cannot read {TOKENS} plain tokens, so its layers cannot be watched: {first}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook deaf to passes that other threads run through the same modules meanwhile."""
    owner = threading.get_ident()

    def hear(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return hear


def plain_tokens(model: PreTrainedModel) -> Tensor:
    """Return long (2 5): rows that differ in the last token only; no id that the configuration gives a meaning."""
    config = model.config.get_text_config(decoder=True)
    named = {
        value
        for part in (model.config, config)
        for key, value in vars(part).items()
        if "token" in key and type(value) is int
    }
    ids = [i for i in range(min(config.vocab_size, 4096)) if i not in named][-(TOKENS + 1) :]
    rows = torch.tensor([ids[:TOKENS], [*ids[: TOKENS - 1], ids[TOKENS]]])
    return rows.to(home(model.get_input_embeddings()))


def home(module: nn.Module) -> torch.device:
    """Return the device that a module computes on: that of its weights, or the one accelerate brings them to."""
    weights = list(module.parameters())
    device = next((weight.device for weight in weights if not weight.is_meta), None)
    if device is not None or not weights:
        return device or torch.device("cpu")
    hooks = (part.__dict__.get("_hf_hook") for part in module.modules())
    parts = (part for hook in hooks for part in getattr(hook, "hooks", (hook,)))
    targets = (getattr(part, "execution_device", None) for part in parts)
    target = next((target for target in targets if target is not None), "meta")
    return (
        torch.device("cuda" if type(target) is int else "cpu", target) if type(target) is int else torch.device(target)
    )


class _Watch:
    """Record what every layer is given, returns and stores."""

    def __init__(self, model: PreTrainedModel, layers: tuple[nn.Module, ...]) -> None:
        self.model, self.layers = model, layers
        self.called: list[int] = []
        self.inside: int | None = None
        self.stored: list[tuple[int | None, int]] = []
        self.shapes: list[tuple[Any, ...]] = []
        self.ahead: list[int] = []
        self.extra: set[str] = set()
        self.row_heads: list[str] = []
        self.outputs = 0
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_pre_hook(in_this_thread(self._before(index)), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(in_this_thread(self._after(index)), with_kwargs=True))
        for name, module in self.model.named_modules():
            if name and next(module.parameters(), None) is not None:
                self._handles.append(module.register_forward_hook(in_this_thread(self._head(name))))

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.called.append(index)
            self.inside = index

        return hook

    def _after(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.inside = None
            names = list(inspect.signature(type(layer).forward).parameters)[1:]
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            states = named.pop(names[0] if args else "hidden_states", None)
            self.outputs = len(out) if isinstance(out, tuple | list) else 0
            after = out[0] if self.outputs else out
            self.shapes.append(
                tuple(tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (states, after))
            )
            if isinstance(after, Tensor) and after.shape[:2] == (ROWS, TOKENS):
                # the rows differ in the last token alone: a difference before it came from looking ahead
                change = (after[0, :-1] - after[1, :-1]).float().norm()
                if change > max(1e-4, 4 * torch.finfo(after.dtype).eps) * after[:, :-1].float().norm():
                    self.ahead.append(index)
            self.extra |= {
                key
                for key, value in named.items()
                if key not in _SLICED and isinstance(value, Tensor) and value.shape[:2] == (ROWS, TOKENS)
            }

        return hook

    def _head(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            behind = self.called[-1:] == [len(self.layers) - 1] and self.inside is None
            states = args[0] if args else None
            if not behind or not isinstance(out, Tensor) or not isinstance(states, Tensor):
                return
            # a head behind the last layer that turns tokens into one thing a row, as for multiple choice
            if states.shape[:2] == (ROWS, TOKENS) and out.shape[0] == ROWS and out.shape[1:2] != (TOKENS,):
                self.row_heads.append(name)

        return hook

    def store(self, slot: int) -> None:
        """Note the slot that keys and values go to; called by the cache."""
        self.stored.append((self.inside, slot))

    def faults(self, width: int, caches: bool) -> list[str]:
        """List what makes these layers unsound to skip, gravest first; empty if nothing does."""
        problems: list[str] = []
        for index in range(len(self.layers)):
            if (times := self.called.count(index)) != 1:
                problems.append(
                    f"decoder layer {index} is called {times} times when the model reads plain text, expected once"
                )
        if self.called != sorted(self.called):
            problems.append(f"its decoder layers run in the order {self.called}")
        expected = (ROWS, TOKENS, width)
        for index, (before, after) in zip(self.called, self.shapes, strict=False):
            if before != expected or after != expected:
                problems.append(
                    f"decoder layer {index} turns {before} into {after}, expected states {expected} in and out"
                )
        if self.ahead:
            problems.append(
                "its attention is not causal (the last token changes what stands before it), so it is no decoder; "
                "expected a causal language model (for BERT-likes: config.is_decoder=True)"
            )
        if self.extra:
            problems.append(f"its layers are given their own input for every token ({', '.join(sorted(self.extra))})")
        if self.row_heads:
            problems.append(
                f"it has a second head that says one thing of a whole row ({self.row_heads[0]}), to choose between "
                "several sequences given as one input; expected one sequence a row: load it with AutoModelForCausalLM"
            )
        if caches:
            for index in range(len(self.layers)):
                kept = [slot for inside, slot in self.stored if inside == index]
                if not kept:
                    problems.append(
                        f"decoder layer {index} keeps no keys and values of its own (a recurrent state, a convolution, "
                        "or keys shared with another layer)"
                    )
                elif kept != [index]:
                    problems.append(
                        f"decoder layer {index} keeps keys and values in the cache slots {kept}, expected [{index}]"
                    )
        return problems


class ToldCache(DynamicCache):
    """Tell a listener, by the slot, whenever keys and values are handed to this cache."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.tell = tell

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.tell(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
