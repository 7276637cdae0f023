"""Verdicts: may a layer be skipped, and does the router skip what may be skipped?

All thresholds follow from one number, the nats per predicted token a skip may cost (``tolerance``), or the accuracy
points it may cost (`bounds.kl_for_accuracy` makes nats of them):

    functional    E KL            <= tolerance                          exact cost
    geometric     E[1 - cos]      <= eps_l = min(2, (s* / Lambda_l)^2 / 2)  heuristic
    proximal      P(1 - cos > eps_l) <= alpha                           the same threshold, for single inputs
    cross-modal   attention mass  <= s* / (c Lambda_l)                  heuristic; vision with keys absent only

Derivation [D]: s* = sqrt(2 tolerance) is the spread whose cost to second order is the tolerance. The calibrated
s <= Lambda (rho + c a) stays below s* where rho <= s* / Lambda and c a <= s* / Lambda, each with the other at 0; and
rho^2 <= 2 E[1 - cos] for states of equal norm (link 2, and Jensen: rho is a mean over tokens). alpha is what the
constants' own calibration leaves open.

Only the functional notion is the cost itself; the others are cheap predictors, and `Findings.rank_correlation` shows
how well each of them predicts here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory.conformal import beta_binomial_pvalue, conformal_quantile, safe_ratio, smallest_sample
from adaskip.theory.intervals import Interval, bonferroni, bootstrap_mean, clopper_pearson
from adaskip.theory.measures import spearman
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures

Notion = Literal["geometric", "proximal", "functional", "cross-modal"]
Verdict = Literal["admissible", "inadmissible", "undecided"]
Conclusive = Literal["hold", "do not hold", "undecided"]

LEAST = 4
"""Inputs that `judge_joint` needs."""
REJECTED = 0.01
"""Below this p-value the bound's coverage counts as too small."""
_SLACK = torch.tensor([0.5, 0.9], dtype=torch.float64)
_NONE = torch.full((2,), math.nan)


@dataclass(frozen=True)
class Finding:
    """Hold one notion of one layer, read against its threshold."""

    layer: int
    group: str
    notion: Notion
    estimate: float
    low: float
    high: float
    threshold: float
    n: int

    @property
    def margin(self) -> float:
        """Return how far the estimate lies below the threshold; negative above it."""
        return self.threshold - self.estimate

    @property
    def verdict(self) -> Verdict:
        """Return admissible if the whole interval lies within the threshold, inadmissible if all of it lies beyond."""
        if self.high <= self.threshold:
            return "admissible"
        return "inadmissible" if self.low > self.threshold else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, infinite ends as None."""
        values = {**asdict(self), "margin": self.margin, "verdict": self.verdict}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class Findings:
    """Hold all findings of one look at the layers."""

    rows: tuple[Finding, ...]
    rank_correlation: dict[str, float]  # Spearman's rho over layers of each cheap notion with the exact cost

    def verdict(self, layer: int) -> Verdict:
        """Return admissible if all notions hold, inadmissible if one clearly fails, else undecided."""
        verdicts = {row.verdict for row in self.rows if row.layer == layer}
        if "inadmissible" in verdicts:
            return "inadmissible"
        return "admissible" if verdicts == {"admissible"} else "undecided"

    @property
    def layers(self) -> dict[int, Verdict]:
        """Return the verdict of every layer looked at."""
        return {layer: self.verdict(layer) for layer in sorted({row.layer for row in self.rows})}


def judge(
    measured: LayerMeasures, prices: Prices, group: str, tolerance: float, level: float = 0.95, looks: int = 1
) -> Findings:
    """Read the four notions of every measured layer against the thresholds that follow from the tolerance.

    Args:
        measured: inputs that the prices were not calibrated on.
        prices: calibrated constants.
        group: the tokens that leave a layer.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: that all intervals of all looks hold at once (Bonferroni).
        looks: how often this question is asked during a run.

    Raises:
        DataError: fewer than two inputs, or a measure that is not finite.
    """
    _check(measured)
    notions: list[Notion] = ["geometric", "proximal", "functional"]
    if group == "vision":
        notions.append("cross-modal")
    each = bonferroni(level, len(notions) * len(measured.layers) * looks)
    spread = math.sqrt(2 * tolerance)
    rows = []
    for column, layer in enumerate(measured.layers):
        constant = float(prices.shift[layer])
        eps = min(2.0, (spread / constant) ** 2 / 2) if constant > 0 else 2.0
        mass_limit = min(1.0, spread / (prices.c * constant)) if constant > 0 else 1.0
        cosine = measured.cosine[:, column]
        moved = cosine > eps
        read: dict[Notion, tuple[Interval, float]] = {
            "geometric": (bootstrap_mean(cosine, each), eps),
            "proximal": (clopper_pearson(int(moved.sum()), len(moved), each), prices.alpha),
            "functional": (bootstrap_mean(measured.kl[:, column], each), tolerance),
            "cross-modal": (bootstrap_mean(measured.mass[:, column], each), mass_limit),
        }
        for notion in notions:
            interval, threshold = read[notion]
            rows.append(
                Finding(layer, group, notion, interval.estimate, interval.low, interval.high, threshold, interval.n)
            )
    return Findings(tuple(rows), rank_correlations(measured))


@dataclass(frozen=True)
class SkipFinding:
    """Hold the verdict on a router's skips of one layer at one look: do they cost more than they may?"""

    layer: int
    n: int  # inputs for which the router leaves the layer out
    rows: tuple[Finding, ...]  # the notions on these inputs
    label: str = ""  # what a sentence calls the layer; empty: by its number

    @property
    def verdict(self) -> Verdict:
        """Return the verdict of the exact cost where it is clear; where it is not, that of all notions together."""
        functional = next(row for row in self.rows if row.notion == "functional")
        if functional.verdict != "undecided":
            return functional.verdict
        return Findings(self.rows, {}).verdict(self.layer)

    @property
    def sentence(self) -> str:
        """Say what speaks for the verdict: the exact cost, or the notion that fails where that is not clear."""
        failing = [row for row in self.rows if row.verdict == "inadmissible"]
        cost = next(row for row in self.rows if row.notion == "functional")
        text = (
            f"skips of layer {self.label or self.layer} are {self.verdict} on the {self.n} inputs that make them: "
            f"they cost {cost.estimate:.3g} nats [{cost.low:.3g}, {cost.high:.3g}] a token"
        )
        others = [row for row in failing if row is not cost]
        if self.verdict != "inadmissible" or cost.verdict == "inadmissible" or not others:
            return text
        row = others[0]
        return f"{text}, and {row.notion} {row.estimate:.3g} [{row.low:.3g}, {row.high:.3g}] > {row.threshold:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {"layer": self.layer, "n": self.n, "verdict": self.verdict, "rows": [row.to_dict() for row in self.rows]}


def judge_skips(
    measured: LayerMeasures,
    keep: Tensor,
    prices: Prices,
    group: str,
    tolerance: float,
    level: float = 0.95,
    looks: int = 1,
) -> dict[int, SkipFinding]:
    """Judge each layer on those inputs for which the router leaves it out: the skips it really makes.

    The cost is that of this one skip, all other layers run. Layers skipped for fewer than two inputs are left out.

    Args:
        measured: all layers, on inputs that neither routers nor prices were fitted on.
        keep: bool (l n), the router's decisions on the same inputs.
        prices: calibrated constants.
        group: the tokens that leave a layer.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: that all intervals of all layers and looks hold at once (Bonferroni).
        looks: how often this question is asked during a run.
    """
    findings = {}
    for layer in measured.layers:
        rows = ~keep[layer].cpu()
        if int(rows.sum()) >= 2:
            judged = judge(measured.select(rows, layer), prices, group, tolerance, level, looks * len(measured.layers))
            findings[layer] = SkipFinding(layer, int(rows.sum()), judged.rows)
    return findings


def rank_correlations(measured: LayerMeasures) -> dict[str, float]:
    """Return Spearman's rho over layers of each cheap notion's mean with the mean exact KL; empty below 3 layers."""
    if len(measured.layers) < 3:
        return {}
    cost = measured.kl.double().mean(0)
    cheap = {"cosine": measured.cosine, "rho": measured.rho, "s": measured.s}
    if bool((measured.mass > 0).any()):
        cheap["mass"] = measured.mass
    return {name: spearman(values.double().mean(0), cost) for name, values in cheap.items()}


@dataclass(frozen=True)
class Joint:
    """Hold the joint cost of the router's real decisions, against the calibrated bound kappa * B."""

    kl: float  # mean exact KL(dense || routed), nats per predicted token
    bound: float  # mean kappa * B
    kappa: float  # calibrated factor; infinite when the calibration sample is too small for alpha
    coverage: float  # share of fresh inputs with KL <= kappa * B
    coverage_p: float  # p-value of "coverage is at least 1 - alpha" under the beta-binomial law
    skips: int  # layer skips of all inputs
    admissible_skips: float  # share of them on admissible layers (precision); NaN without skips
    recall: float  # share of (input, admissible layer) pairs that are skipped; NaN without admissible layers
    n: int
    skips_per_input: float = math.nan  # mean; under scope token a layer that a third of the tokens skip counts a third
    tolerated: float = math.nan  # nats: what all skips of an input may cost if each costs the tolerance, mean
    excess_low: float = -math.inf  # interval of the mean of KL minus what is tolerated, nats
    excess_high: float = math.inf
    spearman: float = math.nan  # of B and the exact KL over the inputs that skip something; NaN: either is constant
    slack_median: float = math.nan  # of kappa * B / KL over the inputs that test kappa and pay for their skips
    slack_90: float = math.nan  # its 90 % quantile

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, NaN and infinity as None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def judge_joint(
    kl: Tensor,
    bound: Tensor,
    keep: Tensor,
    verdicts: dict[int, Verdict],
    alpha: float,
    tolerance: float = math.nan,
    level: float = 0.95,
    share: Tensor | None = None,
) -> Joint:
    """Calibrate kappa on the first half of the inputs, test its coverage on the second.

    Args:
        kl: (n) exact joint KL of each input under the frozen router.
        bound: (n) B of the same decisions.
        keep: bool (l n) the decisions.
        verdicts: of single layers.
        alpha: miscoverage of kappa * B.
        tolerance: nats per predicted token that one skip may cost; NaN leaves ``tolerated`` and the excess open.
        level: of the interval of the excess.
        share: (l n) share of an input's tokens that run a layer; default: what ``keep`` says.
    """
    if len(kl) < LEAST:
        raise DataError(
            f"judge_joint: expected at least {LEAST} inputs, got {len(kl)}: half of them calibrates kappa, half tests "
            "it; raise conditions.examples, or give the split more"
        )
    half = len(kl) // 2
    ratio = safe_ratio(kl.double(), bound.double())
    kappa = float(conformal_quantile(ratio[:half], alpha))
    covered = int((ratio[half:] <= kappa).sum())
    fresh = len(kl) - half
    skipped = ~keep
    allowed = torch.tensor([verdicts.get(layer) == "admissible" for layer in range(len(keep))])
    skips = skipped.double() if share is None else 1 - share.double()
    skipping = skips.sum(0) > 0
    paid = kl[half:] > 0
    slack = (kappa * bound[half:][paid].double() / kl[half:][paid].double()).quantile(_SLACK) if paid.any() else _NONE
    tolerated = tolerance * skips.sum(0)
    low, high = -math.inf, math.inf
    if math.isfinite(tolerance):
        excess = bootstrap_mean(kl.double() - tolerated, level)
        low, high = excess.low, excess.high
    return Joint(
        kl=float(kl.mean()),
        bound=float((kappa * bound).mean()) if math.isfinite(kappa) else math.inf,
        kappa=kappa,
        coverage=covered / fresh,
        coverage_p=beta_binomial_pvalue(covered, fresh, half, alpha) if math.isfinite(kappa) else math.nan,
        skips=int(skipped.sum()),
        admissible_skips=float(skips[allowed].sum() / skips.sum()) if skips.any() else math.nan,
        recall=float(skipped[allowed].float().mean()) if allowed.any() else math.nan,
        n=len(kl),
        skips_per_input=float(skips.sum(0).mean()),
        tolerated=float(tolerated.mean()),
        excess_low=low,
        excess_high=high,
        spearman=spearman(bound[skipping], kl[skipping]),
        slack_median=float(slack[0]),
        slack_90=float(slack[1]),
    )


@dataclass(frozen=True)
class Conclusion:
    """Hold the verdict on a run's real decisions, and the reasons, a sentence each."""

    verdict: Conclusive
    reasons: tuple[str, ...]


def conclude(joint: Joint, skips: dict[int, SkipFinding], tolerance: float, alpha: float) -> Conclusion:
    """Say of a frozen router's decisions on fresh inputs whether the theory's conditions hold.

    They do not hold if one of these is clear:

    1. the calibrated bound covers fewer inputs than it promises (rejected at 1 %);
    2. a layer's skips cost more than the tolerance, on the inputs for which they are made;
    3. all skips of an input together cost more than the tolerance for each of them.

    They hold if none of these is, and the opposite is shown: the bound was tested; some of the skips lie on layers
    that were found admissible; and together they cost no more than the tolerance for each. Whatever lies between is
    undecided: these inputs cannot show that the skips may be made.

    1 is a test of a calibrated statement; 2 and 3 are intervals over inputs (estimators). That 3 adds up what single
    skips may cost is a choice of what to tolerate [D], no bound: costs neither add up nor bound one another.

    Args:
        joint: of `judge_joint`, with a tolerance.
        skips: of `judge_skips`; layers that are held left out.
        tolerance: nats per predicted token that one skip may cost.
        alpha: miscoverage that the bound allows itself.
    """
    if not joint.skips_per_input:
        return Conclusion("hold", ("the routers skip nothing on these inputs",))
    against, open_ = [], []
    if math.isnan(joint.coverage_p):
        open_.append(
            f"the bound's coverage could not be tested: {joint.n} inputs are too few at alpha={alpha:g}, "
            f"{2 * smallest_sample(alpha)} are needed"
        )
    elif joint.coverage_p < REJECTED:
        against.append(
            f"the bound covers {joint.coverage:.0%} of fresh inputs, {1 - alpha:.0%} are promised "
            f"(p = {joint.coverage_p:.2g})"
        )
    for finding in skips.values():
        if finding.verdict == "inadmissible":
            against.append(f"{finding.sentence}, {tolerance:.3g} nats tolerated")
    if not joint.admissible_skips:
        open_.append(f"none of the {joint.skips} skips lies on a layer that was found admissible")
    together = (
        f"all skips of an input together cost {joint.kl:.3g} nats a token, {joint.tolerated:.3g} tolerated "
        f"({joint.skips_per_input:.1f} skips an input at {tolerance:.3g})"
    )
    if joint.excess_low > 0:
        against.append(together)
    elif not joint.excess_high <= 0:
        open_.append(f"{together}: too close to tell on {joint.n} inputs")
    if against:
        return Conclusion("do not hold", (*against, *open_))
    return Conclusion("undecided", tuple(open_)) if open_ else Conclusion("hold", (together,))


def _check(measured: LayerMeasures) -> None:
    if len(measured) < 2:
        raise DataError(f"conditions: expected at least 2 inputs, got {len(measured)}; raise conditions.examples")
    for name in ("cosine", "kl", "mass"):
        values = getattr(measured, name)
        if not values.isfinite().all():
            row, column = (~values.isfinite()).nonzero()[0].tolist()
            raise DataError(
                f"conditions: {name} of input {row} at layer {measured.layers[column]} is {values[row, column]}; "
                "the backbone's states are not finite there, or the routed token group is empty"
            )
