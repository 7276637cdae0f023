"""FastV: behind an early layer, the vision tokens that the end of the prompt attends to least take part no more.

layer      0 1 | 2 3 4 5 ...        layer = 2, share = 0.5
patch 1    # # | # # # # ...        what the last prompt token attends to in layer 1 ranks the patches;
patch 2    # # | . . . . ...        half of them, those that it attends to least, leave every layer behind,
text       # # | # # # # ...        and their keys are gone there as well
"""

from __future__ import annotations

from typing import Any, ClassVar

from adaskip.backbone.inspect import BackboneSpec
from adaskip.plan import Target
from adaskip.policies.ranking import Ranking, check_stages


class FastV(Ranking):
    """Drop a share of the vision tokens behind one layer, by attention (arXiv 2403.06764); nothing is trained.

    Of a prompt that is read in chunks, the last token of each chunk ranks the patches of that chunk.

    Args:
        layer: the first layer that dropped tokens leave; the one before it ranks them.
        share: of each input's vision tokens that stay, rounded up.
        target: of scope ``token``, group ``vision``, unit ``block``, keys absent.

    Raises:
        ConfigError: a value outside its range, or another target.
    """

    kind: ClassVar[str] = "fastv"

    def __init__(self, layer: int = 2, share: float = 0.5, target: Target | None = None) -> None:
        super().__init__(target)
        self.layer, self.share, self.stages = layer, share, (layer,)
        faults = []
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            faults.append(f"layer: expected a layer of at least 1, which has one before it, got {layer!r}")
        self.check(faults, "share")

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Check that the model has the layer.

        Raises:
            ConfigError: it does not.
        """
        check_stages(self.stages, spec, "FastV: layer")

    def to_dict(self) -> dict[str, Any]:
        """Return the layer, the share and the target."""
        return {"layer": self.layer, "share": self.share, "target": self.target.to_dict()}
