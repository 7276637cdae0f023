"""Answer many prompts at once: route each at prefill, then decode those that took the same path together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaskip.errors import ConfigError, DataError
from adaskip.generate.consolidate import PathCosts, consolidate
from adaskip.generate.decoding import Decoding, read_options
from adaskip.generate.items import TOKENS, padding, read_items, split
from adaskip.generate.join import Part, join
from adaskip.generate.resume import fill_cache, try_resuming
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.timing import clock

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel

LayerPath = tuple[bool, ...]
"""For each layer, whether it runs."""


@dataclass(frozen=True)
class Answer:
    """Hold what one prompt got."""

    tokens: Tensor  # long (n): the generated ones, up to and with the first end of sequence
    path: LayerPath  # the layers that its group ran
    asked: LayerPath  # the layers that its routers asked for: `path` itself, unless paths were consolidated
    executed: float  # decoder FLOPs spent on prompt and answer, a prefill that was done anew included
    wanted: float  # decoder FLOPs of the same tokens along the path asked for
    dense: float  # decoder FLOPs of the same tokens with every layer run
    kv_bytes: int  # of its keys and values in the cache when its group was done, filling up to the group's length too

    @property
    def keep_rate(self) -> float:
        """Return executed over dense decoder FLOPs."""
        return self.executed / self.dense


@dataclass(frozen=True)
class Answers:
    """Hold the answers of `generate_many` in the order of the prompts, and what they took."""

    answers: tuple[Answer, ...]
    groups: tuple[tuple[LayerPath, int], ...]  # what was decoded together: the path, and how many prompts
    prefill_s: float
    decode_s: float
    changed: float | None = None  # share of the answers that consolidation changed, where it was measured

    @property
    def keep_rate(self) -> float:
        """Return executed over dense decoder FLOPs of all prompts together; 1 for no prompts."""
        return self._share("executed", "dense", 1.0)

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of all prompts' keys and values, as each group's cache had them when it was done."""
        return sum(answer.kv_bytes for answer in self.answers)

    @property
    def added(self) -> float:
        """Return the FLOPs that consolidation added, as a share of what the paths asked for cost."""
        return self._share("executed", "wanted", 1.0) - 1

    def _share(self, part: str, whole: str, empty: float) -> float:
        """Return one sum of FLOPs over another, and ``empty`` without answers."""
        total = sum(getattr(answer, whole) for answer in self.answers)
        return sum(getattr(answer, part) for answer in self.answers) / total if total else empty


@dataclass(frozen=True)
class _Prompts:
    """Hold some prompts that were prefilled together; their cache has all but the last token of each."""

    inputs: dict[str, Any]
    positions: Tensor | None  # long (... b t)
    cache: SkipCache
    keep: Tensor  # bool (l b)
    spent: Tensor  # float64 (b): decoder FLOPs

    @property
    def padding(self) -> Tensor:
        """Return the number of leading positions that are padding, long (b)."""
        return padding(self.inputs)


@dataclass(frozen=True)
class _Row:
    """Name one prompt: where it was prefilled, what its routers asked for, and what an earlier prefill of it cost."""

    prompts: _Prompts
    row: int
    requested: Tensor  # bool (l)
    discarded: float = 0.0

    @property
    def path(self) -> LayerPath:
        """Return the layers that the prompt ran."""
        return tuple(self.prompts.keep[:, self.row].tolist())

    @property
    def length(self) -> int:
        """Return the number of the prompt's tokens that the cache holds: all but the last."""
        return self.prompts.cache.length - int(self.prompts.padding[self.row])


@torch.no_grad()
def generate_many(
    model: RoutedModel,
    prompts: Iterable[Mapping[str, Any]],
    *,
    group_size: int = 64,
    paths: int | None = None,
    measure: bool = False,
    **options: Any,
) -> Answers:
    """Answer many prompts: route each at prefill, then decode those that took the same path together.

    While decoding, a layer costs about the same for one row as for eight, so rows with different paths in one batch
    save little time. Here each group follows one path, a static subnetwork: nothing is gathered, no mask is cut,
    and a layer that the group skips is not entered. The prompt is read once: routing happens in its prefill, layer
    by layer, and the caches' rows are then moved to their group's cache; only each prompt's last token is run again,
    to begin the answer. Greedy answers are those of `generate`, prompt by prompt.

    With group ``vision`` a path is the set of layers in which the picture's tokens ran. Text runs everywhere, so
    grouping saves no layer there; a group's rows have their keys in the same layers, which spares cutting masks.

    Args:
        model: the routed model.
        prompts: the model's inputs, item by item, as the processor returned them; each item holds one prompt or a
            batch of them, which is prefilled as it is. Padding may be on either side.
        group_size: at most so many prompts are decoded together.
        paths: consolidate to at most so many paths, each a superset of what its prompts asked for (`consolidate`);
            a prompt whose path grows is prefilled anew, which its FLOPs include. Items with pictures then hold one
            prompt each.
        measure: also decode along the paths asked for, to tell which share of the answers consolidation changed.
        **options: of ``generate``, such as ``max_new_tokens``. With those that read or count whole rows, such as
            ``max_length`` or ``repetition_penalty``, only prompts of one length are decoded together.

    Raises:
        ConfigError: an option that asks for more than one row a prompt, for a cache of its own, or for code of yours
            that would be told a group's rows.
        DataError: an item that is no model input, a prompt that ends with a vision token or fills ``max_length``.
        BackboneError: the model keeps no cache, or does not go on from one as it should.
    """
    _check(model, group_size)
    decoding = read_options(model.backbone, options)
    items = read_items(prompts)
    for number, item in enumerate(items):
        for leading in padding(item).tolist():
            decoding.check_room(number, item["input_ids"].shape[1] - leading)
    if items and not try_resuming(model):
        decoding = replace(decoding, whole=True)
    if paths is not None:
        items = [*split(items)]

    begin = clock()
    rows = [
        _Row(batch, row, batch.keep[:, row])
        for batch in (_prefill(model, item) for item in items)
        for row in range(batch.cache.batch)
    ]
    first: dict[int, _Row] = {}  # rows that are prefilled anew, as they were before
    if paths is not None and rows:
        for number, path in enumerate(_snap(model, rows, paths, decoding).T):
            if not torch.equal(path, rows[number].requested):
                row = first[number] = rows[number]
                fresh = _prefill(model, row.prompts.inputs, path[:, None])
                rows[number] = _Row(fresh, 0, row.requested, float(row.prompts.spent[0]))
    middle = clock()
    groups = _groups(dict(enumerate(rows)), group_size, decoding.whole)
    answers: dict[int, Answer] = {}
    for group in groups:
        answers |= _decode(model, {number: rows[number] for number in group}, decoding)
    end = clock()

    changed = None
    if measure and paths is not None:
        changed = 0.0
        for group in _groups(first, group_size, decoding.whole):
            for number, answer in _decode(model, {number: first[number] for number in group}, decoding).items():
                changed += (not torch.equal(answer.tokens, answers[number].tokens)) / len(rows)
    return Answers(
        answers=tuple(answers[number] for number in range(len(rows))),
        groups=tuple((rows[group[0]].path, len(group)) for group in groups),
        prefill_s=middle - begin,
        decode_s=end - middle,
        changed=changed,
    )


def _check(model: RoutedModel, group_size: int) -> None:
    """Refuse a model whose prompts have no path of their own, and groups without prompts."""
    model._check_attached()
    if model.runtime.mode == "dense":
        raise ConfigError("generate_many: inside dense() there is only one path; call generate")
    if model.runtime.scope == "token":
        raise ConfigError("generate_many: under scope 'token' a prompt has no path of its own; call generate")
    if group_size < 1:
        raise ConfigError(f"generate_many: group_size: expected at least 1 prompt, got {group_size}")


def _prefill(model: RoutedModel, inputs: dict[str, Any], keep: Tensor | None = None) -> _Prompts:
    """Read prompts as `generate` would, along ``keep`` or wherever the routers say, and stop before the first token."""
    vision = model.read_tokens(inputs).vision
    if vision is not None and vision[:, -1].any():
        raise DataError("generate_many: a prompt ends with a vision token; put text after the picture")
    cache, positions = fill_cache(model, inputs, keep)
    spent = model.routing.executed
    assert spent is not None
    assert cache.routing is not None
    return _Prompts(inputs, positions, cache, cache.routing.keep.cpu(), spent)


def _snap(model: RoutedModel, rows: list[_Row], at_most: int, decoding: Decoding) -> Tensor:
    """Choose at most so many paths, bool (l n), by what prompts and the longest answers allowed would cost."""
    prompt, answer = [], []
    for row in rows:
        ledger = row.prompts.cache.ledger
        assert ledger is not None
        new = decoding.limit(row.length + 1)
        before, after = replace(ledger, decoded=1), replace(ledger, decoded=1 + new)  # 1: the token that was cropped
        one, both = before.flops(model.runtime.cost), after.flops(model.runtime.cost)
        prompt.append(one)
        answer.append((both[0] - one[0], both[1] - one[1]))
    requested = torch.stack([row.requested for row in rows], 1)

    def columns(prices: list[PathCosts]) -> PathCosts:
        return torch.cat([run for run, _ in prices], 1), torch.cat([skip for _, skip in prices], 1)

    return consolidate(requested, at_most, columns(prompt), columns(answer))


def _groups(rows: Mapping[int, _Row], size: int, whole: bool) -> list[list[int]]:
    """Group the numbers of prompts that go the same path, neighbours in length together.

    Args:
        rows: the prompts by number.
        size: at most so many in a group.
        whole: whether all prompts of a group must have one length.
    """
    by_path: dict[tuple[LayerPath, int], list[int]] = {}
    for number, row in rows.items():
        by_path.setdefault((row.path, row.length if whole else 0), []).append(number)
    groups = []
    for members in by_path.values():
        members.sort(key=lambda number: rows[number].length)
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def _decode(model: RoutedModel, rows: Mapping[int, _Row], decoding: Decoding) -> dict[int, Answer]:
    """Answer prompts that go the same path, by number, in one batch in which nothing is gathered."""
    # Rows of one prefill become one part: their keys are then taken from it in one index.
    order = sorted(rows, key=lambda number: id(rows[number].prompts))
    parts: list[tuple[_Prompts, Part]] = []
    for i in order:
        source, place = rows[i].prompts, torch.tensor([rows[i].row])
        padding = source.cache.length - rows[i].length
        if parts and parts[-1][0] is source:
            last = parts[-1][1]
            parts[-1] = source, Part(source.cache, torch.cat([last.rows, place]), min(last.padding, padding))
        else:
            parts.append((source, Part(source.cache, place, padding)))
    # The cache lacks each prompt's last token, so generate runs that one, and its logits begin the answer.
    cache = join([part for _, part in parts])
    width = cache.length + 1
    inputs: dict[str, Any] = {}
    for name in TOKENS:
        if any(name in source.inputs for source, _ in parts):  # who lacks it has text alone
            filling = model.backbone.generation_config.pad_token_id or 0 if name == "input_ids" else 0
            nothing = [torch.zeros_like(source.inputs["input_ids"]) for source, _ in parts]
            values = [(source.inputs.get(name, z), part) for (source, part), z in zip(parts, nothing, strict=True)]
            inputs[name] = _stack(values, width, filling)
    if any(source.positions is not None for source, _ in parts):
        places = [(_places(source), part) for source, part in parts]
        inputs["position_ids"] = _stack(places, width, 0)
    options = dict(decoding.options)
    if (allowed := decoding.allowed) is not None:  # it knows the prompts, not the rows of this group
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(order[row], ids)
    ids = model.generate(**inputs, past_key_values=cache, **options)[:, width:]
    # The joined cache brought the prompts' ledgers, so these count prompt and answer together.
    (run, skip), kv_bytes = model.flops(), model.routing.kv_bytes
    assert kv_bytes is not None
    ends = torch.tensor(decoding.ends, device=ids.device)
    answers: dict[int, Answer] = {}
    for column, i in enumerate(order):
        row, path = rows[i], torch.tensor(rows[i].path)
        # the group went on until its last row had ended: behind a row's own end stands filling
        stop = torch.isin(ids[column], ends).nonzero()
        count = int(stop[0]) + 1 if len(stop) else ids.shape[1]

        def along(keep: Tensor, column: int = column) -> float:
            return float(torch.where(keep, run[:, column], skip[:, column]).sum())

        answers[i] = Answer(
            tokens=ids[column, :count],
            path=row.path,
            asked=tuple(row.requested.tolist()),
            executed=along(path) + row.discarded,
            wanted=along(row.requested),
            dense=float(run[:, column].sum()),
            kv_bytes=int(kv_bytes[column]),
        )
    return answers


def _places(source: _Prompts) -> Tensor:
    """Return the prompts' positions, long (... b t): those that came with them, else the mask's."""
    count = (source.inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    return count if source.positions is None else source.positions


def _stack(values: list[tuple[Tensor, Part]], width: int, filling: int) -> Tensor:
    """Put the parts' rows (... b t) one under the other, padded on the left to a common width."""
    rows = [value.index_select(-2, part.rows.to(value.device))[..., part.padding :] for value, part in values]
    return torch.cat([nn.functional.pad(x, (width - x.shape[-1], 0), value=filling) for x in rows], -2)
