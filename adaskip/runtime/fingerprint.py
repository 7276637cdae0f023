"""Identify a backbone by its shape and a few values of every weight.

The values themselves are kept and not a hash of them: so the same checkpoint is recognised in another precision, and a
vocabulary that has grown is not taken for another model.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec
from adaskip.backbone.weights import PLAIN, count_unreadable, effective_weights, find_packed
from adaskip.errors import BackboneError

PICKS = 8


@dataclass(frozen=True)
class Sample:
    """Hold evenly spaced values of one weight, in its own precision; None: it cannot be read as numbers."""

    shape: tuple[int, ...]
    values: Tensor | None


@dataclass(frozen=True)
class Fingerprint:
    """Hold what identifies a backbone.

    Attributes:
        identity: class, model_type, layers, width, vocabulary.
        samples: of each weight, by its name without adapters.
        quantised: whether some weights are codes, or stand where they cannot be read.
    """

    identity: dict[str, Any]
    samples: dict[str, Sample] = field(repr=False)
    quantised: bool

    def digest(self) -> str:
        """Return a short hash of all that could be read: for people, and for what holds in one precision alone."""
        digest = hashlib.sha256()
        for name, sample in sorted(self.samples.items()):
            digest.update(f"{name}{sample.shape}".encode())
            if sample.values is not None:
                digest.update(sample.values.double().numpy().tobytes())
        return digest.hexdigest()[:32]


def fingerprint(spec: BackboneSpec) -> Fingerprint:
    """Take a backbone's fingerprint: eight evenly spaced values of each weight, as the forward pass uses it.

    Offloaded weights are read where they are kept; adapters count as if they were merged. Costs one pass over the
    weights.
    """
    samples = {}
    for name, weight in effective_weights(spec.model):
        shape = () if weight is None else tuple(weight.shape)
        samples[name] = Sample(shape, None if weight is None else _pick(weight, _places(weight.numel())))
    quantised = any(sample.values is None for sample in samples.values()) or _is_packed(spec)
    return Fingerprint(identify(spec), samples, quantised)


def identify(spec: BackboneSpec) -> dict[str, Any]:
    """Return a backbone's class and shape."""
    return {
        "class": type(spec.model).__name__,
        "model_type": spec.model.config.model_type,
        "layers": len(spec.layers),
        "width": spec.width,
        "vocabulary": spec.config.vocab_size,
    }


def describe_unreadable(spec: BackboneSpec) -> str:
    """Return a sentence that warns of training on weights which no fingerprint can be taken of; empty if all can be."""
    unreadable, total = count_unreadable(spec.model)
    name, text = type(spec.model).__name__, ""
    if (packed := find_packed(spec.model)) is not None:
        text = (
            f"{name}: weights are packed ({type(packed).__name__}), so its routers cannot be checked against them when "
            "they are loaded; packed weights seldom pass a gradient: train on the model in full precision"
        )
    elif unreadable:
        text = (
            f"{name}: {unreadable} of {total} weights are quantised or sharded, and cannot be read "
            "as numbers; routers can be trained, saved and loaded, but loading cannot check these weights"
        )
    return text


def check_fingerprint(expected: Fingerprint, spec: BackboneSpec, strict: bool) -> None:
    """Compare what routers were trained on with the model at hand.

    In the same precision all values must be equal, in another one equal to its rounding. Weights that cannot be read on
    either side are left out, with a warning. More or fewer tokens than before are accepted, with a warning, if the
    embeddings of the common ones agree.

    Raises:
        BackboneError: they differ and ``strict``; the text lists every difference.
    """
    differing = _differences(expected.identity, spec)
    resized = len(differing) == 1 and differing[0].startswith("vocabulary")
    if differing and not resized:
        return refuse(differing, strict)
    sizes = (expected.identity["vocabulary"], spec.config.vocab_size)
    result = _compare(expected, spec, sizes)
    agreeing = len(result.same) + len(result.resized)
    if result.other:
        total = len(result.other) + agreeing
        differing.append(f"weights: {len(result.other)} of {total} differ, such as {result.other[0]}")
    if result.other or (resized and not result.resized):  # nothing shows that it is the same vocabulary, grown
        return refuse(differing, strict)
    if resized:
        warnings.warn(
            f"the routers were trained with a vocabulary of {sizes[0]}, and this backbone's is {sizes[1]}; the "
            "embeddings of the tokens that both have agree, so it counts as the same backbone",
            stacklevel=5,
        )
    if result.unread:
        warnings.warn(
            f"{len(result.unread)} of {len(result.unread) + agreeing} weights could not be compared with those that "
            "the routers were trained on, because they are quantised or sharded here or there; "
            + ("the others agree" if agreeing else "nothing but the model's shape was checked"),
            stacklevel=5,
        )
    return None


def _differences(expected: dict[str, Any], spec: BackboneSpec) -> list[str]:
    """Return a text for each part of a backbone's identity that is not the expected one."""
    actual = identify(spec)
    return [
        f"{key}: {value!r} expected, {actual.get(key)!r} found"
        for key, value in expected.items()
        if actual.get(key) != value
    ]


def refuse(differing: list[str], strict: bool) -> None:
    """Raise, or warn where not ``strict``, that the routers belong to another backbone."""
    text = "the routers were trained on another backbone: " + "; ".join(differing)
    if strict:
        raise BackboneError(f"{text}. Load the backbone they name, or pass strict=False to use this one all the same")
    warnings.warn(text, stacklevel=6)


@dataclass
class _Comparison:
    """Collect the names of weights by how they compare."""

    other: list[str] = field(default_factory=list)  # they differ
    same: list[str] = field(default_factory=list)  # they agree
    resized: list[str] = field(default_factory=list)  # they agree in the tokens common to both vocabularies
    unread: list[str] = field(default_factory=list)  # they cannot be compared


def _compare(expected: Fingerprint, spec: BackboneSpec, sizes: tuple[int, int]) -> _Comparison:
    """Compare every weight with its sample; ``sizes`` are the vocabularies of then and now."""
    result, names, extra = _Comparison(), set(), []
    for name, weight in effective_weights(spec.model):
        names.add(name)
        sample = expected.samples.get(name)
        if sample is None:
            extra.append(name)
        elif weight is None or sample.values is None:
            result.unread.append(name)
        elif not _agrees(sample, weight, sizes):
            result.other.append(name)
        else:
            (result.same if tuple(weight.shape) == sample.shape else result.resized).append(name)
    one_sided = [*extra, *(name for name in expected.samples if name not in names)]
    # a quantiser renames weights and adds scales; without one every name counts
    quantised = expected.quantised or result.unread or _is_packed(spec)
    (result.unread if quantised else result.other).extend(one_sided)
    return result


def _agrees(sample: Sample, weight: Tensor, sizes: tuple[int, int]) -> bool:
    """Return whether a weight has the sampled values, as far as its precision and its rows reach."""
    assert sample.values is not None
    places, values = _places(_numel(sample.shape)), sample.values
    if tuple(weight.shape) != sample.shape:
        if (sample.shape[:1], weight.shape[:1]) != (sizes[:1], sizes[1:]) or sample.shape[1:] != weight.shape[1:]:
            return False
        common = places < weight.numel()  # rows of the tokens that both vocabularies have
        places, values = places[common], values[common]
    return _equal(values, _pick(weight, places))


def _equal(one: Tensor, two: Tensor) -> bool:
    """Compare exactly in one precision, else within the rounding of both; what overflows is equal to infinity."""
    a, b = one.double(), two.double()
    if one.dtype == two.dtype:
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    infos = torch.finfo(one.dtype), torch.finfo(two.dtype)
    limit = min(info.max for info in infos)
    a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    near = sum(info.eps for info in infos) * torch.maximum(a.abs(), b.abs())
    near = near + sum(info.smallest_normal * info.eps for info in infos)  # below this a precision has no numbers
    return bool((((a - b).abs() <= near) | (a.isnan() & b.isnan())).all())


def _places(count: int) -> Tensor:
    """Return evenly spaced places in a flattened weight, long (n)."""
    return torch.linspace(0, count - 1, min(PICKS, count), dtype=torch.float64).long()


def _pick(weight: Tensor, places: Tensor) -> Tensor:
    return weight.reshape(-1)[places.to(weight.device)].cpu()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _is_packed(spec: BackboneSpec) -> bool:
    return find_packed(spec.model) is not None or getattr(spec.model, "is_quantized", False)


# -- routers of format 1, which kept a hash alone ----------------------------------------------------------------------


def check_digest(expected: dict[str, Any], spec: BackboneSpec, strict: bool) -> None:
    """Compare with the hash that format 1 kept: values rounded to bfloat16, under the names that weights had then.

    It cannot be made anew of a model in a coarser precision than the routers', or quantised: then a warning says so.

    Raises:
        BackboneError: they differ and ``strict``; the text lists every difference.
    """
    differing = _differences({key: value for key, value in expected.items() if key != "weights"}, spec)
    digests = [] if differing else [_old_digest(spec, via) for via in (None, torch.float16)]
    if not differing and (expected["weights"] in digests):
        return
    if not differing and (None in digests or spec.model.dtype == torch.float16):
        warnings.warn(
            "the routers were saved with a hash of their backbone's weights that cannot be made in this precision, so "
            "nothing but the model's shape was checked; save the routers anew with save_pretrained",
            stacklevel=5,
        )
        return
    if not differing:
        differing = [f"weights: hash {expected['weights']!r} expected, {digests[0]!r} found"]
    refuse(differing, strict)


def _old_digest(spec: BackboneSpec, via: torch.dtype | None) -> str | None:
    """Return the hash of format 1, or None if a weight cannot be read.

    Args:
        spec: the model.
        via: hash the weights as if they had been of this precision.
    """
    digest = hashlib.sha256()
    weights = dict(effective_weights(spec.model))
    for name, weight in sorted(spec.model.named_parameters()):
        value = weights.get(name) if weight.is_meta else weight.detach()
        if value is None or value.dtype not in PLAIN or type(value) not in (Tensor, torch.nn.Parameter):
            return None
        values = _pick(value, _places(value.numel()))
        values = values if via is None else values.to(via)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
