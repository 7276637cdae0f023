"""Skip-It by the input: what early layers do to a prompt's states tells which later layers will hardly change them.

    layer     0     1     2  |  3    4    5   ...          entry = 3
    change   .31   .12   .08 | .05  .02  .04               measured before the entry | predicted from it, layer by layer
    limit .03                |  #    .    #                layers predicted to change less than the limit are skipped

What a layer does to an input is known once it has run, too late to skip it. So the notions of redundancy are measured
where every layer runs, before the entry, and a regression for each later layer says what they will be there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import KEEP_ALL, Target
from adaskip.policies.ranking import last_place
from adaskip.policy import Policy
from adaskip.theory.measures import token_cosine_distance

if TYPE_CHECKING:
    from adaskip.runtime.request import Request
    from adaskip.theory.regression import Predictor

Notion = Literal["geometric", "proximal"]
FLOOR = 1e-3
"""Added to notions before a logarithm is taken: changes far below it are all the same."""
PER_LAYER = 2
"""Numbers that each early layer gives: the notion over the prompt's tokens, and what becomes of its last token."""


class SkipIt(Policy):
    """Skip a layer for a prompt that it is predicted to change less than a limit (after arXiv 2509.25584).

    Published are conditions on measured notions, for layers and inputs; ours is that they are predicted for an input
    before its layers run: the logarithm of each later layer's notion by ridge regression, in closed form, on those of
    the layers before the entry (`adaskip.survey.forecast.find_forecast`). No gradient is taken. A prediction is an
    estimate of what the layer would do in a dense pass, not a bound.

    The logit of a layer is the logarithm of its predicted notion, and the threshold that of the limit. As it comes,
    without a fit, every notion is predicted to be 1.

    Args:
        limit: a layer is skipped where its predicted notion is no more than this, above 0.
        entry: layers before it run for every input.
        notion: ``geometric``: 1 - cos of a token's states before and after a layer, mean over the prompt's tokens of
            the target's group. ``proximal``: the share of these tokens for which it is above ``delta``.
        delta: of the notion ``proximal``, in (0, 2).
        target: its scope is ``prompt``.

    Raises:
        ConfigError: a value outside its set or range, or scope ``token``.
    """

    kind: ClassVar[str] = "skip_it"
    needs: ClassVar[str] = "prompts"
    centre: Tensor  # float32 (f), of the features
    weight: Tensor  # float32 (f k), k the layers from the entry on
    bias: Tensor  # float32 (k)

    def __init__(
        self,
        limit: float = 0.01,
        entry: int = 3,
        notion: Notion = "geometric",
        delta: float = 0.05,
        target: Target | None = None,
    ) -> None:
        super().__init__(target)
        self.entry, self.notion, self.delta = entry, notion, delta
        faults = []
        if isinstance(limit, bool) or not (isinstance(limit, int | float) and 0 < limit < math.inf):
            faults.append(f"limit: expected a number above 0, got {limit!r}")
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 1:
            faults.append(f"entry: expected a layer of at least 1, so that there is one to look at, got {entry!r}")
        if notion not in get_args(Notion):
            faults.append(f"notion: expected {' or '.join(get_args(Notion))}, got {notion!r}")
        if isinstance(delta, bool) or not (isinstance(delta, int | float) and 0 < delta < 2):
            faults.append(f"delta: expected a cosine distance in (0, 2), got {delta!r}")
        if self.target.scope == "token":
            faults.append("target: expected scope 'prompt', got 'token'; notions are of a whole prompt")
        if len(self.target.sites(1)) > 1:
            faults.append(
                f"target: expected one decision a layer, got unit {self.target.unit!r}; notions are of layers"
            )
        if faults:
            raise ConfigError("SkipIt: " + "; ".join(faults))
        self.threshold = math.log(limit)
        self._fitted: Predictor | None = None

    @property
    def limit(self) -> float:
        """Return what a layer may be predicted to change and yet be skipped; `threshold` is its logarithm."""
        return math.exp(self.threshold)

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Make room for the predictor, or take the one that was given before.

        Raises:
            ConfigError: the model has no layer at the entry, or the predictor is of another model or entry.
        """
        layers, features = len(spec.layers), PER_LAYER * self.entry
        if self.entry >= layers:
            raise ConfigError(f"SkipIt: entry: expected a layer 1 to {layers - 1}, got {self.entry}")
        shape = (features, layers - self.entry)
        values = {"centre": torch.zeros(features), "weight": torch.zeros(shape), "bias": torch.zeros(shape[1])}
        if self._fitted is not None:
            values = {name: getattr(self._fitted, name) for name in values}
        if (got := values["weight"].shape) != shape:
            raise ConfigError(
                f"SkipIt: expected a predictor of {shape[0]} features for {shape[1]} layers, got {got[0]} for "
                f"{got[1]}; fit it on this model with entry={self.entry}"
            )
        for name, value in values.items():
            self.register_buffer(name, value.to(spec.device, torch.float32))

    def fitted(self, predictor: Predictor) -> SkipIt:
        """Return this policy, which is to be attached, with what was fitted for it."""
        self._fitted = predictor
        return self

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return float32 logits (b): the logarithm of the predicted notion; before the entry above any threshold."""
        if "logits" not in request.memo:
            self._look(layer, states.detach(), request)
        if layer < self.entry:
            return torch.full((len(states),), -KEEP_ALL, device=states.device)
        logits: Tensor = request.memo["logits"][:, layer - self.entry]
        return logits.to(states.device)

    def _look(self, layer: int, states: Tensor, request: Request) -> None:
        """Note what the layer before did to the prompt; at the entry, predict what all later ones will do."""
        before = request.memo.pop("before", None)  # of one layer alone: states are large
        if before is not None:
            change = read_change(before.to(states.device), states, *self._masks(request), self.notion, self.delta)
            request.memo.setdefault("seen", []).append(change.to(self.weight.device))
        if layer < self.entry:
            request.memo["before"] = states
            return
        features = torch.cat(request.memo.pop("seen"), 1)
        request.memo["logits"] = (features - self.centre) @ self.weight + self.bias

    def _masks(self, request: Request) -> tuple[Tensor, Tensor]:
        vision = request.tokens.vision if self.target.group == "vision" else None
        return request.prompt if vision is None else request.prompt & vision, request.prompt

    def to_dict(self) -> dict[str, Any]:
        """Return the entry, the notion, its delta and the target; the limit is saved as the threshold."""
        own = {name: getattr(self, name) for name in ("entry", "notion", "delta")}
        return {**own, "target": self.target.to_dict()}


def measure(before: Tensor, after: Tensor, tokens: Tensor, notion: Notion, delta: float) -> Tensor:
    """Return what a layer did to each input's states by a notion, float32 (b); 0 where an input has none of the tokens.

    Args:
        before: (b t d), what entered the layer; what is not among the tokens may be anything, NaN included.
        after: (b t d), what it made of them.
        tokens: bool (b t).
        notion: ``geometric`` or ``proximal``, see `SkipIt`.
        delta: of ``proximal``.

    >>> before, after = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> measure(before, after, torch.ones(1, 2).bool(), "geometric", 0.05).tolist()
    [0.5]
    """
    change = token_cosine_distance(before, after)
    if notion == "proximal":
        change = (change > delta).float()
    return change.masked_fill(~tokens, 0.0).sum(1) / tokens.sum(1).clamp(min=1)


def read_change(before: Tensor, after: Tensor, tokens: Tensor, prompt: Tensor, notion: Notion, delta: float) -> Tensor:
    """Return what predicts later layers of what one early layer did, float32 (b 2), logarithms.

    Args:
        before: (b t d), what entered the layer.
        after: (b t d), what entered the next.
        tokens: bool (b t), those that the notion is of.
        prompt: bool (b t); its last token stands by itself, and always with its cosine distance.
        notion: see `SkipIt`.
        delta: of ``proximal``.
    """
    last = torch.zeros_like(prompt).scatter(1, last_place(prompt)[:, None], True) & prompt
    numbers = measure(before, after, tokens, notion, delta), measure(before, after, last, "geometric", delta)
    return (torch.stack(numbers, 1) + FLOOR).log()
