"""Attach a policy to a Hugging Face model, and hand out the `RoutedModel` through which it is used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.backbone.inspect import BackboneSpec, Tokens, inspect_backbone, read_tokens
from adaskip.errors import BackboneError, ConfigError
from adaskip.plan import KEEP_ALL, Routing, Target, read_number
from adaskip.policy import Policy, Settings, as_policy
from adaskip.runtime.arguments import name_arguments
from adaskip.runtime.fingerprint import Fingerprint, describe_unreadable
from adaskip.runtime.forward import Runtime
from adaskip.runtime.noise import Noise
from adaskip.runtime.options import Mode, Observer
from adaskip.runtime.patch import MARK, Patches, unwrap
from adaskip.runtime.persist import read_saved, restore, save
from adaskip.runtime.recompute import recomputing
from adaskip.runtime.results import Results
from adaskip.runtime.trial import try_tokens
from adaskip.sites import Label, Sites, read_sites
from adaskip.theory.gauge import Gauge

if TYPE_CHECKING:
    from adaskip.generate.paths import Answers
    from adaskip.runtime.adapters import Adapters


class RoutedModel(Results):
    """Run a frozen Hugging Face model whose decoder layers follow a policy.

    ``backbone`` is the Hugging Face object itself, still of its own class: calling it, its ``generate``, hooks and
    everything else that takes a PreTrainedModel work on it and follow the routing. Made by `attach` or
    `from_pretrained`. ``model(...)`` and ``model.generate(...)`` take what the backbone's take, by position or by name.

    In ``train()`` mode with gradients on, every layer is computed and mixed by straight-through gates; otherwise
    skipped work is really left out. Threads and tasks may share a model: `dense` and the like hold for the thread or
    task that enters them, `routing` is of the thread that reads it; all share weights, ``train()`` and `set_threshold`.
    ``policy`` is what was attached, ``target`` what its decisions speak of, ``facts`` its figures. Or None:
    ``certificate`` of `adaskip calibrate`, ``gauge`` (what skips cost, off a routed pass), ``adapters`` of `adapt`.
    """

    def __init__(self, spec: BackboneSpec, policy: Policy):
        super().__init__(spec)
        self.policy = policy
        self.runtime = Runtime(spec, policy)
        self.facts: dict[str, Any] = {}
        self.certificate: dict[str, Any] | None = None
        self.gauge: Gauge | None = None
        self.adapters: Adapters | None = None
        self.whole: Fingerprint | None = None  # of the backbone, where this process has let go of a part since
        self.patches = Patches(spec.model)
        self.patches.install(self.runtime)

    @property
    def target(self) -> Target:
        """Return what decisions speak of."""
        return self.policy.target

    @property
    def routers(self) -> nn.ModuleList | None:
        """Return the learned policy's heads, one a site; None under another policy."""
        heads = getattr(self.policy, "heads", None)
        return heads if isinstance(heads, nn.ModuleList) else None

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(
        self, *args: Any, prompt_mask: Tensor | None = None, routing: Routing | Tensor | None = None, **inputs: Any
    ) -> Any:
        """Run the backbone's forward, routed.

        Args:
            *args: as the backbone takes them: ``input_ids``, ``attention_mask``, ...
            prompt_mask: bool (b t), what the routers may look at; default: the real tokens before the first label that
                is not -100, or all of them. Needed when a whole answer is read without a cache.
            routing: decisions to follow instead of the routers' own: a `Routing` or its ``keep``, bool (s b); under
                scope ``token`` also bool (s b t) by position, behind which every token runs.
            **inputs: what the processor or tokenizer returned.

        Returns:
            The backbone's own output object; the decisions are in `routing`.
        """
        self._check_attached()
        inputs = name_arguments(type(self.backbone).forward, args, inputs, "model")
        around = self.runtime.state.options
        own = {"mode": self._mode(around.mode), "fixed": self._read_fixed(routing), "prompt_mask": prompt_mask}
        again = self.spec.layers if own["mode"] == "soft" and torch.is_grad_enabled() else ()
        with self.runtime.state.calling(around, prompt_length=None, prompt_ids=None, **own), recomputing(again):
            return self.backbone(**inputs)

    def generate(
        self, *args: Any, routing: Routing | Tensor | None = None, lossless: bool | int = False, **inputs: Any
    ) -> Any:
        """Run the backbone's ``generate``, routed once at prefill for all generated tokens, or token by token.

        Args:
            *args: as the backbone takes them: the prompts, a ``generation_config``, ...
            routing: decisions to follow, as in `forward`.
            lossless: let the routed path draft tokens that the dense model verifies, so that the answer is the dense
                model's; a number drafts so many a round (`adaskip.generate.lossless.generate_lossless`).
            **inputs: what the processor or tokenizer returned, and options of ``generate``.

        Raises:
            ConfigError: an option that would let routers see only a part of the prompt, or another prompt beside it.
        """
        self._check_attached()
        with self.runtime.state.using(fixed=self._read_fixed(routing)):
            if lossless is not False:
                from adaskip.generate.lossless import generate_lossless

                return generate_lossless(self, args, inputs, lossless)
            return self.backbone.generate(*args, **inputs)  # type: ignore[operator]

    def generate_many(self, prompts: Iterable[Mapping[str, Any]], **options: Any) -> Answers:
        """Answer prompts together that took the same path, as `adaskip.generate.paths.generate_many` says."""
        from adaskip.generate.paths import generate_many

        return generate_many(self, prompts, **options)

    @contextmanager
    def dense(self) -> Iterator[PreTrainedModel]:
        """Run exactly the original model inside, for this thread or task."""
        with self.runtime.state.using(mode="dense"):
            yield self.backbone

    @contextmanager
    def soft(self) -> Iterator[None]:
        """Run inside as training does, every layer computed and mixed by gates, also in ``eval()``."""
        with self.runtime.state.using(mode="soft"):
            yield

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Show ``observer(layer, before, after)`` the states (b t d) around every layer inside; nothing is stored.

        They are those around the whole layer also where the unit is one of its sublayers.
        """
        with self.runtime.state.using(observer=observer):
            yield

    @contextmanager
    def explore(self, noise: torch.Generator | Noise, temperature: float = 1.0, soft: bool = True) -> Iterator[None]:
        """Run inside as `soft` does, with gates drawn at random from their logits, at this temperature.

        ``soft=False``: layers are really skipped. The pass has no gradient, but
        ``routing.gates``, the probabilities to run, have one into the policy.
        """
        options = {"mode": "soft" if soft else "skip", "noise": Noise.of(noise), "temperature": temperature}
        with torch.set_grad_enabled(soft and torch.is_grad_enabled()), self.runtime.state.using(**options):
            yield

    @contextmanager
    def keep_all(self) -> Iterator[None]:
        """Let the routers decide inside, and run every layer whatever they say."""
        with self.runtime.state.using(threshold=KEEP_ALL):
            yield

    def gates(self) -> list[Tensor]:
        """Return the gates (b) of each site in the last `soft` pass, as they stand in its graph.

        Raises:
            ConfigError: the last pass was not one, or ran without gradients.
        """
        soft = self.runtime.state.here.soft
        if soft is None or not soft.gates:
            raise ConfigError("gates: no soft pass with gradients on is at hand; call the model inside soft() first")
        return soft.gates

    @contextmanager
    def replay(self, states: list[Tensor]) -> Iterator[None]:
        """Let layer i < len(states) - 1 return ``states[i + 1]`` inside instead of running, for one and the same batch.

        ``states`` are what `observe` saw before layer 0, then after layers 0, 1, ...; used to rerun only the decoder's
        suffix.
        """
        with self.runtime.state.using(replay=states):
            yield

    def read_tokens(self, inputs: dict[str, Any]) -> Tokens:
        """Return which positions of a batch are real, and which are vision."""
        return read_tokens(self.spec, inputs)

    def group_mask(self) -> Tensor:
        """Return the tokens of the request under way that the routing speaks of, bool (b t); for observers."""
        if self.runtime.request is None:
            raise ConfigError("group_mask: no request is under way; call it from an observer")
        request = self.runtime.request
        return request.tokens.valid if request.routed is None else request.routed

    def train(self, mode: bool = True) -> RoutedModel:
        """Set the training mode of the policy alone; the frozen backbone stays in ``eval()``."""
        self.training = mode
        self.policy.train(mode)
        self.backbone.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> RoutedModel:
        """Ask for gradients of the policy alone; those of the backbone are ``model.backbone.requires_grad_()``'s."""
        self.policy.requires_grad_(requires_grad)
        return self

    def _read_fixed(self, routing: Routing | Tensor | None) -> Tensor | None:
        """Return decisions made beforehand; refuse a shape that the scope does not understand."""
        keep = routing.keep if isinstance(routing, Routing) else routing
        sites, by_token = len(self.sites), self.runtime.scope == "token"
        if keep is not None and keep.dtype != torch.bool:
            raise ConfigError(f"routing: expected keep of torch.bool, got {keep.dtype}")
        if keep is not None and (keep.shape[0] != sites or keep.dim() not in ((2, 3) if by_token else (2,))):
            named = f"layers={sites}" if sites == len(self.spec.layers) else f"sites={sites}"
            shape = f"({named}, batch{', tokens' if by_token else ''})"
            raise ConfigError(f"routing: expected keep of shape {shape}, got {tuple(keep.shape)}")
        return keep

    def _mode(self, around: Mode) -> Mode:
        """Return how a call runs: as the context around it says, else soft where it is to be trained."""
        if around != "skip":
            return around
        return "soft" if self.training and torch.is_grad_enabled() else "skip"

    def set_threshold(self, threshold: float) -> None:
        """Run a layer where its router's logit exceeds ``threshold``; saved with it, voids certificate and gauge.

        Raises:
            ConfigError: no finite number.
        """
        try:
            self.policy.threshold = read_number(threshold)
        except ValueError as error:
            raise ConfigError(f"threshold: {error}") from None
        self.certificate = self.gauge = None

    def hold(self, layers: Iterable[Label]) -> None:
        """Run exactly these layers, or halves of them, whatever the policy says; saved, voids certificate and gauge.

        Raises:
            ConfigError: a layer the model does not have.
        """
        try:
            held = read_sites(self.target.unit, layers)
        except ValueError as error:
            raise ConfigError(f"held: {error}") from None
        _check_held(held, self.sites)
        self.policy.held = held
        self.certificate = self.gauge = None

    # -- life --------------------------------------------------------------------------------------------------------

    def detach(self) -> PreTrainedModel:
        """Take the policy off and return the model as it was: forwards, gradients asked for, training mode.

        What somebody has changed since, such as adapters put in and what trains with them, stays as it is.
        """
        self.patches.take_off()
        return self.backbone

    def _check_attached(self) -> None:
        """Refuse to run once the model was detached: it would answer, unrouted."""
        if getattr(self.backbone, MARK, None) is not self.runtime:
            raise BackboneError(
                "this RoutedModel was detached and routes nothing any more; call the Hugging Face model itself, or "
                "attach again with adaskip.attach or RoutedModel.from_pretrained(folder, backbone)"
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the policy only: ``adaskip_config.json``, ``router.safetensors`` and a model card."""
        return save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | PreTrainedModel,
        backbone: PreTrainedModel | str | Path | None = None,
        *,
        strict: bool = True,
        **load: Any,
    ) -> RoutedModel:
        """Load a policy, whichever it is, and attach it to the backbone it was saved with.

        Args:
            folder: what `save_pretrained` wrote, or ``user/name`` on the Hugging Face Hub, of which ``revision`` may
                name a branch, tag or commit. Folder and backbone may be given in either order, so that PEFT's
                ``from_pretrained(backbone, folder)`` works as well.
            backbone: a loaded model; None: the one named in the folder is loaded.
            strict: refuse a backbone whose fingerprint differs; False: warn.
            **load: passed to the backbone's ``from_pretrained`` (dtype, device_map, ...); ``revision`` is the routers'
                where they lie on the Hub.

        Raises:
            CheckpointError: files are missing or damaged.
            BackboneError: the backbone is not the one the routers belong to; says what differs.
            ConfigError: no folder is given, or options to load a backbone that is loaded already.
        """
        saved = read_saved(folder, backbone, load)
        model = build(saved.backbone, saved.policy, 0)
        try:
            restore(saved, model, strict)
        except BaseException:  # whatever it is, the model is handed back as it was
            model.detach()
            raise
        return model

    def extra_repr(self) -> str:
        """Name the number of layers, and what of them is routed."""
        settings = ", ".join(f"{field.name}={getattr(self.target, field.name)}" for field in fields(Target))
        return f"layers={len(self.spec.layers)}, {settings}"


def _check_held(held: tuple[int, ...], sites: Sites) -> None:
    """Refuse to hold a layer that the model does not have."""
    if wrong := sites.labels(site for site in held if not 0 <= site < len(sites)):
        raise ConfigError(f"held: expected layers 0 to {sites.layers - 1}, got {', '.join(map(str, wrong))}")


def attach(model: PreTrainedModel, policy: Policy | Settings | None = None, *, seed: int = 0) -> RoutedModel:
    """Let a policy decide which layers run: routers to be trained, a plan, or any other.

    The backbone is frozen, nothing of it is copied, and everything is checked before the first layer is touched.

    Args:
        model: any Hugging Face causal language or image-text-to-text model; of a PEFT model, the one inside is taken,
            and calling the PEFT model follows the routing too.
        policy: a `RouterConfig` (default: ``RouterConfig()``, one router a layer), a `SkipPlan`, or a `Policy`.
        seed: of the initial weights of what is to be trained.

    Raises:
        BackboneError: the model cannot be routed, or already is.
        ConfigError: the policy contradicts itself or the model.
    """
    routed = build(model, policy, seed)
    if next(routed.policy.parameters(), None) is not None and (text := describe_unreadable(routed.spec)):
        warnings.warn(text, stacklevel=2)
    return routed


def build(model: PreTrainedModel, policy: Policy | Settings | None, seed: int) -> RoutedModel:
    """Attach as `attach` does, without its warning."""
    policy = as_policy(policy)
    if isinstance(model, RoutedModel):
        raise BackboneError("this RoutedModel carries adaskip already; attach anew with adaskip.attach(model.detach())")
    model = unwrap(model)
    if getattr(model, MARK, None) is not None:
        raise BackboneError(
            f"{type(model).__name__} already carries adaskip; call detach() on its RoutedModel first, or, if there is "
            "none, as for a copy, adaskip.detach(model)"
        )
    target = policy.target
    spec = inspect_backbone(model, target.unit, target.kv)
    _check_held(policy.held, target.sites(len(spec.layers)))
    if target.group == "vision" and not spec.vision_ids:
        raise BackboneError(
            f"group 'vision': {type(model).__name__} has no vision tokens in its sequence "
            "(its config names no image_token_id); use group='all'"
        )
    policy.build(spec, seed)
    routed = RoutedModel(spec, policy)
    # these run single tokens of a row, or leave keys behind: whether this model's attention takes that is tried first
    if target.scope == "token" or target.kv == "kept" or target.phase != "both":
        try:
            try_tokens(routed)
        except BaseException:  # an interrupt too must leave the model as it was
            routed.detach()
            raise
    return routed.eval()
