"""Which records come together in a batch, and when: rows with pictures and rows without never in one, resumably."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.training.collate import Collator
from adaskip.training.messages import is_pictured
from adaskip.training.records import Record
from adaskip.training.token_counts import TokenCounts

WINDOW = 64
"""Batches whose rows are sorted by length together: rows far apart in the order may meet, and not all short ones do."""


class RoundSampler(Sampler[int]):
    """Choose the records of one round of steps, as a pure function of (seed, round, rank).

    A round is as many steps as lie between two checkpoints, so that a run resumed from a checkpoint reads exactly the
    batches it would have read. Every record is seen once before any is seen twice.

    Args:
        count: records there are.
        per_round: records this process reads in a round.
        seed: of the permutations.
    """

    def __init__(self, count: int, per_round: int, seed: int) -> None:
        self.count, self.per_round, self.seed, self.round = count, per_round, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to a round; called by Lightning before each."""
        self.round = epoch

    def __len__(self) -> int:
        return self.per_round

    def __iter__(self) -> Iterator[int]:
        ranks, rank = _processes()
        sweep, order = -1, torch.empty(0)
        for step in range(self.per_round):
            place = (self.round * self.per_round + step) * ranks + rank
            if place // self.count != sweep:
                sweep = place // self.count
                order = _permutation(self.count, self.seed, sweep)
            yield int(order[place % self.count])


class RoundBatches(Sampler[list[int]]):
    """Choose the batches of a round, each all with pictures or all without, as a function of (seed, round, rank).

    A sweep cuts the permuted rows of both sorts into batches of nearly equal size and shuffles these:

        sweep 0: [text 0..6] [picture 0..7] [picture 8..14] [text 7..13] | sweep 1: ...     (batch_size 8, one process)

    Every record comes once in a sweep. With several processes a batch is cut for all of them and each reads its share
    of the very same batch, so that all do as many steps, and the same sort of rows at each. (A sort with fewer rows
    left than there are processes repeats some.) A round is any number of consecutive batches; sweeps go on across it.

    Args:
        records: all there are.
        batch_size: rows of a batch and process, at most.
        steps: batches of a round; None: those of one sweep.
        seed: of the permutations.
        lengths: tokens of each record; batches then have rows of about the same length, which need less padding. Of
            every 64 batches the rows are cut in order of length instead of at random.

        DataLoader(records, batch_sampler=RoundBatches(records, 8), collate_fn=Collator(processor))

    In a Trainer of several processes pass ``use_distributed_sampler=False``: this one spreads the rows itself.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        batch_size: int,
        steps: int | None = None,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        if lengths is not None and len(lengths) != len(records):
            raise ConfigError(
                f"RoundBatches: lengths: expected one for each of {len(records)} records, got {len(lengths)}"
            )
        if batch_size < 1 or not len(records):
            raise ConfigError(
                f"RoundBatches: expected records and a batch_size of at least 1, got {len(records)} and {batch_size}"
            )
        self.sorts = [torch.tensor(rows) for rows in _sorts(records) if rows]
        self.batch_size, self.steps, self.seed, self.round = batch_size, steps, seed, 0
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.sampler = self  # Lightning calls set_epoch on the sampler of a batch sampler

    def set_epoch(self, epoch: int) -> None:
        """Go to a round; called by Lightning before each."""
        self.round = epoch

    def _per_sweep(self, ranks: int) -> int:
        return sum(-(-len(rows) // (self.batch_size * ranks)) for rows in self.sorts)

    def __len__(self) -> int:
        return self._per_sweep(_processes()[0]) if self.steps is None else self.steps

    def __iter__(self) -> Iterator[list[int]]:
        ranks, rank = _processes()
        count, sweep, batches = self._per_sweep(ranks), -1, []
        for step in range(len(self)):
            place = self.round * len(self) + step
            if place // count != sweep:
                sweep = place // count
                batches = self._sweep(sweep, ranks)
            whole = batches[place % count]
            # a batch with fewer rows than processes: some repeat a row, so that none is a step short
            yield whole[rank::ranks] or [whole[rank % len(whole)]]

    def _sweep(self, sweep: int, ranks: int) -> list[list[int]]:
        size = self.batch_size * ranks
        batches = []
        for sort, rows in enumerate(self.sorts):
            order = rows[_permutation(len(rows), self.seed + 7919 * sort, sweep)]
            parts = order.tensor_split(-(-len(rows) // size))
            batches += [part.tolist() for part in self._sorted(parts)]
        shuffled = _permutation(len(batches), self.seed + 104_729, sweep)
        return [batches[i] for i in shuffled.tolist()]

    def _sorted(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sort the rows of neighbouring batches by length; rows of the same length stay in their order."""
        if self.lengths is None:
            return [*parts]
        found: list[Tensor] = []
        for start in range(0, len(parts), WINDOW):
            window = parts[start : start + WINDOW]
            rows = torch.cat([*window])
            rows = rows[self.lengths[rows].argsort(stable=True)]
            found += rows.split([len(part) for part in window])
        return found


def loader(records: Sequence[Record], collate: Collator, batch_size: int, workers: int = 0) -> DataLoader[Any]:
    """Return batches of all records, in order; see `in_order` where only some of them have pictures.

    Raises:
        DataError: records that the collator's processor cannot take; lists them.
    """
    collate.check(records)
    order: dict[str, Any] = {"batch_size": batch_size}
    if all(_sorts(records)):
        order = {"batch_sampler": in_order(records, batch_size)}
    return DataLoader(records, **order, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]


class SharedBatches(Dataset[Batch]):
    """Make the batches of all records, in order; with several processes each reads its rows of the very same batches.

    Every row is counted by one process, also where the processes do not divide them. All have as many batches, because
    they wait for one another: one that has no row of a batch reads one that is not ``counted``.

    Args:
        records: all there are.
        collate: makes a batch of records.
        batch_size: rows of a batch and process, at most.

        DataLoader(SharedBatches(records, Collator(processor), 8), batch_size=None)

    In a Trainer of several processes pass ``use_distributed_sampler=False``: this one spreads the rows itself.
    """

    def __init__(self, records: Sequence[Record], collate: Collator, batch_size: int) -> None:
        self.records, self.collate, self.batch_size = records, collate, batch_size
        self._cuts: dict[int, list[list[int]]] = {}  # by the number of processes, which may start after this

    def _cut(self) -> list[list[int]]:
        ranks = _processes()[0]
        if ranks not in self._cuts:
            self._cuts[ranks] = in_order(self.records, self.batch_size * ranks)
        return self._cuts[ranks]

    def __len__(self) -> int:
        return len(self._cut())

    def __getitem__(self, number: int) -> Batch:
        ranks, rank = _processes()
        whole = self._cut()[number]  # which raises IndexError behind the last
        own = whole[rank::ranks]
        batch = self.collate([self.records[row] for row in own or whole[:1]])
        return replace(batch, counted=bool(own))


class NumberedBatches:
    """Make batches of records given by number, in that order; rows with pictures and rows without never in one.

    Args:
        records: all that may be asked for.
        collate: makes a batch of records.
        device: where batches are put.
        batch_size: records of a batch, at most.
    """

    def __init__(self, records: Sequence[Record], collate: Collator, device: torch.device, batch_size: int) -> None:
        self.records, self.collate, self.device, self.batch_size = records, collate, device, batch_size

    def __call__(self, rows: Sequence[int]) -> list[Batch]:
        """Collate these records."""
        chosen = [self.records[row] for row in rows]
        runs = [[*run] for _, run in groupby(chosen, key=is_pictured)]
        return [batch.to(self.device) for run in runs for batch in loader(run, self.collate, self.batch_size)]


def training_loader(
    records: Sequence[Record],
    collate: Collator,
    batch_size: int,
    per_round: int,
    seed: int,
    workers: int = 0,
    by_length: bool = False,
) -> DataLoader[Any]:
    """Return the batches of one round after the other, in an order that resumes; see `RoundSampler`, `RoundBatches`.

    Args:
        records: all there are.
        collate: makes a batch of records.
        batch_size: records of a batch and process.
        per_round: records that this process reads in a round; a multiple of ``batch_size``.
        seed: of the order.
        workers: processes that load data.
        by_length: batches have rows of about the same length.

    Raises:
        DataError: as `loader`.
    """
    collate.check(records)
    order: dict[str, Any] = {"batch_size": batch_size, "sampler": RoundSampler(len(records), per_round, seed)}
    if by_length or all(_sorts(records)):
        counts = TokenCounts(collate)(collate.rendered(records)) if by_length else None
        lengths = None if counts is None else [prompt + rest for prompt, rest in counts]
        order = {"batch_sampler": RoundBatches(records, batch_size, -(-per_round // batch_size), seed, lengths)}
    return DataLoader(records, **order, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]


def padding_share(
    records: Sequence[Record], lengths: Sequence[int], batch_size: int, seed: int, by_length: bool
) -> float:
    """Return which share of the tokens of one sweep's training batches is padding.

    >>> padding_share([{}, {}, {}, {}], [2, 4, 2, 4], 2, seed=0, by_length=True)
    0.0
    """
    read = whole = 0
    for rows in RoundBatches(records, batch_size, seed=seed, lengths=lengths if by_length else None):
        tokens = [lengths[row] for row in rows]
        read += sum(tokens)
        whole += len(rows) * max(tokens)
    return 1 - read / whole if whole else 0.0


def in_order(records: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
    """Cut records into batches of their numbers, each of rows with pictures or of rows without.

    Records of one sort keep their order. Where there are both, every quarter of the batches gets a quarter of each
    sort, in order: `judge_joint` fits a constant on the first half of the inputs and judges it on the second, and must
    find both sorts in each half.
    """
    sorts = [rows for rows in _sorts(records) if rows]
    if len(sorts) < 2:
        return [[*range(i, min(i + batch_size, len(records)))] for i in range(0, len(records), batch_size)]
    batches = []
    for quarter in range(4):
        for rows in sorts:
            part = rows[quarter * len(rows) // 4 : (quarter + 1) * len(rows) // 4]
            batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return batches


def _sorts(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Return the numbers of the records with pictures, and of those without."""
    pictured = [is_pictured(record) for record in records]
    return [i for i, has in enumerate(pictured) if has], [i for i, has in enumerate(pictured) if not has]


def _permutation(count: int, seed: int, sweep: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + sweep))


def _processes() -> tuple[int, int]:
    """Return how many processes train together, and the rank of this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
