"""Find which layers each class of tokens can do without: greedily, by exact costs.

    dense pass            what tokens look like before layer `entry`     ->  classes, of prompt and of generated tokens
    part                  one class without one band of layers           ->  its exact cost, and the compute it saves
    one part after another, always the one that costs least for what it saves beside those that are gone already;
    several at once as long as they cost no more together than they did one by one

A plan for all tokens must leave a layer out for those that need it as well. Classes tell them apart by what they look
like, so that one plan serves every input, and what it leaves out still depends on the input. Costs are mean KLs from
the dense model over an input's answer, of the routed model as it is really executed. No gradient is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.plan import Target
from adaskip.policies.token_plan import TokenPlan, classify
from adaskip.runtime.attach import RoutedModel
from adaskip.sites import label_site
from adaskip.stages import SILENT, Stages
from adaskip.survey.price_file import PriceFile, find_origin
from adaskip.survey.record import Recorded, record

_ROUNDING = 1e-9
_TOGETHER = 1.25
"""Parts go at once where they cost no more than so many times the sum of what they last cost one by one."""


Part = tuple[int, tuple[int, ...]]
"""One class, and the sites it leaves out."""


@dataclass(frozen=True)
class Step:
    """Hold the parts that go at once, and what the plan costs and keeps with them and all before them gone."""

    parts: tuple[Part, ...]
    kl: float  # nats per predicted token, mean over inputs
    keep: float  # of the dense decoder's FLOPs, mean over inputs


@dataclass(frozen=True)
class TokenPlans:
    """Hold nested plans, each the one before without a few more parts."""

    centres: Tensor  # float32 (c d), of length 1
    prompts: int  # so many of the classes, the first, are of prompt tokens
    entry: int
    steps: tuple[Step, ...]

    def skips(self, count: int) -> list[list[int]]:
        """Return the sites that each class leaves out after so many steps."""
        gone: list[list[int]] = [[] for _ in self.centres]
        for step in self.steps[:count]:
            for label, layers in step.parts:
                gone[label] += layers
        return [sorted(layers) for layers in gone]

    def policy(self, count: int, target: Target) -> TokenPlan:
        """Return the plan after so many steps; attach it, and `load` the classes into it."""
        skips = [[label_site(target.unit, site) for site in sites] for sites in self.skips(count)]
        return TokenPlan(skips[: self.prompts], skips[self.prompts :], self.entry, target)

    def load(self, policy: TokenPlan) -> None:
        """Give an attached plan the classes."""
        policy.load_state_dict({"centres": self.centres})


@torch.no_grad()
def find_token_plans(
    model: RoutedModel,
    batches: Sequence[Batch],
    *,
    keep: float,
    classes: tuple[int, int] = (6, 4),
    entry: int = 3,
    band: int = 3,
    width: int = 4,
    seed: int = 0,
    file: Path | None = None,
    stages: Stages = SILENT,
) -> TokenPlans:
    """Find classes of tokens, and plans that keep ever less of the compute.

    Costs a dense pass, a suffix of the inputs for every part, and one for every step or one more than ``width`` where
    its parts go one by one. Keeps the states of all inputs and the logits that predict their answers in memory.

    Args:
        model: attached, of scope ``token``; whatever decides in it, only its execution is used. Layers it holds stay.
        batches: prompts with answers, on the model's device.
        keep: the last plan keeps no more than this share of the dense decoder's FLOPs, mean over inputs.
        classes: of prompt tokens, beside the first and the last of a prompt, which have classes of their own; and of
            generated tokens.
        entry: no earlier layer is left out; classes are told apart before this one.
        band: neighbouring layers, or halves of them, that are left out together.
        width: parts that go, or are tried, at each step, those that were cheapest for what they save when last tried.
        seed: of the classes.
        file: where costs are kept, so that a search that was stopped goes on; None: in memory.
        stages: hears what is under way.

    Raises:
        ConfigError: the model's decisions are not of scope ``token``, or so little cannot be kept behind the entry.
        DataError: fewer tokens than classes.
        CheckpointError: the file is damaged, or holds costs of other inputs, classes or of another model.
    """
    if model.target.scope != "token":
        raise ConfigError(
            "find_token_plans: expected a model of scope 'token'; attach with RouterConfig(scope='token')"
        )
    inputs = sum(map(len, batches))
    with stages(f"recording {inputs} inputs"):
        recorded = [record(model, batch) for batch in batches]
        centres, prompts = find_classes(recorded, entry, classes, seed)
    stored = None
    if file is not None:
        stored = PriceFile(file, find_origin(model, batches, entry=entry, classes=classes, seed=seed))
    prices = _Prices(recorded, centres, prompts, entry, stored)
    free = [site for site in range(model.sites.of(entry)[0], len(model.sites)) if site not in model.policy.held]
    bands = [tuple(free[start : start + band]) for start in range(0, len(free), band)]
    parts = [(label, layers) for label in range(len(centres)) for layers in bands]
    ratio: dict[Part, float] = {}  # nats for all of the FLOPs, as last measured
    saved: dict[Part, float] = {}  # share of them
    with stages(f"pricing {len(parts)} parts on {inputs} inputs", len(parts)) as advance:
        for count, part in enumerate(parts, 1):
            kl, kept = prices([part])
            if kept < 1 - _ROUNDING:
                ratio[part], saved[part] = kl / (1 - kept), 1 - kept
            advance(count)

    gone: list[Part] = []
    steps, now = [], (0.0, 1.0)  # what the plan costs and keeps
    with stages(f"planning on {inputs} inputs, down to a keep of {keep:g}") as advance:
        while now[1] > keep + _ROUNDING:
            if not ratio:
                raise ConfigError(
                    f"find_token_plans: keep: expected at least {now[1]:.3f}, what remains when every token leaves out "
                    f"every layer behind entry={entry} that is not held, got {keep:g}"
                )
            options = sorted(ratio, key=ratio.__getitem__)[:width]
            after = prices([*gone, *options])
            expected = now[0] + _TOGETHER * sum(ratio[part] * saved[part] for part in options)
            if after[0] > expected or after[1] < keep:
                tried = {part: prices([*gone, part]) for part in options}
                for part, (kl, kept) in tried.items():
                    ratio[part] = (kl - now[0]) / max(now[1] - kept, _ROUNDING)
                options = [min(tried, key=ratio.__getitem__)]
                after = tried[options[0]]
            for part in options:
                del ratio[part]
            gone += options
            now = after
            steps.append(Step(tuple(options), *now))
            advance(len(gone))
    return TokenPlans(centres, prompts, entry, tuple(steps))


def find_classes(
    recorded: Sequence[Recorded], entry: int, classes: tuple[int, int], seed: int = 0
) -> tuple[Tensor, int]:
    """Return directions that tell classes of tokens apart before a layer, float32 (c d), and how many are of prompts.

    The first token of a prompt and its last have classes of their own: many models put into the first what belongs to
    none, and the last one predicts. The others are grouped by direction, k-means on the unit sphere.

    Raises:
        DataError: fewer tokens than classes.
    """
    sides: dict[str, list[Tensor]] = {"first": [], "last": [], "prompt": [], "answer": []}
    for one in recorded:
        states = torch.nn.functional.normalize(one.entered[entry].float(), dim=-1)
        prompt = one.batch.prompt_mask & one.tokens.valid
        place = prompt.cumsum(1)
        first, last = prompt & (place == 1), prompt & (place == place[:, -1:])
        masks = {"first": first, "last": last, "prompt": prompt & ~first & ~last, "answer": one.tokens.valid & ~prompt}
        for name, mask in masks.items():
            sides[name].append(states[mask].cpu())
    tokens = {name: torch.cat(parts) for name, parts in sides.items()}
    for name, count in zip(("prompt", "answer"), classes, strict=True):
        if len(tokens[name]) < count:
            raise DataError(f"find_classes: expected at least {count} {name} tokens, got {len(tokens[name])}")
    ends = torch.stack([tokens["first"].mean(0), tokens["last"].mean(0)])
    centres = [ends, *(_cluster(tokens[name], k, seed) for name, k in zip(("prompt", "answer"), classes, strict=True))]
    device = recorded[0].batch.inputs["input_ids"].device
    return torch.nn.functional.normalize(torch.cat(centres), dim=-1).to(device), 2 + classes[0]


def _cluster(directions: Tensor, count: int, seed: int) -> Tensor:
    fitted = KMeans(count, n_init=4, random_state=seed).fit(directions.numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


class _Prices:
    """Measure what plans cost and keep on recorded inputs, each once, and remember it in a file."""

    def __init__(
        self, recorded: Sequence[Recorded], centres: Tensor, prompts: int, entry: int, file: PriceFile | None
    ) -> None:
        self.recorded, self.file = recorded, file
        self.shape = (len(centres), len(recorded[0].keep))
        self.known: dict[bytes, tuple[float, float]] = {}
        self.labels = [
            classify(one.entered[entry], one.batch.prompt_mask & one.tokens.valid, centres, prompts) for one in recorded
        ]
        stored = None if file is None else file.read("keep", "figures")
        for plan, figures in () if stored is None else zip(*stored, strict=True):
            self.known[plan.numpy().tobytes()] = tuple(figures.tolist())

    def __call__(self, parts: Sequence[Part]) -> tuple[float, float]:
        """Return the mean KL and the mean share kept with parts, (class, layers) each, gone."""
        keep = torch.ones(self.shape, dtype=torch.bool)
        for label, layers in parts:
            keep[label, list(layers)] = False
        key = keep.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self._measure(keep)
            self._write()
        return self.known[key]

    def _measure(self, keep: Tensor) -> tuple[float, float]:
        costs, shares = [], []
        for one, labels in zip(self.recorded, self.labels, strict=True):
            logits = one.rerun(keep.to(labels.device)[labels].permute(2, 0, 1))
            costs.append(one.compare(logits)["kl"].double())
            shares.append(one.model.routing.keep_rate.double())
        return float(torch.cat(costs).mean()), float(torch.cat(shares).mean())

    def _write(self) -> None:
        if self.file is None:
            return
        plans = torch.tensor([[*key] for key in self.known], dtype=torch.bool)
        figures = torch.tensor([*self.known.values()], dtype=torch.float64)
        self.file.write({"keep": plans.reshape(-1, *self.shape), "figures": figures})
