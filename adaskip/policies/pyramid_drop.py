"""PyramidDrop: stage by stage, the vision tokens that the end of the prompt attends to least take part no more.

layer      0 1 | 2 3 | 4 5 | 6 7          ratio = 0.5, stages at 1/4, 1/2 and 3/4 of the depth
patches    8     4     2     1            how many of an input's eight patches run the layers of each stage
text       # # | # # | # # | # #          the last layer of a stage ranks them, by what the last prompt token attends to
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import Target, read_layers
from adaskip.policies.ranking import Ranking, check_stages


class PyramidDrop(Ranking):
    """Drop a share of the vision tokens at the end of every stage, by attention (arXiv 2410.17247); nothing is trained.

    Published with an extra pass of queries and keys over the states that leave a stage, by which tokens are ranked, and
    with a model that is fine-tuned so. Ours: the attention of the stage's last layer, which is computed anyway, ranks,
    and the backbone is as it came.

    Args:
        layers: the first layer of each stage behind the first; None: those at 1/4, 1/2 and 3/4 of the depth.
        ratio: of the vision tokens that are still there, what stays at each stage, rounded up.
        target: of scope ``token``, group ``vision``, unit ``block``, keys absent.

    Raises:
        ConfigError: a value outside its range, or another target.
    """

    kind: ClassVar[str] = "pyramid_drop"

    def __init__(self, layers: Sequence[int] | None = None, ratio: float = 0.5, target: Target | None = None) -> None:
        super().__init__(target)
        faults: list[str] = []
        stages: tuple[int, ...] = ()
        try:
            stages = () if layers is None else read_layers(layers)
        except ValueError as error:
            faults.append(f"layers: {error}")
        if layers is not None and not faults and (not stages or stages[0] < 1):
            faults.append(f"layers: expected layers of at least 1, each has one before it, got {list(stages)}")
        self.layers: tuple[int, ...] | None = None if layers is None else stages
        self.share, self.stages = ratio, stages
        self.check(faults, "ratio")

    @property
    def ratio(self) -> float:
        """Return what stays at each stage of the vision tokens that are still there."""
        return self.share

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Find the stages of the model's depth where none are given.

        Raises:
            ConfigError: the model does not have one of the layers, or only one layer.
        """
        self.stages = quarters(len(spec.layers)) if self.layers is None else self.layers
        if not self.stages:
            raise ConfigError(f"PyramidDrop: layers: expected a model of at least 2 layers, got {len(spec.layers)}")
        check_stages(self.stages, spec, "PyramidDrop: layers")

    def to_dict(self) -> dict[str, Any]:
        """Return the layers, the ratio and the target."""
        layers = None if self.layers is None else list(self.layers)
        return {"layers": layers, "ratio": self.ratio, "target": self.target.to_dict()}


def quarters(layers: int) -> tuple[int, ...]:
    """Return the layers at 1/4, 1/2 and 3/4 of a depth, those that are there and have one before them, each once.

    >>> quarters(32), quarters(12), quarters(2)
    ((8, 16, 24), (3, 6, 9), (1,))
    """
    return tuple(sorted({layers * quarter // 4 for quarter in (1, 2, 3)} - {0}))
