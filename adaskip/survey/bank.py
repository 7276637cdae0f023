"""Find a bank of paths, and what tells from a prompt how much each of them costs it.

    price every layer alone          nested greedy paths for all      groups of inputs that find the same layers dear
                                     -> the best static plans         -> nested greedy paths for each
    price the paths on all inputs    regress the prices on prompts, cross-fitted
    price of compute                 so high that the paths that prompts choose need as much compute as was asked for

What a path costs varies far more between inputs than between paths of one length. So most is gained by how many layers
an input leaves out: one plan for all must leave out as many of those who need them. Every cost is exact: the mean KL of
the routed model from the dense one over an input's answer. No gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.plan import Target
from adaskip.policies.features import describe_prompt
from adaskip.policies.path_bank import PathBank
from adaskip.runtime.attach import RoutedModel
from adaskip.sites import label_site
from adaskip.stages import SILENT, Stages
from adaskip.survey.greedy import Path, exact_prices, greedy_paths
from adaskip.survey.ledger import Ledger
from adaskip.survey.price_file import PriceFile, find_origin
from adaskip.survey.record import record
from adaskip.survey.static import layer_savings
from adaskip.theory.regression import FLOOR, FOLDS, Predictor, fit_predictor

_CLEAR = 1.645
"""Standard errors by which choosing must pay."""
_FEWEST = 8
"""A group of fewer inputs than this gets no paths of its own."""
_ONCE = 32
"""Inputs priced at once: between two notes in the ledger, and two of the progress."""
_ROUNDING = 1e-9
_MARGIN = 1e-4


@dataclass(frozen=True)
class Bank:
    """Hold paths, what they cost the inputs that they were found on, and a predictor of that.

    Without a predictor, where choosing did not pay, there is one path: the best static plan.
    """

    paths: tuple[Path, ...]
    costs: Tensor  # float64 (n k) nats per predicted token
    share: Tensor  # float64 (k) of the dense decoder's FLOPs
    static: int  # the path that costs least of those that one plan for all may take
    keep: float  # mean share that was asked for
    entry: int
    predictor: Predictor
    price: float  # nats for all of the dense FLOPs
    chosen: Tensor  # long (n): the path that each input takes, by a predictor that was fitted without it

    @property
    def figures(self) -> dict[str, float]:
        """Return means: costs of the ``static`` plan, as ``chosen`` and at ``best``; shares kept of the first two.

        ``best`` is the ceiling: the same bank, chosen by what paths really cost each input.
        """
        rows = torch.arange(len(self.costs))
        ceiling = choose(self.costs, self.share, lowest_price(self.costs, self.share, self.keep))
        return {
            "static": float(self.costs[:, self.static].mean()),
            "chosen": float(self.costs[rows, self.chosen].mean()),
            "best": float(self.costs[rows, ceiling].mean()),
            "static_keep": float(self.share[self.static]),
            "chosen_keep": float(self.share[self.chosen].mean()),
        }

    def policy(self, target: Target | None = None) -> PathBank:
        """Return the policy; attach it, and `load` the predictor into it."""
        target = target or Target()
        paths = [[label_site(target.unit, site) for site in path] for path in self.paths]
        return PathBank(paths, self.entry, target, price=self.price)

    def load(self, policy: PathBank) -> None:
        """Give an attached policy of these paths the predictor."""
        fitted = self.predictor
        state = {"share": self.share, "centre": fitted.centre, "weight": fitted.weight, "bias": fitted.bias}
        policy.load_state_dict({name: value.float() for name, value in state.items()} | {"kappa": torch.ones(())})


def find_bank(
    model: RoutedModel,
    batches: Callable[[Sequence[int]], Sequence[Batch]],
    inputs: int,
    *,
    keep: float,
    paths: int = 12,
    groups: int = 4,
    deepest: int | None = None,
    entry: int = 3,
    width: int = 6,
    sample: int = 96,
    seed: int = 0,
    file: FilePath | None = None,
    stages: Stages = SILENT,
) -> Bank:
    """Find paths, how to choose among them, and the price at which the choices need a mean share of the compute.

    Args:
        model: attached, of scope ``prompt``; whatever decides in it, only its execution is used.
        batches: makes batches, on the model's device, of inputs given by number, in that order.
        inputs: how many there are; nothing else may be fitted on them. Neighbours should be of like length.
        keep: mean share of the dense decoder's FLOPs that may be used.
        paths: at most so many, beside the dense one and the static plan.
        groups: so many groups of inputs get paths of their own; 0: none.
        deepest: layers that a path leaves out at most; default: twice as many as the static plan, and one.
        entry: no path leaves out an earlier layer; the choice falls before this one.
        width: candidates tried for each further layer, those that cost least so far.
        sample: paths are planned on so many of the inputs.
        seed: of the groups.
        file: where prices are kept, so that a search that was stopped goes on; None: in memory.
        stages: hears what is under way.

    Raises:
        ConfigError: the budget cannot be held behind the entry.
        DataError: too few inputs to fit a predictor on.
        CheckpointError: the file is damaged, or holds prices of other inputs or of another model.
    """
    if inputs < 2 * FOLDS:
        raise DataError(f"find_bank: expected at least {2 * FOLDS} inputs to fit a predictor on, got {inputs}")
    stored = None if file is None else PriceFile(file, find_origin(model, batches(range(inputs))))
    ledger = Ledger(exact_prices(model, batches), inputs, stored)
    rows = [*dict.fromkeys(i * inputs // sample for i in range(sample))]
    held, sites = model.policy.held, len(model.sites)
    free = [site for site in range(model.sites.of(entry)[0], sites) if site not in held]
    saved = layer_savings(model, batches(rows[:_ONCE])).mean(0)
    if (least := 1 - float(saved[free].sum())) > keep:
        raise ConfigError(
            f"find_bank: keep: expected at least {least:.3f}, what remains when every layer behind entry={entry} that "
            f"is not held is left out, got {keep:g}"
        )

    text = f"pricing {len(free)} layers on {len(rows)} inputs"
    single = torch.full((len(rows), sites), torch.inf, dtype=torch.float64)
    single[:, free] = _priced(ledger, [(layer,) for layer in free], rows, text, stages)
    common, depth = _common(ledger, rows, single, saved, keep, deepest, width, stages)
    static = next(path for path in common if _share(saved, path) <= keep + _ROUNDING)
    lengths = sorted({1, len(static), (len(static) + depth + 1) // 2, depth})
    options = [common[length - 1] for length in lengths if length <= len(common)]
    for members in _groups(single[:, free], groups, seed):
        own = [rows[member] for member in members]
        with stages(f"planning for a group of {len(own)} inputs"):
            nested = greedy_paths(ledger, own, single[members].mean(0), depth, width, saves=saved)
        options += [nested[length - 1][0] for length in lengths if length <= len(nested)]

    options = [*dict.fromkeys([(), static, *options])]
    trial = _priced(ledger, options, rows, f"pricing {len(options)} paths on {len(rows)} inputs", stages)
    share = torch.tensor([_share(saved, path) for path in options], dtype=torch.float64)
    best = _select(trial, share, keep, paths + 2)
    bank, share = tuple(options[index] for index in best), share[best]
    costs = _priced(ledger, bank, range(inputs), f"pricing {len(bank)} paths on {inputs} inputs", stages)
    with stages("fitting the predictor"):
        features = torch.cat([describe(model, batch, entry) for batch in batches(range(inputs))])
        predictor, guessed = fit_predictor(features, costs)
    price = lowest_price(guessed, share, keep)
    chosen = choose(guessed, share, price)
    gain = costs[:, 1] - costs.gather(1, chosen[:, None])[:, 0]
    if gain.mean() <= _CLEAR * gain.std() / inputs**0.5:  # choosing does not clearly pay: one plan for all
        bank, costs, share, price, chosen = bank[1:2], costs[:, 1:2], share[1:2], 0.0, torch.zeros_like(chosen)
        predictor = Predictor(predictor.centre, predictor.weight[:, 1:2], predictor.bias[1:2])
    return Bank(bank, costs, share, bank.index(static), keep, entry, predictor, price, chosen)


def choose(costs: Tensor, share: Tensor, price: float) -> Tensor:
    """Return the path that each input takes at a price, long (n), given costs (n k) and shares of compute (k)."""
    return (costs + price * share).argmin(1)


def lowest_price(costs: Tensor, share: Tensor, keep: float) -> float:
    """Return the lowest price at which the choices' mean share is no more than ``keep``, and a ten-thousandth more.

    The share that an input takes only falls as the price rises, so it is bisected. At the price itself some input is
    just between two paths, and float32's last digits, in a batch of others, might take it to the heavier one. Raises
    ConfigError where the lightest path needs more.
    """
    if float(share.min()) > keep + _ROUNDING:
        raise ConfigError(f"price: expected a keep of at least {float(share.min()):.3f}, got {keep:g}")
    low, high = 0.0, 1.0

    def mean(price: float) -> float:
        return float(share[choose(costs, share, price)].mean())

    if mean(low) <= keep + _ROUNDING:
        return low
    while mean(high) > keep + _ROUNDING:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if mean(middle) <= keep + _ROUNDING else (middle, high)
    return high * (1 + _MARGIN)


@torch.no_grad()
def describe(model: RoutedModel, batch: Batch, entry: int) -> Tensor:
    """Return what a bank's predictor sees of each input, float32 (b f), on the CPU."""
    recorded = record(model, batch)
    return describe_prompt(recorded.entered[entry], batch.prompt_mask & recorded.tokens.valid).cpu()


def _priced(ledger: Ledger, paths: Sequence[Path], rows: Sequence[int], text: str, stages: Stages) -> Tensor:
    with stages(text, len(rows)) as advance:
        columns = []
        for start in range(0, len(rows), _ONCE):
            columns.append(ledger(paths, rows[start : start + _ONCE]))
            advance(min(start + _ONCE, len(rows)))
    return torch.cat(columns)


def _common(
    ledger: Ledger,
    rows: list[int],
    single: Tensor,
    saved: Tensor,
    keep: float,
    deepest: int | None,
    width: int,
    stages: Stages,
) -> tuple[list[Path], int]:
    """Plan nested paths for all inputs, at least until the budget is held; return them, and how deep paths go."""

    def plan(skips: int) -> list[Path]:
        # what was planned for fewer layers is in the ledger, so that it costs nothing to plan it again
        return [path for path, _ in greedy_paths(ledger, rows, single.mean(0), skips, width, saves=saved)]

    skips = 1
    with stages(f"planning for {len(rows)} inputs"):
        while _share(saved, plan(skips)[-1]) > keep + _ROUNDING:
            skips += 1
        depth = min(max(deepest or 2 * skips + 1, skips), int(single[0].isfinite().sum()))
        return plan(depth), depth


def _groups(single: Tensor, count: int, seed: int) -> list[list[int]]:
    """Group inputs that find the same layers dear, whatever their level; groups of a few are left out."""
    if count < 2:
        return []
    levels = (single + FLOOR).log()
    means = KMeans(min(count, len(single)), n_init=10, random_state=seed)
    label = torch.from_numpy(means.fit_predict((levels - levels.mean(1, keepdim=True)).numpy()))
    groups = [(label == group).nonzero().flatten().tolist() for group in label.unique().tolist()]
    return [members for members in groups if len(members) >= _FEWEST]


def _select(costs: Tensor, share: Tensor, keep: float, count: int) -> list[int]:
    """Select columns, the first two first, then the one that makes the inputs' best choices cheapest.

    The price at which these choices hold the budget is found anew with every path.
    """
    selected = [0, 1]
    while len(selected) < min(count, len(share)):
        price = lowest_price(costs[:, selected], share[selected], keep)
        worth = costs + price * share
        gain = (worth[:, selected].amin(1, keepdim=True) - worth).clamp(min=0).mean(0)
        gain[selected] = -1.0
        if float(gain.max()) <= 0:
            break
        selected.append(int(gain.argmax()))
    return selected


def _share(saved: Tensor, path: Path) -> float:
    return 1 - float(saved[list(path)].sum())
