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
from adaskip.plan import KV, Routing
from adaskip.sites import PARTS, Part, Unit


@dataclass(frozen=True)
class Flops:
    """Hold the FLOPs of one request, by what they were spent on.

    A mixture of experts counts the experts that a token meets. The head is no part of ``decoder``, nor of keep rates.
    """

    projections: Tensor  # float64 (s b): the attention's products with weights, at each site
    attention: Tensor  # float64 (s b): its products of queries, keys and values
    mlp: Tensor  # float64 (s b): everything else in the layer
    head: Tensor  # float64 (b): the language-model head, at the positions whose logits were computed

    @property
    def decoder(self) -> Tensor:
        """Return the layers' FLOPs, all parts together: float64 (b)."""
        return (self.projections + self.attention + self.mlp).sum(0)


@dataclass(frozen=True)
class CostModel:
    """Price tokens at each site of one backbone, by part p (projections, attention, MLP).

    ``token[p, s] * tokens + pair[p, s] * query-key pairs``; the sites of a layer add up to the layer. A token that
    skips the site is spared ``spared[p, s]`` of the first term. Of the second it is spared its queries, and its keys
    unless they are ``kept``; or nothing, where the site is an MLP.
    """

    token: Tensor  # float64 (p s)
    pair: Tensor  # float64 (p s)
    spared: Tensor  # float64 (p s)
    leaves: Tensor  # bool (s): whether what skips the site leaves an attention
    head: float = 0.0  # a position's
    kept: bool = False
    whole: bool = True  # whether what skips every site of a layer runs nothing of it
    added: Tensor | None = None  # float64 (s): what adapters compute for a token in routed passes

    @classmethod
    def of(cls, spec: BackboneSpec, unit: Unit = "block", kv: KV = "absent") -> CostModel:
        """Read the prices from what the backbone's layers were seen to compute."""
        first, *others = PARTS[unit]
        rates = []
        for index, work in enumerate(spec.work):
            leaving = {part: _leaving(spec, index, part) for part in PARTS[unit]}
            # the first site of a layer has all that leaves with no other
            own = {part: leaving[part] for part in others}
            own[first] = [module for module in work.token if all(module not in leaving[part] for part in others)]
            for part in PARTS[unit]:
                stored = work.stored if kv == "kept" else {}
                spared = {module: work.token.get(module, 0.0) - stored.get(module, 0.0) for module in leaving[part]}
                token = {module: work.token.get(module, 0.0) for module in own[part]}
                pair = work.pair if part == first else 0.0
                rates.append([_by_part(work, token), [0.0, pair, 0.0], _by_part(work, spared)])
        tokens, pairs, spared_of = torch.tensor(rates, dtype=torch.float64).permute(1, 2, 0)
        leaves = torch.tensor([part != "mlp" for part in PARTS[unit]]).repeat(len(spec.work))
        return cls(tokens, pairs, spared_of, leaves, spec.head, kv == "kept", first == "block" or bool(others))

    def chunk(self, new: Tensor, past: Tensor) -> Tensor:
        """Price ``new`` tokens (b) that attend to ``past`` ones (b) and to one another: float64 (p s b)."""
        new, past = new.double().cpu(), past.double().cpu()
        return self.token[..., None] * new + self.pair[..., None] * new * (past + new)

    def skipped(self, ran: Tensor, new: Tensor, past_ran: Tensor, past: Tensor) -> Tensor:
        """Price as `chunk` does, where only ``ran`` of the new tokens and ``past_ran`` of the past ones ran."""
        ran, new, past_ran, past = (tokens.double().cpu() for tokens in (ran, new, past_ran, past))
        # a token that leaves the MLP alone still attends and is attended to
        leaves = self.leaves[:, None].expand(-1, new.shape[-1])
        queries, keys = torch.where(leaves, ran, new), torch.where(leaves, past_ran + ran, past + new)
        if self.kept:
            keys = past + new
        tokens = self.token[..., None] * new - self.spared[..., None] * (new - ran)
        return tokens + self.pair[..., None] * queries * keys


def _leaving(spec: BackboneSpec, index: int, part: Part) -> list[nn.Module]:
    """Return the modules of a layer that leave with a part of it."""
    return list(spec.work[index].token) if part == "block" else list(spec.sublayers[index].modules(part))


def _by_part(work: Work, flops: dict[nn.Module, float]) -> list[float]:
    """Return a token's FLOPs as projections, attention and MLP; the attention's own go by pairs, so 0 here."""
    projections = sum(spent for part, spent in flops.items() if part is work.attention)
    return [projections, 0.0, sum(flops.values()) - projections]


@dataclass(frozen=True)
class Slots:
    """Describe what one layer of a cache holds, without the keys and values themselves."""

    batch: int
    rows: Tensor | None  # long (r): the rows that have slots; None: all
    index: Tensor | None  # long (r k): the place of each slot, -1 for a hole; None: no holes
    count: int  # slots a row
    size: int  # bytes of a slot

    def nbytes(self) -> Tensor:
        """Return the bytes of each row's keys and values, long (b): without holes; padding that was computed counts."""
        counts = torch.full((self.batch,), self.count) if self.index is None else (self.index >= 0).sum(1).cpu()
        if self.rows is not None:
            rows = self.rows.cpu()
            counts = torch.zeros(self.batch, dtype=torch.long).index_copy(0, rows, counts[: len(rows)])
        return counts * self.size


@dataclass
class Ledger:
    """Count the tokens that one request holds, chunk by chunk as they came; they are priced only when asked.

    What a rollback took back, as assisted generation does with refused candidates, is no part of it.
    """

    routes_answers: bool  # whether decisions speak of generated tokens
    chunks: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # bool (b t) each: who always runs, who is routed
    lost: dict[int, Tensor] = field(default_factory=dict)  # bool (b t) by chunk: whose keys went when it had been read
    decoded: int = 0  # single generated tokens after the last chunk
    heads: int = 0  # positions of each row whose logits were computed
    slots: tuple[Slots, ...] | None = None  # what each layer of the cache holds; None without a cache

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

    def forget(self, lost: Tensor) -> None:
        """Record that these tokens (b t) of the chunk that was read last have no keys from here on."""
        self.lost[len(self.chunks) - 1] = lost

    def crop(self, count: int) -> None:
        """Forget the last ``count`` positions."""
        self.heads = max(self.heads - count, 0)
        self._crop_chunks(count)
        widths = [always.shape[1] for always, _ in self.chunks]
        self.lost = {chunk: lost[:, : widths[chunk]] for chunk, lost in self.lost.items() if chunk < len(widths)}

    def _crop_chunks(self, count: int) -> None:
        singles = min(count, self.decoded)
        self.decoded, count = self.decoded - singles, count - singles
        while count:
            always, routed = self.chunks.pop()
            rest = always.shape[1] - count
            if rest > 0 or not self.chunks:  # the first chunk stays, if empty: it tells the number of rows
                self.chunks.append((always[:, : max(rest, 0)], routed[:, : max(rest, 0)]))
                return
            count = -rest

    def _singles(self) -> list[tuple[Tensor, Tensor]]:
        """Return the single generated tokens as the chunks that they would have been."""
        if not self.decoded:
            return []
        first, _ = self.chunks[0]
        yes, no = first.new_ones(len(first), 1), first.new_zeros(len(first), 1)
        return [(no, yes) if self.routes_answers else (yes, no)] * self.decoded

    def select(self, rows: Tensor) -> None:
        """Follow a reordering of the batch."""
        self.chunks = [(always[rows], routed[rows]) for always, routed in self.chunks]
        self.lost = {chunk: lost[rows] for chunk, lost in self.lost.items()}

    def kv_bytes(self) -> Tensor | None:
        """Return the bytes of keys and values that each row has in the cache, long (b); None without a cache."""
        return None if self.slots is None else torch.stack([slots.nbytes() for slots in self.slots]).sum(0)

    def spent(self, cost: CostModel, routing: Routing | None = None) -> Flops:
        """Return what the request cost under its routing, or (None) what it had cost with every layer run."""
        by_token = routing is not None and routing.tokens is not None
        run, skip = self._price(cost, routing.keep if routing is not None and by_token else None)
        parts = skip if by_token else run
        if routing is not None and not by_token:
            parts = torch.where(routing.keep.to(run.device), run, skip)
        if routing is not None and cost.added is not None:
            parts[0] += cost.added[:, None] * self._count_ran(routing, cost.whole)
        head = torch.full(run.shape[2:], cost.head * self.heads, dtype=torch.float64)
        return Flops(parts[0], parts[1], parts[2], head)

    def _count_ran(self, routing: Routing, whole: bool) -> Tensor:
        """Count each row's tokens that ran anything at a site, float64 (s b); ``whole``: what skips runs nothing."""
        place, counts = 0, torch.zeros(routing.keep.shape[0], len(self.chunks[0][0]), dtype=torch.float64)
        for always, routed in [*self.chunks, *self._singles()]:
            every, least = (always | routed).sum(1).cpu(), always.sum(1).cpu()
            if not whole:
                counts += every
            elif routing.tokens is not None:
                here = routing.keep[..., place : place + routed.shape[1]] & routed
                counts += least + here.sum(-1).cpu()
            else:
                counts += torch.where(routing.keep.cpu(), every, least)
            place += always.shape[1]
        return counts

    def flops(self, cost: CostModel) -> tuple[Tensor, Tensor]:
        """Return each row's cost of running a site, and of leaving its group out of it: float64 (s b) each.

        Those of the model alone: what adapters compute is no part of them.
        """
        run, skip = self._price(cost)
        return run.sum(0), skip.sum(0)

    def _price(self, cost: CostModel, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the costs of `flops` by part, float64 (p s b) each.

        Args:
            cost: the prices.
            keep: bool (s b t), the tokens of the group that run the site all the same.
        """
        if not self.chunks:
            raise ValueError("an empty ledger has no price")
        place, past, past_ran = 0, *[torch.zeros(len(self.chunks[0][0]), dtype=torch.long)] * 2
        run = torch.zeros(*cost.token.shape, len(past), dtype=torch.float64)
        skip = torch.zeros_like(run)
        for chunk, (always, routed) in enumerate([*self.chunks, *self._singles()]):
            both, ran = (always | routed).sum(1).cpu(), always.sum(1).cpu()
            gone = torch.zeros_like(both)
            if keep is not None:
                here = keep[..., place : place + routed.shape[1]] & routed
                ran = ran + here.sum(-1).cpu()
                gone = (here & self.lost[chunk]).sum(-1).cpu() if chunk in self.lost else gone
            run += cost.chunk(both, past)
            skip += cost.skipped(ran, both, past_ran, past)
            place, past, past_ran = place + always.shape[1], past + both, past_ran + ran - gone
        return run, skip
