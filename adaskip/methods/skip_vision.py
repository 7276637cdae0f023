"""Skip-Vision: let merged vision tokens skip every MLP and free their keys, as many as the budget asks for."""

from __future__ import annotations

from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.policies.skip_vision import KEPT, LEFT, SkipVision
from adaskip.survey.static import ROUNDING


def choose(evidence: Evidence, keep: float, seed: int) -> SkipVision:
    """Return the policy in which most vision tokens run the MLPs of those that hold the budget.

    Raises:
        ConfigError: one vision token an input in the MLPs is too many.
    """
    sites, patches = evidence.model.sites, evidence.patches
    saved = sum(float(evidence.saves[site]) for site in range(len(sites)) if sites.part(site) == "mlp")
    steps = int(patches.max()) if len(patches) else 0

    def kept(share: float) -> float:
        return 1 - saved * float((1 - (share * patches - 1e-9).ceil() / patches).mean())

    for count in range(steps, 0, -1):
        if kept(count / steps) <= keep + ROUNDING:
            share = count / steps / (KEPT + LEFT)  # the two published shares, in their proportion
            return SkipVision(KEPT * share, LEFT * share)
    least = kept(1 / steps) if steps else 1.0
    raise ConfigError(f"keep={keep:g}: expected at least {least:.3f}, with one vision token in the MLPs")


METHOD = Method(
    "skip_vision",
    "Skip-Vision",
    "arXiv 2503.21817",
    choose,
    groups=("vision",),
    phases=("both",),
    unit="sublayers",
    looks="states",
    ours="the shares follow from the budget, in their published proportion; a summary takes the place of the token "
    "that others are merged into, weighted by similarity and not by training; one merge, not pair by pair; published "
    "with a fine-tuned model, here the backbone is frozen",
)
