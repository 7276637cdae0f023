import math
import os

import pytest
import torch
import torch.multiprocessing as mp

from adaskip.errors import DataError
from adaskip.theory import measures
from adaskip.theory.bounds import kl_exact
from adaskip.theory.metrics import (
    AttentionMass,
    FunctionalCost,
    GeometricRedundancy,
    ProximalTail,
    QuantisedEntropy,
    RelativeChange,
    StateSimilarity,
    UsableInformationLost,
    ValueWeightedMass,
)


def data(n=64, t=5, d=4, dtype=torch.float32):
    """States around a layer with a mask; the last row's is empty, and NaN stands outside it."""
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(n, t, d, generator=draw)
    after = (before + 0.5 * torch.randn(n, t, d, generator=draw)).to(dtype)
    mask = torch.rand(n, t, generator=draw) > 0.3
    mask[-1] = False
    return before.to(dtype).masked_fill(~mask.unsqueeze(-1), math.nan), after, mask


def updates(n=64):
    """Metric maker -> its arguments for all inputs."""
    before, after, mask = data(n)
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(n, 2, 3, 5, generator=draw).softmax(-1)
    values, queries = torch.randn(n, 2, 5, 4, generator=draw), torch.rand(n, 3, generator=draw) > 0.3
    labels = torch.randint(2, (n,), generator=draw)
    answers = torch.full((n, 5), -100).index_put((torch.arange(n), torch.arange(n) % 4 + 1), torch.tensor(1))
    logits = torch.randn(2, n, 5, 7, generator=draw)
    pooled = torch.randn(2, n, 4, generator=draw) + labels[:, None]
    return [
        (GeometricRedundancy, (before, after, mask)),
        (RelativeChange, (before, after, mask)),
        (ProximalTail, (before, after, mask)),
        (lambda: StateSimilarity(4), (before, after, mask)),
        (AttentionMass, (weights, queries, mask)),
        (ValueWeightedMass, (weights, values, queries, mask)),
        (FunctionalCost, (*logits, answers[:, 1:] != -100)),
        (UsableInformationLost, (*pooled, labels)),
        (lambda: QuantisedEntropy(2), (after, after + 1.0)),
    ]


def flat(result):
    if isinstance(result, torch.Tensor | float):
        return [float(x) for x in torch.as_tensor(result).flatten()]
    if isinstance(result, tuple):
        return [x for part in result for x in flat(part)]
    return [float(x) for x in result.values()]


@pytest.mark.parametrize("case", range(len(updates())))
def test_split_and_merged_is_one_pass(case):
    make, arguments = updates()[case]
    whole, first, second = make(), make(), make()
    whole.update(*arguments)
    first.update(*(a[:20] for a in arguments))
    second.update(*(a[20:50] for a in arguments))
    second.update(*(a[50:] for a in arguments))
    first.merge_state(second)
    assert flat(first.compute()) == pytest.approx(flat(whole.compute()), rel=1e-9)


def test_values_are_those_of_the_pure_functions():
    before, after, mask = data()
    cosine = measures.cosine_distance(before, after, mask)[:-1].double()
    metric = GeometricRedundancy()
    metric.update(before, after, mask)
    assert metric.compute().item() == pytest.approx(cosine.mean().item(), rel=1e-12)
    assert (metric.count, metric.left_out) == (63, 1)
    tail = ProximalTail([0.05, 0.1, 0.2])
    tail.update(before, after, mask)
    deltas, share = tail.compute()
    assert share.tolist() == pytest.approx([(cosine > delta).double().mean().item() for delta in deltas])
    assert 0 < share[2] < share[0]
    _, (dense, skipped, supervised) = updates()[6]
    cost = FunctionalCost()
    cost.update(dense, skipped, supervised)
    rows, places = supervised.nonzero().T
    expected = kl_exact(dense[rows, places], skipped[rows, places]).mean().item()
    assert cost.compute().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_more(dtype):
    before, after, mask = data(dtype=dtype)
    for make in (GeometricRedundancy, RelativeChange):
        half, full = make(), make()
        half.update(before, after, mask)
        full.update(before.double(), after.double(), mask)
        assert half.compute().item() == pytest.approx(full.compute().item(), rel=1e-5)


def test_nothing_to_average_is_an_error():
    before, after, mask = data()
    metric = GeometricRedundancy()
    metric.update(before, after, torch.zeros_like(mask))
    with pytest.raises(DataError, match=r"GeometricRedundancy: no input to average over \(64 with an empty mask"):
        metric.compute()
    with pytest.raises(DataError, match="ProximalTail: no input with a token of the group yet"):
        ProximalTail().compute()
    with pytest.raises(DataError, match="QuantisedEntropy: no input yet; call update first"):
        QuantisedEntropy(2).compute()
    with pytest.raises(DataError, match="expected at least 2 tokens, got 0"):
        StateSimilarity(4).compute()


def _rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = []
    for make, arguments in updates():
        metric = make()
        metric.update(*(a[32 * rank : 32 * rank + 32] for a in arguments))
        found.append(flat(metric.compute()))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_reduce_to_one_pass(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    for (make, arguments), *ranks in zip(updates(), *(torch.load(tmp_path / f"{r}.pt") for r in range(2)), strict=True):
        whole = make()
        whole.update(*arguments)
        for found in ranks:
            assert found == pytest.approx(flat(whole.compute()), rel=1e-9)
