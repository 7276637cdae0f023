"""What a request costs: FLOPs, counted from what the layers compute and the tokens that really met them, and KV bytes.

One multiply-add is two FLOPs. Decoder FLOPs, of which keep rates are made, are those of the decoder layers' matrix
products. The language-model head is counted apart. Norms, activations, rotary embeddings, the vision tower and the
routers themselves are left out, of the dense figure as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adaskip.backbone.inspect import BackboneSpec
from adaskip.backbone.work import Work
from adaskip.plan import KV, Routing, Unit


@dataclass(frozen=True)
class Flops:
    """FLOPs of one request, by what they were spent on.

    A mixture of experts counts the experts that a token meets. The head is no part of ``decoder``, nor of keep rates.
    """

    projections: Tensor  # float64 (l b): the attention's products with weights
    attention: Tensor  # float64 (l b): its products of queries, keys and values
    mlp: Tensor  # float64 (l b): everything else in the layer
    head: Tensor  # float64 (b): the language-model head, at the positions whose logits were computed

    @property
    def decoder(self) -> Tensor:
        """float64 (b): the layers' FLOPs, all parts together."""
        return (self.projections + self.attention + self.mlp).sum(0)


@dataclass(frozen=True)
class CostModel:
    """FLOPs of each layer of one backbone, by part p (projections, attention, MLP).

    ``token[p, l] * tokens + pair[p, l] * query-key pairs``. A token that skips the unit is spared ``spared[p, l]`` of
    the former, and its queries: its keys as well, unless they are ``kept``; nothing of the attention where the unit is
    the MLP.
    """

    token: Tensor  # float64 (p l)
    pair: Tensor  # float64 (p l)
    spared: Tensor  # float64 (p l)
    head: float = 0.0  # a position's
    unit: Unit = "block"
    kept: bool = False

    @classmethod
    def of(cls, spec: BackboneSpec, unit: Unit = "block", kv: KV = "absent") -> CostModel:
        """From what the backbone's layers were seen to compute."""
        rates = []
        for index, work in enumerate(spec.work):
            leaving = list(work.token)
            if unit != "block":
                parts = spec.sublayers[index]
                leaving = [parts.attention] if unit == "attention" else list(parts.mlp)
            stored = work.stored if kv == "kept" else {}
            spared = {part: work.token.get(part, 0.0) - stored.get(part, 0.0) for part in leaving}
            rates.append([_by_part(work, work.token), [0.0, work.pair, 0.0], _by_part(work, spared)])
        token, pair, spared_of = torch.tensor(rates, dtype=torch.float64).permute(1, 2, 0)
        return cls(token, pair, spared_of, spec.head, unit, kv == "kept")

    def chunk(self, new: Tensor, past: Tensor) -> Tensor:
        """float64 (p l b): ``new`` tokens (b) that attend to ``past`` ones (b) and to one another."""
        new, past = new.double().cpu(), past.double().cpu()
        return self.token[..., None] * new + self.pair[..., None] * new * (past + new)

    def skipped(self, ran: Tensor, new: Tensor, past_ran: Tensor, past: Tensor) -> Tensor:
        """float64 (p l b): as `chunk`, where only ``ran`` of the new tokens and ``past_ran`` of the past ones ran."""
        ran, new, past_ran, past = (tokens.double().cpu() for tokens in (ran, new, past_ran, past))
        queries, keys = (new, past + new) if self.unit == "mlp" else (ran, past_ran + ran)
        if self.kept:
            keys = past + new
        tokens = self.token[..., None] * new - self.spared[..., None] * (new - ran)
        return tokens + self.pair[..., None] * queries * keys


def _by_part(work: Work, flops: dict[nn.Module, float]) -> list[float]:
    projections = sum(spent for part, spent in flops.items() if part is work.attention)
    return [projections, 0.0, sum(flops.values()) - projections]


@dataclass(frozen=True)
class Slots:
    """What one layer of a cache holds, without the keys and values themselves."""

    batch: int
    rows: Tensor | None  # long (r): the rows that have slots; None: all
    index: Tensor | None  # long (r k): the place of each slot, -1 for a hole; None: no holes
    count: int  # slots a row
    size: int  # bytes of a slot

    def nbytes(self) -> Tensor:
        """long (b): bytes of each row's keys and values, holes left out; padding that was computed counts."""
        held = torch.full((self.batch,), self.count) if self.index is None else (self.index >= 0).sum(1).cpu()
        if self.rows is not None:
            rows = self.rows.cpu()
            held = torch.zeros(self.batch, dtype=torch.long).index_copy(0, rows, held[: len(rows)])
        return held * self.size


@dataclass
class Ledger:
    """The tokens that one request holds, chunk by chunk as they came; priced only when asked.

    What a rollback took back, as assisted generation does with refused candidates, is no part of it.
    """

    routes_answers: bool  # whether decisions speak of generated tokens
    chunks: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # bool (b t) each: who always runs, who is routed
    decoded: int = 0  # single generated tokens after the last chunk
    heads: int = 0  # positions of each row whose logits were computed
    held: tuple[Slots, ...] | None = None  # what each layer of the cache holds; None without a cache

    def add(self, valid: Tensor, routed: Tensor | None, answering: bool) -> None:
        """Record a chunk: its real tokens (b t), those that decisions speak of (None: all), whether it is generated.

        A single generated token costs nothing to record.
        """
        if answering and valid.shape[1] == 1 and self.chunks:
            self.decoded += 1
            return
        self.chunks.extend(self._singles())
        self.decoded = 0
        routed = valid if routed is None else valid & routed
        self.chunks.append((valid & ~routed, routed))

    def crop(self, count: int) -> None:
        """Forget the last ``count`` positions."""
        self.heads = max(self.heads - count, 0)
        singles = min(count, self.decoded)
        self.decoded, count = self.decoded - singles, count - singles
        while count:
            always, routed = self.chunks.pop()
            left = always.shape[1] - count
            if left > 0 or not self.chunks:
                self.chunks.append((always[:, : max(left, 0)], routed[:, : max(left, 0)]))
                return
            count = -left

    def _singles(self) -> list[tuple[Tensor, Tensor]]:
        if not self.decoded:
            return []
        first, _ = self.chunks[0]
        yes, no = first.new_ones(len(first), 1), first.new_zeros(len(first), 1)
        return [(no, yes) if self.routes_answers else (yes, no)] * self.decoded

    def select(self, rows: Tensor) -> None:
        """Follow a reordering of the batch."""
        self.chunks = [(always[rows], routed[rows]) for always, routed in self.chunks]

    def kv_bytes(self) -> Tensor | None:
        """long (b): bytes of the keys and values that each row holds in the cache; None without a cache."""
        return None if self.held is None else torch.stack([slots.nbytes() for slots in self.held]).sum(0)

    def spent(self, cost: CostModel, routing: Routing | None = None) -> Flops:
        """What the request cost under its routing, or (None) had every layer run."""
        by_token = routing is not None and routing.tokens is not None
        run, left = self._priced(cost, routing.keep if routing is not None and by_token else None)
        parts = left if by_token else run
        if routing is not None and not by_token:
            parts = torch.where(routing.keep.to(run.device), run, left)
        head = torch.full(run.shape[2:], cost.head * self.heads, dtype=torch.float64)
        return Flops(parts[0], parts[1], parts[2], head)

    def flops(self, cost: CostModel) -> tuple[Tensor, Tensor]:
        """float64 (l b) each: every row's cost of running a layer, and of leaving its group out of it."""
        run, left = self._priced(cost)
        return run.sum(0), left.sum(0)

    def _priced(self, cost: CostModel, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float64 (p l b) each: as `flops`, by part.

        Or of leaving only those tokens of its group out of it that ``keep``, bool (l b t), does not name.
        """
        if not self.chunks:
            raise ValueError("an empty ledger has no price")
        place, past, past_ran = 0, *[torch.zeros(len(self.chunks[0][0]), dtype=torch.long)] * 2
        run = torch.zeros(*cost.token.shape, len(past), dtype=torch.float64)
        left = torch.zeros_like(run)
        for always, routed in [*self.chunks, *self._singles()]:
            both, ran = (always | routed).sum(1).cpu(), always.sum(1).cpu()
            if keep is not None:
                ran = ran + (keep[..., place : place + routed.shape[1]] & routed).sum(-1).cpu()
            run += cost.chunk(both, past)
            left += cost.skipped(ran, both, past_ran, past)
            place, past, past_ran = place + always.shape[1], past + both, past_ran + ran
        return run, left
