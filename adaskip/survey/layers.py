"""Measure everything that can be measured of each layer on each input, for one token group; train nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.crossmodal import remove_keys
from adaskip.survey.firstorder import logit_tangent, score_products
from adaskip.survey.record import find_group, record
from adaskip.theory import bounds, measures
from adaskip.theory.costs import per_input
from adaskip.theory.sinks import Sinks, norm_ratios
from adaskip.theory.tables import Survey

_AT_ONCE = 2**20
"""Logits that are compared in float64 at once: of a wide vocabulary a few tokens, so that no copy of all is made."""
_SLACK = 1e-9  # of the larger side: what float64 may lose in a chain of a dozen operations


@torch.no_grad()
def survey_layers(
    model: RoutedModel,
    batches: Iterable[Batch],
    tangents: int = 64,
    tokens: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Measure every layer of the routed group on batches of prompts with answers.

    A batch costs one dense pass, which also reads geometry and attention; one rerun of the suffix per layer for the
    exact cost (together at most L/2 + 1 passes) and, with vision, one more for key removal; one backward pass; and for
    the first ``tangents`` inputs a forward-mode product per layer.

    Args:
        model: attached; its group says which tokens leave a layer. Whatever it would decide does not matter.
        batches: as `Collator` makes them, on the model's device.
        tangents: inputs that get the forward-mode products, which cost more than the exact reruns.
        tokens: states kept of each input, evenly spaced over its group.
        seed: of the labels drawn.
        progress: called with the number of inputs done after each batch.

    Raises:
        DataError: an input without a supervised token or without a token of the group, or nothing to measure.
    """
    parts: list[dict[str, Tensor]] = []
    chain: dict[str, tuple[int, int]] = {}
    sinks = Sinks(len(model.spec.layers))
    done = 0
    for batch in batches:
        part = _Batch(model, batch, tokens, seed + done, chain, sinks).measure(tangents - done)
        parts.append({name: value.cpu() for name, value in part.items()})
        done += len(part["kl"])
        if progress is not None:
            progress(done)
    if not parts:
        raise DataError("profile: expected at least one batch, got none")
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Survey(model.target.group, **columns, chain=chain, sinks=sinks)


class _Batch:
    """Hold one batch on its way through the measures."""

    def __init__(
        self,
        model: RoutedModel,
        batch: Batch,
        tokens: int,
        seed: int,
        chain: dict[str, tuple[int, int]],
        sinks: Sinks,
    ) -> None:
        self.batch, self.seed, self.chain, self.sinks = batch, seed, chain, sinks
        self.supervised = batch.supervised
        self.vision = model.target.group == "vision"
        self.group = find_group(model, model.read_tokens(batch.inputs), batch)
        for name, has in (("supervised token", self.supervised.any(1)), ("token of its group", self.group.any(1))):
            if not has.all():
                row = int((~has).nonzero()[0])
                raise DataError(
                    f"profile: input {row} of a batch has no {name} (group {model.target.group!r}); "
                    "leave it out, or profile group 'all' on prompts with answers"
                )
        self.places = _spread(self.group, tokens)
        self.recorded = record(model, batch, attention=self.vision)
        if not self.recorded.logits.isfinite().all():
            raise DataError("profile: the dense model's logits are not finite; load it in another dtype")

    def measure(self, tangents: int) -> dict[str, Tensor]:
        """Measure everything; forward-mode products for the first ``tangents`` inputs only."""
        recorded = self.recorded
        columns, shifts = self._skips()
        columns = self._geometry() | self._lengths() | columns
        columns["score"] = score_products(recorded, shifts, seed=self.seed) / 2
        columns["tangent"] = self._tangents(shifts, tangents)
        samples = [self._sample(state) for state in recorded.states]
        return {name: value.double() for name, value in columns.items()} | {
            "dense_hit": recorded.match(recorded.logits).double(),
            "drawn": self._draw_first(),
            "pooled": torch.stack([pooled for _, pooled in samples], 1),
            "tokens": torch.stack([states for states, _ in samples], 2),
        }

    def _geometry(self) -> dict[str, Tensor]:
        """Read off the dense pass, (b l) each: how far every layer moves the group, and what the text takes from it."""
        recorded = self.recorded
        around = list(zip(recorded.entered, recorded.states[1:], strict=True))
        nothing = torch.zeros(len(self.batch), len(around), device=recorded.logits.device)
        text = recorded.attention
        return {
            "cosine": torch.stack([measures.cosine_distance(*pair, self.group) for pair in around], 1),
            "rho": torch.stack([measures.relative_change(*pair, self.group) for pair in around], 1),
            "mass": nothing if text is None else text.mass,
            "moved": nothing if text is None else text.moved,
        }

    def _lengths(self) -> dict[str, Tensor]:
        """Count the sinks among the group, and return how long its first and its longest state are, (b l) each."""
        ratios = [norm_ratios(state, self.group) for state in self.recorded.states[1:]]
        self.sinks.count(ratios, self.recorded.tokens.valid)
        first = self.group.long().argmax(1, keepdim=True)
        return {
            "first": torch.cat([ratio.gather(1, first) for ratio in ratios], 1),
            "longest": torch.stack([ratio.amax(1) for ratio in ratios], 1),
        }

    def _skips(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Rerun each layer's suffix without the group, and without vision's keys.

        Returns:
            (b l) columns, and for each layer how far its skip moves the state after it, (b t d).
        """
        columns: dict[str, list[Tensor]] = {name: [] for name in ("kl", "s", "u", "hit", "removal")}
        shifts: list[Tensor] = []
        recorded = self.recorded
        for layer in range(len(recorded.keep)):

            def watch(index: int, _: Tensor, after: Tensor, layer: int = layer) -> None:
                if index == layer:
                    shifts.append(after - recorded.states[layer + 1])

            with recorded.model.observe(watch):
                skipped = recorded.rerun(recorded.skipping([layer]))
            kl, s, u = self._compare(skipped)
            columns["kl"].append(self._per_input(kl, "mean"))
            columns["s"].append(self._per_input(s, "max"))
            columns["u"].append(self._per_input(u, "max"))
            columns["hit"].append(recorded.match(skipped).double())
            columns["removal"].append(self._remove_keys(layer))
        return {name: torch.stack(values, 1) for name, values in columns.items()}, shifts

    def _compare(self, skipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return exact KL, s and u of every predicted token, float64 (k) each, and check the links there."""
        tokens = max(1, _AT_ONCE // skipped.shape[-1])
        parts = []
        for before, after in zip(self.recorded.logits.split(tokens), skipped.split(tokens), strict=True):
            shift, kl = bounds.logit_shift(before, after), bounds.kl_exact(before, after)
            self._check_links(before, after, shift, kl)
            parts.append(torch.stack([kl, shift.s, shift.u]))
        kl, s, u = torch.cat(parts, 1)
        return kl, s, u

    def _remove_keys(self, layer: int) -> Tensor:
        """Return the exact KL (b) of hiding vision from the text at one layer; 0 for group all."""
        recorded = self.recorded
        if not self.vision:
            return torch.zeros(len(self.batch), device=recorded.logits.device)
        with remove_keys(recorded.model, recorded.tokens, layer):
            blind = recorded.rerun_dense(layer)
        return self._per_input(bounds.kl_exact(recorded.logits, blind), "mean")

    def _tangents(self, shifts: list[Tensor], count: int) -> Tensor:
        rows, dense = len(self.batch), self.recorded.logits
        if count <= 0:
            return torch.full((rows, len(shifts)), torch.nan, device=dense.device)
        columns = []
        for layer, shift in enumerate(shifts):
            s = bounds.logit_shift(dense, dense + logit_tangent(self.recorded, layer, shift)).s
            columns.append(self._per_input(bounds.kl_quadratic(s), "mean"))
        measured = torch.arange(rows, device=dense.device) < count
        return torch.stack(columns, 1).where(rearrange(measured, "b -> b 1"), torch.nan)

    def _sample(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (b m d) of some tokens of the group, and the mean (b d) over all of them."""
        rows = rearrange(torch.arange(len(state), device=state.device), "b -> b 1")
        inside = state.float().masked_fill(rearrange(~self.group, "b t -> b t 1"), 0.0)
        return state[rows, self.places].float(), inside.sum(1) / self.group.sum(1, keepdim=True)

    def _draw_first(self) -> Tensor:
        """Draw a label long (b) from the dense model at the first predicted token of each input."""
        # logits are kept of predicted tokens only, row by row: the first of a row lies behind all of the rows before
        count = self.supervised.sum(1)
        p = self.recorded.logits[count.cumsum(0) - count].double().softmax(-1)
        draw = torch.Generator(p.device).manual_seed(self.seed)
        return torch.multinomial(p, 1, generator=draw)[:, 0]

    def _check_links(self, before: Tensor, after: Tensor, shift: bounds.LogitShift, kl: Tensor) -> None:
        """Check every bound of links 3 and 3d on every predicted token of this very skip."""
        tv = (before.double().softmax(-1) - after.double().softmax(-1)).abs().sum(-1) / 2
        changed = before.argmax(-1) != after.argmax(-1)
        below = {
            "3b two-point": (kl, bounds.kl_two_point(shift.s, shift.u)),
            "3b u": (kl, shift.u),
            "3b range": (kl, bounds.kl_range(shift.r)),
            "3b lower": (bounds.kl_lower(shift.s, shift.b), kl),
            "3b total variation": (tv, bounds.tv_from_range(shift.r)),
        }
        for name, (small, large) in below.items():
            self._count(name, small > large + _SLACK * large.abs() + 1e-12)
        self._count("3d margin", bounds.argmax_certified_margin(before, after) & changed)
        self._count("3d kl", bounds.argmax_certified_kl(before, kl) & changed)

    def _count(self, link: str, violated: Tensor) -> None:
        checked, wrong = self.chain.get(link, (0, 0))
        self.chain[link] = checked + violated.numel(), wrong + int(violated.sum())

    def _per_input(self, values: Tensor, reduce: str) -> Tensor:
        return per_input(values, self.supervised, reduce)


def _spread(group: Tensor, count: int) -> Tensor:
    """Return long (b count): positions evenly spaced over each row's group tokens, repeated where there are fewer."""
    order = torch.argsort(~group, dim=1, stable=True)
    have = group.sum(1, keepdim=True)
    steps = (torch.arange(count, device=group.device) + 0.5) / count
    return order.gather(1, (steps * have).long().clamp(max=group.shape[1] - 1).minimum(have - 1))
