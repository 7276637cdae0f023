"""What a request costs: decoder FLOPs, counted from the weights and the tokens that really met them.

One multiply-add is two FLOPs. Norms, activations, rotary embeddings, the language-model head, the vision tower and the
routers themselves are not decoder-layer work and are left out, of the dense figure as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.backbone import Backbone
from adaskip.plan import KV, Group, Unit


@dataclass(frozen=True)
class CostModel:
    """FLOPs of each layer of one backbone: ``linear[l] * tokens + attention[l] * query-key pairs``.

    A token that skips the unit is spared ``spared[l]`` of the former, and its queries: its keys as well, unless they
    are ``kept``; nothing of the attention where the unit is the MLP.
    """

    linear: Tensor  # float64 (l)
    attention: Tensor  # float64 (l)
    spared: Tensor  # float64 (l)
    unit: Unit = "block"
    kept: bool = False

    @classmethod
    def of(cls, backbone: Backbone, unit: Unit = "block", kv: KV = "absent") -> CostModel:
        """Read the shapes off the backbone's layers; a mixture of experts counts the experts a token really uses."""
        config = backbone.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        share = _expert_share(config)
        linear = [2.0 * _matrix_weights(layer, share) for layer in backbone.layers]
        pairs = [4.0 * heads * head_dim] * len(backbone.layers)
        spared = list(linear)
        for index, parts in enumerate(backbone.sublayers):
            modules = {"block": (backbone.layers[index],), "attention": (parts.attention,), "mlp": parts.mlp}[unit]
            spared[index] = 2.0 * sum(_matrix_weights(module, share) for module in modules)
            spared[index] -= 2.0 * parts.projected * (kv == "kept")
        table = torch.tensor([linear, pairs, spared], dtype=torch.float64)
        return cls(table[0], table[1], table[2], unit, kv == "kept")

    def chunk(self, new: Tensor, past: Tensor) -> Tensor:
        """float64 (l b): ``new`` tokens (b) that attend to ``past`` ones (b) and to one another."""
        new, past = new.double().cpu(), past.double().cpu()
        return self.linear[:, None] * new + self.attention[:, None] * new * (past + new)

    def skipped(self, ran: Tensor, new: Tensor, past_ran: Tensor, past: Tensor) -> Tensor:
        """float64 (l b): as `chunk`, where only ``ran`` of the new tokens and ``past_ran`` of the past ones ran."""
        ran, new, past_ran, past = (tokens.double().cpu() for tokens in (ran, new, past_ran, past))
        queries, keys = (new, past + new) if self.unit == "mlp" else (ran, past_ran + ran)
        if self.kept:
            keys = past + new
        linear = self.linear[:, None] * new - self.spared[:, None] * (new - ran)
        return linear + self.attention[:, None] * queries * keys


def _matrix_weights(layer: nn.Module, expert_share: float) -> float:
    return sum(
        weight.numel() * (expert_share if ".experts." in f".{name}." else 1.0)
        for name, weight in layer.named_parameters()
        if weight.dim() >= 2
    )


def _expert_share(config: Any) -> float:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if count := getattr(config, key, None):
            return config.num_experts_per_tok / count
    return 1.0


@dataclass
class Ledger:
    """The tokens that one request holds, chunk by chunk as they came; priced only when asked.

    What a rollback took back, as assisted generation does with refused candidates, is no part of it.
    """

    group: Group
    chunks: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # which are text, and vision: bool (b t) each
    decoded: int = 0  # single text tokens after the last chunk

    def add(self, valid: Tensor, vision: Tensor | None) -> None:
        """Record a chunk of (b t) token masks; a chunk of one position costs nothing to record."""
        if valid.shape[1] == 1 and self.chunks:
            self.decoded += 1
            return
        self.chunks.extend(self._singles())
        self.decoded = 0
        seen = vision if vision is not None else torch.zeros_like(valid)
        self.chunks.append((valid & ~seen, valid & seen))

    def crop(self, count: int) -> None:
        """Forget the last ``count`` positions."""
        singles = min(count, self.decoded)
        self.decoded, count = self.decoded - singles, count - singles
        while count:
            text, vision = self.chunks.pop()
            left = text.shape[1] - count
            if left > 0 or not self.chunks:
                self.chunks.append((text[:, : max(left, 0)], vision[:, : max(left, 0)]))
                return
            count = -left

    def _singles(self) -> list[tuple[Tensor, Tensor]]:
        one = [(text.new_ones(len(text), 1), text.new_zeros(len(text), 1)) for text, _ in self.chunks[:1]]
        return one * self.decoded

    def select(self, rows: Tensor) -> None:
        """Follow a reordering of the batch."""
        self.chunks = [(text[rows], vision[rows]) for text, vision in self.chunks]

    def flops(self, cost: CostModel, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float64 (l b) each: every row's cost of running a layer, and of leaving its group out of it.

        Or of leaving only those tokens of its group out of it that ``keep``, bool (l b t), does not name.
        """
        if not self.chunks:
            raise ValueError("an empty ledger has no price")
        place, past, past_ran = 0, *[torch.zeros(len(self.chunks[0][0]), dtype=torch.long)] * 2
        run = torch.zeros(len(cost.linear), len(past), dtype=torch.float64)
        left = torch.zeros_like(run)
        for text, vision in [*self.chunks, *self._singles()]:
            both = (text | vision).sum(1).cpu()
            ran = text.sum(1).cpu() if self.group == "vision" else torch.zeros_like(both)
            if keep is not None:
                group = vision if self.group == "vision" else text | vision
                ran = ran + (keep[..., place : place + group.shape[1]] & group).sum(-1).cpu()
            run += cost.chunk(both, past)
            left += cost.skipped(ran, both, past_ran, past)
            place, past, past_ran = place + text.shape[1], past + both, past_ran + ran
        return run, left
