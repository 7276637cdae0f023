"""Many prompts at once: each is routed at prefill, then decoded together with those that took the same path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.probe import in_this_thread
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.consolidate import Prices, consolidate
from adaskip.runtime.greedy import greedy_options
from adaskip.runtime.join import Part, join
from adaskip.runtime.measure import clock

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel

Path = tuple[bool, ...]
"""Of each layer, whether it runs."""

_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_REFUSED = ("past_key_values", "assistant_model", "streamer", "return_dict_in_generate", "custom_generate", "routing")


@dataclass(frozen=True)
class Answer:
    """What one prompt got."""

    tokens: Tensor  # long (n): the generated ones, up to and with the first end of sequence
    path: Path  # the layers that its group ran
    asked: Path  # the layers that its routers asked for: `path` itself, unless paths were consolidated
    executed: float  # decoder FLOPs spent on prompt and answer, a prefill that was done anew included
    wanted: float  # decoder FLOPs of the same tokens along the path asked for
    dense: float  # decoder FLOPs of the same tokens with every layer run
    kv_bytes: int  # of its keys and values in the cache when its group was done, filling up to the group's length too

    @property
    def keep_rate(self) -> float:
        """Executed over dense decoder FLOPs."""
        return self.executed / self.dense


@dataclass(frozen=True)
class Answers:
    """What `generate_many` gives back; answers in the order of the prompts."""

    answers: tuple[Answer, ...]
    groups: tuple[tuple[Path, int], ...]  # what was decoded together: the path, and how many prompts
    prefill_s: float
    decode_s: float
    changed: float | None = None  # share of the answers that consolidation changed, where it was measured

    @property
    def keep_rate(self) -> float:
        """Executed over dense decoder FLOPs of all prompts together; 1 for no prompts."""
        return self._share("executed", "dense", 1.0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all prompts' keys and values, as each group's cache held them when it was done."""
        return sum(answer.kv_bytes for answer in self.answers)

    @property
    def added(self) -> float:
        """FLOPs that consolidation added, as a share of what the paths asked for cost."""
        return self._share("executed", "wanted", 1.0) - 1

    def _share(self, part: str, whole: str, empty: float) -> float:
        total = sum(getattr(answer, whole) for answer in self.answers)
        return sum(getattr(answer, part) for answer in self.answers) / total if total else empty


@dataclass(frozen=True)
class _Prompts:
    """Some prompts that were prefilled together; their cache holds all but the last token of each."""

    inputs: dict[str, Any]
    positions: Tensor | None  # long (... b t)
    cache: SkipCache
    keep: Tensor  # bool (l b)
    spent: Tensor  # float64 (b): decoder FLOPs

    @property
    def padding(self) -> Tensor:
        """long (b): leading positions that are padding."""
        leading: Tensor = self.inputs["attention_mask"].long().argmax(1)
        return leading


@dataclass(frozen=True)
class _Row:
    """One prompt: where it was prefilled, what its routers asked for, and what an earlier prefill of it cost."""

    prompts: _Prompts
    row: int
    asked: Tensor  # bool (l)
    discarded: float = 0.0

    @property
    def path(self) -> Path:
        return tuple(self.prompts.keep[:, self.row].tolist())

    @property
    def length(self) -> int:
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
        **options: of ``generate``, such as ``max_new_tokens``.

    Raises:
        ConfigError: an option that asks for more than one row a prompt, or for a cache of its own.
        DataError: an item without ``input_ids``, or a prompt that ends with a vision token.
        BackboneError: the model keeps no cache.
    """
    _check(model, group_size, options)
    items = [_aligned(item) for item in prompts]
    if paths is not None:
        items = [one for item in items for one in _apart(item)]

    begun = clock()
    rows = [
        _Row(done, row, done.keep[:, row])
        for done in (_prefill(model, item) for item in items)
        for row in range(done.cache.batch)
    ]
    first: dict[int, _Row] = {}  # those that were prefilled anew, as they were
    if paths is not None and rows:
        new = _option(model, options, "max_new_tokens", 20)
        for number, path in enumerate(_snap(model, rows, paths, new).T):
            if not torch.equal(path, rows[number].asked):
                row = first[number] = rows[number]
                fresh = _prefill(model, row.prompts.inputs, path[:, None])
                rows[number] = _Row(fresh, 0, row.asked, float(row.prompts.spent[0]))
    prefilled = clock()
    groups = _groups(rows, group_size)
    answers: dict[int, Answer] = {}
    for group in groups:
        answers |= zip(group, _decode(model, [rows[number] for number in group], options), strict=True)
    decoded = clock()

    changed = None
    if measure and paths is not None:
        numbers, changed = [*first], 0.0
        for group in _groups([*first.values()], group_size):
            for i, answer in zip(group, _decode(model, [first[numbers[i]] for i in group], options), strict=True):
                changed += (not torch.equal(answer.tokens, answers[numbers[i]].tokens)) / len(rows)
    return Answers(
        answers=tuple(answers[number] for number in range(len(rows))),
        groups=tuple((rows[group[0]].path, len(group)) for group in groups),
        prefill_s=prefilled - begun,
        decode_s=decoded - prefilled,
        changed=changed,
    )


def _option(model: RoutedModel, options: dict[str, Any], name: str, default: Any = None) -> Any:
    """As ``generate`` has it: what was said, else what the given generation config says, else the model's own."""
    configs = (options.get("generation_config"), model.backbone.generation_config)
    told = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in told if value is not None), default)


def _check(model: RoutedModel, group_size: int, options: dict[str, Any]) -> None:
    if model.runtime.mode == "dense":
        raise ConfigError("generate_many: inside dense() there is only one path; call generate")
    if model.runtime.scope == "token":
        raise ConfigError("generate_many: under scope 'token' a prompt has no path of its own; call generate")
    if refused := [name for name in _REFUSED if options.get(name) is not None]:
        raise ConfigError(f"generate_many: {', '.join(refused)} does not go with many prompts; call generate")
    for name in ("num_beams", "num_return_sequences"):
        if _option(model, options, name, 1) > 1:
            raise ConfigError(f"generate_many: {name} asks for several rows a prompt; call generate")
    if group_size < 1:
        raise ConfigError(f"generate_many: group_size: expected at least 1 prompt, got {group_size}")


def _aligned(item: Mapping[str, Any]) -> dict[str, Any]:
    """The model's inputs with padding on the left, where generating is defined, and a mask."""
    ids = item.get("input_ids")
    if ids is None:
        raise DataError(f"generate_many: expected input_ids in each item, got {', '.join(item) or 'nothing'}")
    inputs = {"attention_mask": torch.ones_like(ids), **item}
    order = inputs["attention_mask"].long().argsort(dim=1, stable=True)

    def turned(value: Tensor) -> Tensor:  # (... b t), or of one row for all
        whole = (*value.shape[:-2], *order.shape)
        return value.expand(whole).gather(-1, order.expand(whole))

    return {name: turned(value) if name in (*_TOKENS, "position_ids") else value for name, value in inputs.items()}


def _apart(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """One item a prompt, so that one can be prefilled anew without the others."""
    count = len(inputs["input_ids"])
    if count > 1 and (other := [name for name in inputs if name not in _TOKENS]):
        raise ConfigError(
            f"generate_many: paths: expected one prompt an item where there is more than tokens ({', '.join(other)}), "
            f"got {count}"
        )
    begin = inputs["attention_mask"].long().argmax(1).tolist()
    if count == 1:
        return [inputs]
    return [{name: value[i : i + 1, begin[i] :] for name, value in inputs.items()} for i in range(count)]


def _prefill(model: RoutedModel, inputs: dict[str, Any], keep: Tensor | None = None) -> _Prompts:
    """Read prompts as `generate` would, along ``keep`` or wherever the routers say, and stop before the first token."""
    vision = model.read_tokens(inputs).vision
    if vision is not None and vision[:, -1].any():
        raise DataError("generate_many: a prompt ends with a vision token; put text after the picture")
    seen: dict[str, Any] = {}

    def look(backbone: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen.update(given)

    handle = model.backbone.register_forward_pre_hook(in_this_thread(look), with_kwargs=True)
    try:
        model.generate(**inputs, routing=keep, use_cache=True, **greedy_options(1))
    finally:
        handle.remove()
    cache = seen.get("past_key_values")
    if not isinstance(cache, SkipCache) or cache.routing is None:
        raise BackboneError(
            f"generate_many: {type(model.backbone).__name__} keeps no cache that could go on with others; call generate"
        )
    spent, positions = model.routing.executed, seen.get("position_ids")
    if positions is not None and positions.shape[-2] != cache.batch:
        positions = positions.expand(*positions.shape[:-2], cache.batch, -1)
    cache.crop(-1)
    assert spent is not None
    return _Prompts(inputs, positions, cache, cache.routing.keep.cpu(), spent)


def _snap(model: RoutedModel, rows: list[_Row], at_most: int, new: int) -> Tensor:
    """bool (l n): at most so many paths, by what prompts and ``new`` tokens each would cost."""
    prompt, answer = [], []
    for row in rows:
        ledger = row.prompts.cache.ledger
        assert ledger is not None
        before, after = replace(ledger, decoded=1), replace(ledger, decoded=1 + new)  # 1: the token that was cropped
        one, both = before.flops(model.runtime.cost), after.flops(model.runtime.cost)
        prompt.append(one)
        answer.append((both[0] - one[0], both[1] - one[1]))
    asked = torch.stack([row.asked for row in rows], 1)

    def columns(prices: list[Prices]) -> Prices:
        return torch.cat([run for run, _ in prices], 1), torch.cat([left for _, left in prices], 1)

    return consolidate(asked, at_most, columns(prompt), columns(answer))


def _groups(rows: Sequence[_Row], size: int) -> list[list[int]]:
    """Numbers of rows that go the same path, at most so many together, of like length."""
    by_path: dict[Path, list[int]] = {}
    for number, row in enumerate(rows):
        by_path.setdefault(row.path, []).append(number)
    found = []
    for members in by_path.values():
        members.sort(key=lambda number: rows[number].length)
        found += [members[start : start + size] for start in range(0, len(members), size)]
    return found


def _decode(model: RoutedModel, rows: list[_Row], options: dict[str, Any]) -> list[Answer]:
    """The answers of rows that go the same path, from one batch in which nothing is gathered."""
    order = sorted(range(len(rows)), key=lambda i: id(rows[i].prompts))
    parts: list[tuple[_Prompts, Part]] = []
    for i in order:
        source, place = rows[i].prompts, torch.tensor([rows[i].row])
        padding = source.cache.length - rows[i].length
        if parts and parts[-1][0] is source:
            known = parts[-1][1]
            parts[-1] = source, Part(source.cache, torch.cat([known.rows, place]), min(known.padding, padding))
        else:
            parts.append((source, Part(source.cache, place, padding)))
    cache = join([part for _, part in parts])
    width = cache.length + 1
    inputs: dict[str, Any] = {}
    for name in _TOKENS:
        if any(name in source.inputs for source, _ in parts):  # who lacks it has text alone
            filling = model.backbone.generation_config.pad_token_id or 0 if name == "input_ids" else 0
            nothing = [torch.zeros_like(source.inputs["input_ids"]) for source, _ in parts]
            given = [(source.inputs.get(name, zero), part) for (source, part), zero in zip(parts, nothing, strict=True)]
            inputs[name] = _stack(given, width, filling)
    if parts[0][0].positions is not None:
        places = [(source.positions, part) for source, part in parts if source.positions is not None]
        inputs["position_ids"] = _stack(places, width, 0)
    ids = model.generate(**inputs, past_key_values=cache, **options)[:, width:]
    (run, left), held = model.flops(), model.routing.kv_bytes
    assert held is not None
    ends = _option(model, options, "eos_token_id")
    ends = torch.tensor(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends], device=ids.device)
    found: dict[int, Answer] = {}
    for column, i in enumerate(order):
        row, path = rows[i], torch.tensor(rows[i].path)
        stop = torch.isin(ids[column], ends).nonzero()
        count = int(stop[0]) + 1 if len(stop) else ids.shape[1]

        def along(keep: Tensor, column: int = column) -> float:
            return float(torch.where(keep, run[:, column], left[:, column]).sum())

        found[i] = Answer(
            tokens=ids[column, :count],
            path=row.path,
            asked=tuple(row.asked.tolist()),
            executed=along(path) + row.discarded,
            wanted=along(row.asked),
            dense=float(run[:, column].sum()),
            kv_bytes=int(held[column]),
        )
    return [found[i] for i in range(len(rows))]


def _stack(values: list[tuple[Tensor, Part]], width: int, filling: int) -> Tensor:
    """The parts' rows (... b t) one under the other, padded on the left to a common width."""
    cut = [value.index_select(-2, part.rows.to(value.device))[..., part.padding :] for value, part in values]
    return torch.cat([nn.functional.pad(x, (width - x.shape[-1], 0), value=filling) for x in cut], -2)
