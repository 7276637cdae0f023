"""What of a batch that several processes read together is this process's: its weight in the loss, its draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.noise import Noise, Place


@dataclass(frozen=True)
class Share:
    """Hold how large a share of the rows of all processes a batch is; row i of rank r is row ``i * ranks + r`` of all.

    Processes average their gradients. One that has more rows than another would count each of them less, and what is
    no mean of rows, such as the square of the budget's gap, would be another loss for every number of processes.
    """

    tuner: lightning.LightningModule
    weight: float  # times the mean over own rows: averaged over processes, the mean over all rows
    place: Place

    def noise(self, source: torch.Generator) -> Noise:
        """Return what draws for these rows as one process would that reads all of them."""
        return Noise(source, self.place)

    def whole(self, means: Sequence[Tensor]) -> list[Tensor]:
        """Turn means over own rows, scalars, into those over all rows.

        A loss made of them is the same on every process, and its gradients, averaged over processes, are those of one
        process that reads all rows.
        """
        weighted = torch.stack([self.weight * mean.detach().float() for mean in means])
        summed = self.tuner.trainer.strategy.reduce(weighted, reduce_op="mean")
        return [
            known.to(mean.dtype) + self.weight * (mean - mean.detach())
            for known, mean in zip(summed, means, strict=True)
        ]


def share_out(tuner: lightning.LightningModule, batch: Batch) -> Share | None:
    """Tell every process how many rows and tokens the others have; None: this process reads all there are.

    Columns are lined up where prompts end, which is where `adaskip.Collator` has answers begin.
    """
    ranks, rank = tuner.trainer.world_size, tuner.global_rank
    if ranks == 1:
        return None
    prompts = batch.prompt_mask.any(0).nonzero()
    end = int(prompts.max()) + 1 if len(prompts) else 0
    own = torch.tensor([len(batch), end, batch.labels.shape[1] - end], device=tuner.device)
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(gathered, own)
    rows, ends, rests = torch.stack(gathered).T.tolist()
    placed = tuple(range(rank, len(batch) * ranks, ranks))
    of = max(sum(rows), *((count - 1) * ranks + other + 1 for other, count in enumerate(rows)))
    place = Place(placed, of, max(ends) + max(rests), max(ends) - end)
    return Share(tuner, len(batch) * ranks / sum(rows), place)
