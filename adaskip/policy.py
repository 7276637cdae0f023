"""What decides which layers run: one small class, and the registry of its kinds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from adaskip.errors import ConfigError, did_you_mean
from adaskip.plan import Target

if TYPE_CHECKING:
    from adaskip.backbone.attention import AttentionCall
    from adaskip.backbone.inspect import BackboneSpec
    from adaskip.runtime.request import Request


class Policy(nn.Module):
    """Decide, layer by layer, which rows or tokens of a request run; the runtime executes whatever it says.

    A method is one subclass: give it a ``kind``, write `decide` (or `known`), and `register` it. It then trains (if it
    has parameters and returns logits), generates, is cached, saved and loaded like every other.

    Attributes:
        kind: the name it is registered and saved under.
        needs: what it is found from: ``nothing``, ``prompts``, ``answers`` (texts whose cost is measured, the dense
            model's own will do) or ``labels`` (the right answers).
        sees: whether it wants to see, in ``request.tower``, what the vision tower's class token attends to.
        enters: whether it changes the states that enter the first layer, in `enter`.
        forgets: whether keys of its tokens go once the prompt is read, those that `forget` names.
        target: what its decisions speak of.
        threshold: where it returns logits, a layer runs if its logit is above this.
        held: sites that run whatever it says.
    """

    kind: ClassVar[str] = ""
    needs: ClassVar[str] = "nothing"
    sees: ClassVar[bool] = False
    enters: ClassVar[bool] = False
    forgets: ClassVar[bool] = False

    def __init__(self, target: Target | None = None) -> None:
        super().__init__()
        self.target = target or Target()
        self.threshold = 0.0
        self.held: tuple[int, ...] = ()

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Make what depends on the model, once, before anything of it is touched.

        Args:
            spec: what the model is made of: ``layers``, ``width``, ``device`` ...
            seed: of whatever is drawn.

        Raises:
            ConfigError: the policy does not go with this model.
        """

    def known(self, layers: int) -> Tensor | None:
        """Return bool (s), whether each site runs, if that is the same for every input; else None.

        Such a policy is never asked to `decide`, and its passes compile to one graph.
        """

    def start(self, request: Request) -> None:
        """Look at a request once, before its first layer; notes for later layers go into ``request.memo``.

        They are the policy's alone, and last as long as the request; states do not belong there, decisions do.

        ``request.tokens.valid`` and ``.vision`` are bool (b t). So is ``request.prompt``, which marks the tokens that a
        decision may look at.
        """

    @property
    def reads(self) -> Sequence[int]:
        """Return the layers whose attention it wants to see; a row that leaves one shows it nothing there."""
        return ()

    def attend(self, layer: int, call: AttentionCall, request: Request) -> None:
        """Look at the attention of a layer of `reads`, before it is computed; it cannot change it.

        Args:
            layer: counted from 0.
            call: queries, keys and mask of the tokens that run the layer; ``call.weights(places)`` gives probabilities.
            request: what is known beside it: ``request.part`` names the rows and tokens of the chunk that run the
                layer, all of them where it is None. Notes for `decide` go into ``request.memo``.
        """

    @property
    def amends(self) -> Sequence[int]:
        """Return the layers, from 1 on, whose results it wants to change."""
        return ()

    def amend(self, layer: int, earlier: Tensor, before: Tensor, after: Tensor, request: Request) -> Tensor:
        """Return what goes on in place of the result of a layer of `amends`; it counts for the tokens of its target.

        Args:
            layer: counted from 0.
            earlier: (b t d), what entered the layer before this one, without a gradient.
            before: (b t d), what entered this layer.
            after: (b t d), what it returned.
            request: what is known beside them; ``request.part`` names the rows and tokens that these are.

        Returns:
            (b t d), of the type of ``after``. A token's may depend on that token alone.
        """
        return after

    def enter(self, states: Tensor, request: Request) -> Tensor:
        """Return the states (b t d) that enter the first layer in place of these; a row's may depend on it alone."""
        return states

    def forget(self, request: Request) -> Tensor | None:
        """Return bool (b t): tokens of the prompt whose keys and values go from every layer once it is read; or None.

        What stands behind the prompt never sees them, in a pass without a cache neither. Asked once a request, after
        its first layer has been decided.
        """
        return None

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Decide who runs a layer. A row's decision may depend on that row alone, and on no token behind its prompt.

        Args:
            layer: counted from 0; of unit ``sublayers`` the site, see `adaskip.sites.Sites`, and asked about twice a
                layer, each time with what enters the whole of it.
            states: (b t d), what enters the layer.
            request: what is known beside the states, see `start`.

        Returns:
            (b), under scope ``token`` (b t): bool, True runs; or float32 logits, which are compared with `threshold`,
            and in training become straight-through gates.
        """
        raise NotImplementedError(f"{type(self).__name__}: write decide(layer, states, request), or known(layers)")

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments that make this policy again, JSON-ready, without threshold, held layers and weights."""
        return {"target": self.target.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Policy:
        """Make the policy that `to_dict` described.

        Raises:
            ConfigError: a value it cannot have, or an argument that it does not know.
        """
        settings = dict(values)
        if isinstance(settings.get("target"), dict):
            settings["target"] = Target.from_dict(settings["target"])
        try:
            return cls(**settings)
        except TypeError as error:
            raise ConfigError(f"policy {cls.kind!r}: settings that {cls.__name__} does not take ({error})") from None


@runtime_checkable
class Settings(Protocol):
    """Stand for a policy, as `RouterConfig` and `SkipPlan` do."""

    kind: ClassVar[str]


# One line a method. Modules are named, not imported: nobody loads fifteen methods to use one.
HOMES = {
    "delask": "adaskip.policies.delask:DeLask",
    "fastv": "adaskip.policies.fastv:FastV",
    "learned": "adaskip.policies.learned.routers:Learned",
    "path_bank": "adaskip.policies.path_bank:PathBank",
    "pyramid_drop": "adaskip.policies.pyramid_drop:PyramidDrop",
    "skip_it": "adaskip.policies.skip_it:SkipIt",
    "skip_vision": "adaskip.policies.skip_vision:SkipVision",
    "static": "adaskip.policies.static:Static",
    "token_plan": "adaskip.policies.token_plan:TokenPlan",
}
_REGISTERED: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Make a policy known by its ``kind``, so that saved ones are brought back; a decorator.

    Raises:
        ConfigError: it has no ``kind``, or one that another class has.
    """
    kind, where = policy.kind, f"{policy.__module__}:{policy.__name__}"
    if not kind:
        raise ConfigError(f'{policy.__name__}: expected a kind to register it under, got none; write kind = "..."')
    known = _REGISTERED.get(kind)
    if kind in HOMES or (known is not None and f"{known.__module__}:{known.__name__}" != where):
        raise ConfigError(f"{policy.__name__}: the kind {kind!r} is another policy's; choose another")
    _REGISTERED[kind] = policy
    return policy


def kinds() -> list[str]:
    """Return the kinds that are known, in order."""
    return sorted({*HOMES, *_REGISTERED})


def find(kind: str) -> type[Policy]:
    """Return the class registered under a kind.

    Raises:
        ConfigError: there is none.
    """
    if kind in HOMES:
        module, name = HOMES[kind].split(":")
        policy: type[Policy] = getattr(import_module(module), name)
        return policy
    if kind not in _REGISTERED:
        raise ConfigError(
            f"policy {kind!r}: no such kind, {did_you_mean(str(kind), kinds())}; of your own: import the module that "
            "registers it first"
        )
    return _REGISTERED[kind]


def as_policy(value: Policy | Settings | None) -> Policy:
    """Return the policy itself, or the one that settings stand for; without any, learned routers.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, Policy):
        return value
    if value is None:
        return find("learned")()
    if isinstance(value, type) or not isinstance(value, Settings):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise ConfigError(
            f"attach: expected a RouterConfig, a SkipPlan or another policy, got {got}; write "
            "adaskip.attach(model, adaskip.RouterConfig(...))"
        )
    return find(value.kind)(value)  # type: ignore[arg-type]  # each takes its own settings
