"""Everything that can be measured of each layer on each input, for one token group, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from adaskip.batch import Batch, exact_match
from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.crossmodal import read_attention, remove_keys
from adaskip.survey.firstorder import logit_tangent, score_products
from adaskip.theory import bounds, measures
from adaskip.theory.costs import per_input
from adaskip.theory.tables import Survey

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
    done = 0
    for batch in batches:
        part = _Batch(model, batch, tokens, seed + done, chain).measure(tangents - done)
        parts.append({name: value.cpu() for name, value in part.items()})
        done += len(part["kl"])
        if progress is not None:
            progress(done)
    if not parts:
        raise DataError("profile: expected at least one batch, got none")
    return Survey(model.runtime.group, **{name: torch.cat([p[name] for p in parts]) for name in parts[0]}, chain=chain)


class _Batch:
    """One batch on its way through the measures."""

    def __init__(
        self, model: RoutedModel, batch: Batch, tokens: int, seed: int, chain: dict[str, tuple[int, int]]
    ) -> None:
        self.model, self.batch, self.count, self.seed, self.chain = model, batch, tokens, seed, chain
        self.where = batch.supervised
        self.read = model.read_tokens(batch.inputs)
        vision = model.runtime.group == "vision"
        self.group = self.read.vision if vision and self.read.vision is not None else self.read.valid
        for name, has in (("supervised token", self.where.any(1)), ("token of its group", self.group.any(1))):
            if not has.all():
                row = int((~has).nonzero()[0])
                raise DataError(
                    f"profile: input {row} of a batch has no {name} (group {model.runtime.group!r}); "
                    "leave it out, or profile group 'all' on prompts with answers"
                )
        self.places = _spread(self.group, tokens)
        self.n_layers = len(model.spec.layers)
        self.states: list[Tensor] = []
        self.kept: list[Tensor] = []  # (b m d) each
        self.pooled: list[Tensor] = []  # (b d) each

    def measure(self, tangents: int) -> dict[str, Tensor]:
        columns: dict[str, list[Tensor]] = {name: [] for name in ("cosine", "rho")}
        logits = self._dense(columns)
        found = {name: torch.stack(values, 1) for name, values in columns.items()}
        before = logits[:, :-1][self.where]
        shifts = self._exact(before, logits, found)
        found["score"] = score_products(self.model, self.batch, self.states, shifts, seed=self.seed) / 2
        found["tangent"] = self._tangents(before, shifts, tangents)
        labels = self.batch.labels
        first = self.where.long().argmax(1)
        p = logits.gather(1, first[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0].double().softmax(-1)
        draw = torch.Generator(p.device).manual_seed(self.seed)
        return {name: value.double() for name, value in found.items()} | {
            "dense_hit": exact_match(logits, labels).double(),
            "drawn": torch.multinomial(p, 1, generator=draw)[:, 0],
            "pooled": torch.stack(self.pooled, 1),
            "tokens": torch.stack(self.kept, 2),
        }

    def _dense(self, columns: dict[str, list[Tensor]]) -> Tensor:
        """The dense pass: its states, and the geometry, samples and attention of every layer."""

        def watch(index: int, before: Tensor, after: Tensor) -> None:
            for state in (after,) if self.states else (before, after):
                self.states.append(state)
                self._sample(state)
            columns["cosine"].append(measures.cosine_distance(before, after, self.group))
            columns["rho"].append(measures.relative_change(before, after, self.group))

        vision = self.model.runtime.group == "vision"
        reading = read_attention(self.model, self.read) if vision else nullcontext()
        with self.model.dense(), self.model.observe(watch), reading as attention:
            logits = self._run()
        if not logits[:, :-1][self.where].isfinite().all():
            raise DataError("profile: the dense model's logits are not finite; load it in another dtype")
        rows = len(logits)
        nothing = torch.zeros(rows, self.n_layers, device=logits.device)
        columns["mass"] = [*(nothing if attention is None else attention.mass).T]
        columns["moved"] = [*(nothing if attention is None else attention.moved).T]
        return logits

    def _sample(self, state: Tensor) -> None:
        rows = rearrange(torch.arange(len(state), device=state.device), "b -> b 1")
        self.kept.append(state[rows, self.places].float())
        inside = state.float().masked_fill(rearrange(~self.group, "b t -> b t 1"), 0.0)
        self.pooled.append(inside.sum(1) / self.group.sum(1, keepdim=True))

    def _exact(self, before: Tensor, logits: Tensor, found: dict[str, Tensor]) -> list[Tensor]:
        """Rerun each layer's suffix without the group, and without vision's keys; returns how far each skip moves."""
        columns: dict[str, list[Tensor]] = {name: [] for name in ("kl", "s", "u", "hit", "removal")}
        shifts: list[Tensor] = []
        keep = torch.ones(self.n_layers, len(logits), dtype=torch.bool, device=logits.device)
        for layer in range(self.n_layers):

            def watch(index: int, _: Tensor, after: Tensor, layer: int = layer) -> None:
                if index == layer:
                    shifts.append(after - self.states[layer + 1])

            keep[layer] = False
            with self.model.replay(self.states[: layer + 1]), self.model.observe(watch):
                skipped = self._run(routing=keep)
            keep[layer] = True
            after = skipped[:, :-1][self.where]
            shift, kl = bounds.logit_shift(before, after), bounds.kl_exact(before, after)
            self._check_links(before, after, shift, kl)
            columns["kl"].append(self._per_input(kl, "mean"))
            columns["s"].append(self._per_input(shift.s, "max"))
            columns["u"].append(self._per_input(shift.u, "max"))
            columns["hit"].append(exact_match(skipped, self.batch.labels).double())
            if self.model.runtime.group == "all":
                columns["removal"].append(torch.zeros(len(logits), device=logits.device))
                continue
            blinded = remove_keys(self.model, self.read, layer)
            with self.model.dense(), self.model.replay(self.states[: layer + 1]), blinded:
                blind = self._run()[:, :-1][self.where]
            columns["removal"].append(self._per_input(bounds.kl_exact(before, blind), "mean"))
        found |= {name: torch.stack(values, 1) for name, values in columns.items()}
        return shifts

    def _tangents(self, before: Tensor, shifts: list[Tensor], wanted: int) -> Tensor:
        rows = len(self.where)
        if wanted <= 0:
            return torch.full((rows, self.n_layers), torch.nan, device=before.device)
        columns = []
        for layer, shift in enumerate(shifts):
            moved = logit_tangent(self.model, self.batch, self.states, layer, shift)[:, :-1][self.where]
            s = bounds.logit_shift(before, before + moved).s
            columns.append(self._per_input(bounds.kl_quadratic(s), "mean"))
        measured = torch.arange(rows, device=before.device) < wanted
        return torch.stack(columns, 1).where(rearrange(measured, "b -> b 1"), torch.nan)

    def _check_links(self, before: Tensor, after: Tensor, shift: bounds.LogitShift, kl: Tensor) -> None:
        """Every bound of links 3 and 3d on every predicted token of this very skip."""
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
        return per_input(values, self.where, reduce)

    def _run(self, **more: Any) -> Tensor:
        logits: Tensor = self.model(**self.batch.arguments(), **more).logits
        return logits


def _spread(group: Tensor, count: int) -> Tensor:
    """long (b count): positions evenly spaced over each row's own group tokens, repeated where there are fewer."""
    order = torch.argsort(~group, dim=1, stable=True)
    have = group.sum(1, keepdim=True)
    steps = (torch.arange(count, device=group.device) + 0.5) / count
    return order.gather(1, (steps * have).long().clamp(max=group.shape[1] - 1).minimum(have - 1))
