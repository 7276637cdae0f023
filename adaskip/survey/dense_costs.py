"""What leaving out each layer is predicted to cost an input, read off its own dense pass; and B of any gates.

    calibrated, gates    how far each layer moves the states of the group
    fisher               the gradient at the gates, for further backward passes
    functional           the prompt's states in the middle of the model, and how sure the dense prediction is

How sure the dense model is tells most: a skip moves the logits about as much whatever they are, and what that costs
depends on how much probability lies beside the top label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.policies.features import describe_prompt
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.firstorder import DRAWS, first_order
from adaskip.survey.record import Recorded
from adaskip.theory.bounds import redundancy_bound
from adaskip.theory.costs import predicted
from adaskip.theory.measures import relative_change
from adaskip.theory.prices import Kind, Prices
from adaskip.theory.sureness import SURENESS, describe_sureness


@dataclass(frozen=True)
class SkipCosts:
    """Hold what each skip is predicted to cost each input, and how skips add up."""

    s: Tensor  # float64 (b l): spread of the logits, nats
    u: Tensor | None  # float64 (b l): their largest rise; None: B is S^2/2, whose single costs are nats themselves
    correlation: Tensor | None  # float64 (l l); None: skips add up in full

    def bound(self, gates: Tensor, shape: str = "two-point") -> Tensor:
        """Return B (b) of keep gates (b l); see `bounds.redundancy_bound`."""
        return redundancy_bound(gates, self.s, self.u if shape == "two-point" else None, self.correlation)


def middle(layers: int) -> int:
    """Return the layer whose entering states `describe_dense` reads."""
    return layers // 2


def describe_dense(entered: Tensor, batch: Batch, valid: Tensor, logits: Tensor) -> Tensor:
    """Describe each input by its dense pass: float32 (b f), the prompt and how sure the prediction is.

    Args:
        entered: (b t d), what the layer in the `middle` got.
        batch: of the pass.
        valid: bool (b t), the real tokens.
        logits: (k v) at the predicted tokens, row by row.
    """
    prompt = describe_prompt(entered, batch.prompt_mask & valid)
    return torch.cat([prompt, describe_sureness(logits, batch.supervised).float()], 1)


def feature_groups(features: Tensor) -> tuple[int, int]:
    """Return how many features tell of the prompt, and how many of the prediction."""
    return features.shape[1] - SURENESS, SURENESS


def describe_recorded(recorded: Recorded) -> Tensor:
    """Return `describe_dense` of a recorded dense pass, on the CPU."""
    entered = recorded.entered[middle(len(recorded.entered))]
    return describe_dense(entered, recorded.batch, recorded.tokens.valid, recorded.logits).cpu()


@torch.no_grad()
def price_dense(
    model: RoutedModel, batch: Batch, prices: Prices | None, kind: Kind, noise: torch.Generator
) -> tuple[Tensor, SkipCosts | None]:
    """Run a batch densely; return its logits (b t v), and what its skips are predicted to cost.

    No price but fisher needs more than this pass.

    Args:
        model: attached.
        batch: prompts with answers.
        prices: calibrated constants of the kind; None: only the logits are of use.
        kind: of price.
        noise: of the labels that fisher draws.
    """
    if prices is not None and kind == "fisher":
        logits, slopes = first_order(model, batch, DRAWS, noise)
        return logits, SkipCosts(*prices.first_order_costs(slopes), None)
    rho: list[Tensor] = []
    entered: list[Tensor] = []
    groups: list[Tensor] = []
    at = middle(len(model.spec.layers))

    def watch(layer: int, before: Tensor, after: Tensor) -> None:
        group = model.group_mask()
        if kind != "functional":
            # a row without a token of the group (no picture) has nothing that a skip could cost
            change = relative_change(before, after, group).nan_to_num(0.0, posinf=torch.inf)
            rho.extend(change for _ in model.sites.of(layer))
        elif layer == at:
            entered.append(before)
            groups.append(group)

    with model.dense(), model.observe(watch):
        logits = model(**batch.arguments()).logits
    if prices is None:
        return logits, None
    if kind != "functional":
        return logits, SkipCosts(*prices.costs(torch.stack(rho, 1)), prices.correlation if kind == "gates" else None)
    assert prices.functional is not None  # `check_prices` made sure
    valid, where = model.read_tokens(batch.inputs).valid, batch.supervised
    features = describe_dense(entered[0], batch, valid, predicted(logits, where))
    s = prices.functional.costs(features) * groups[0].any(1, keepdim=True)
    return logits, SkipCosts(s, None, prices.correlation)


def price_inputs(model: RoutedModel, batches: Iterable[Batch], prices: Prices, seed: int = 0) -> SkipCosts:
    """Return what the skips of many inputs are predicted to cost, by the price that the constants are of; on the CPU.

    Costs a dense pass a batch; fisher a few backward passes as well.
    """
    noise = torch.Generator().manual_seed(seed)
    parts = [price_dense(model, batch, prices, prices.kind, noise)[1] for batch in batches]
    found = [part for part in parts if part is not None]
    u = None if found[0].u is None else torch.cat([part.u.cpu() for part in found if part.u is not None])
    return SkipCosts(torch.cat([part.s.cpu() for part in found]), u, prices.correlation)
