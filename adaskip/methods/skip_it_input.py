"""Skip-It by the input: layers that an input is forecast to hardly need are skipped, as many as the budget asks for."""

from __future__ import annotations

from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.policies.skip_it import SkipIt


def choose(evidence: Evidence, keep: float, seed: int) -> SkipIt:
    """Return the policy with the smallest limit that holds the budget, mean over inputs.

    Raises:
        ConfigError: every layer from the entry on is too few.
        DataError: too few inputs to fit a regression on.
    """
    forecast = evidence.forecast
    return forecast.policy(forecast.limit(evidence.savings, keep), evidence.model.target)


METHOD = Method(
    "skip_it_input",
    "Skip-It conditions, input by input",
    "arXiv 2509.25584",
    choose,
    phases=("both",),
    looks="states",
    ours="the cosine notion of every layer is forecast for an input from what the first quarter of the layers does to "
    "it, by ridge regression; one limit for all layers, which follows from the budget",
)
