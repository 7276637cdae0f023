"""Where decisions fall: one site a layer, or one for each half of it; nobody else counts or names sites.

    unit         sites of layer 4          labels
    block        4                         4
    attention    4                         4
    mlp          4                         4
    sublayers    8 and 9                   4.attention and 4.mlp

Sites are numbered layer by layer, in the order in which a layer runs its parts. Tensors of decisions have an axis of
sites; what people write and read are labels. A label that is a number always means a layer, with all of its sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

Unit = Literal["block", "attention", "mlp", "sublayers"]
Part = Literal["block", "attention", "mlp"]
Label = int | str
"""What people call a site: the number of its layer, or layer and part, such as ``4.attention``."""

PARTS: dict[Unit, tuple[Part, ...]] = {
    "block": ("block",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "sublayers": ("attention", "mlp"),
}
"""What of a layer is decided apart, by unit."""


@dataclass(frozen=True)
class Sites:
    """Count and name the sites of a unit in a model of so many layers.

    >>> sites = Sites("sublayers", 5)
    >>> len(sites), sites.layer(9), sites.part(9), sites.label(9), list(sites.of(4))
    (10, 4, 'mlp', '4.mlp', [8, 9])
    >>> sites.labels([0, 9]), Sites("block", 5).labels([0, 4])
    (('0.attention', '4.mlp'), (0, 4))
    """

    unit: Unit
    layers: int

    def __len__(self) -> int:
        return self.layers * len(self.parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return what of a layer is decided apart."""
        return PARTS[self.unit]

    def layer(self, site: int) -> int:
        """Return the layer of a site."""
        return site // len(self.parts)

    def part(self, site: int) -> Part:
        """Return what of its layer a site leaves out."""
        return self.parts[site % len(self.parts)]

    def of(self, layer: int) -> range:
        """Return the sites of a layer."""
        return range(layer * len(self.parts), (layer + 1) * len(self.parts))

    def label(self, site: int) -> Label:
        """Return what a site is called."""
        return label_site(self.unit, site)

    def key(self, site: int) -> str:
        """Return a name that sorts as sites do.

        >>> Sites("sublayers", 5).key(9), Sites("mlp", 5).key(4)
        ('04.mlp', '04')
        """
        layer = f"{self.layer(site):02d}"
        return layer if len(self.parts) == 1 else f"{layer}.{self.part(site)}"

    def labels(self, sites: Iterable[int]) -> tuple[Label, ...]:
        """Return what sites are called."""
        return tuple(map(self.label, sites))

    def split(self, paths: Iterable[Iterable[Label]]) -> tuple[list[Label], list[Label]]:
        """Return the labels among some paths whose sites the model has, and those whose it has not, in order.

        >>> Sites("mlp", 4).split([[1, 7], [3, 1]])
        ([1, 3], [7])
        """
        named = sorted({site for path in paths for site in read_sites(self.unit, path)})
        inside = [self.label(site) for site in named if site < len(self)]
        return inside, [self.label(site) for site in named if site >= len(self)]


def label_site(unit: Unit, site: int) -> Label:
    """Return what a site is called, which does not depend on the number of layers."""
    parts = _parts(unit)
    layer, place = divmod(site, len(parts))
    return layer if len(parts) == 1 else f"{layer}.{parts[place]}"


def read_sites(unit: Unit, labels: Any) -> tuple[int, ...]:
    """Read the sites that labels name, each once, in order; a number names all sites of its layer.

    >>> read_sites("sublayers", ["7.mlp", "4.attention", 2]), read_sites("block", [3, 1])
    ((4, 5, 8, 15), (1, 3))

    Raises:
        ValueError: no list of labels; says what one looks like.
    """
    parts = _parts(unit)
    expected = "layer numbers such as [1, 3]"
    if len(parts) > 1:
        expected = f"labels such as ['1.{parts[0]}', '3.{parts[-1]}'], or layers such as 1"
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"expected {expected}, got {values!r}")
    try:
        return tuple(sorted({site for value in values for site in _read_label(parts, value)}))
    except ValueError as error:
        raise ValueError(f"expected {expected}; one of them: {error}") from None


def parse_labels(text: str) -> tuple[Label, ...]:
    """Take labels apart that a command line separates by commas.

    >>> parse_labels("4,5.mlp")
    (4, '5.mlp')
    """
    return tuple(int(part) if part.strip().lstrip("-").isdigit() else part.strip() for part in text.split(","))


def name_sites(labels: Iterable[Label]) -> str:
    """Name sites as a sentence does.

    >>> name_sites([4, 5]), name_sites(["3.mlp"]), name_sites([])
    ('layers 4, 5', 'layer 3.mlp', 'no layer')
    """
    names = [str(label) for label in labels]
    return f"layer{'s' * (len(names) != 1)} {', '.join(names)}" if names else "no layer"


def _parts(unit: Any) -> tuple[Part, ...]:
    """Return what of a layer is decided apart; a unit that is none is a fault which is reported elsewhere."""
    return next((parts for name, parts in PARTS.items() if name == unit), PARTS["block"])


def _read_label(parts: tuple[Part, ...], value: Any) -> Iterable[int]:
    """Return the sites that one label names, of units with these parts.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        layer, _, part = value.partition(".")
        if len(parts) > 1 and layer.isdecimal() and part in parts:
            return (int(layer) * len(parts) + parts.index(part),)
    elif not isinstance(value, bool):
        try:
            first = index(value) * len(parts)
        except TypeError:
            pass
        else:
            return range(first, first + len(parts))
    raise ValueError(f"expected {'an integer' if len(parts) == 1 else 'a layer and its part'}, got {value!r}")
