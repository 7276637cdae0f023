"""From what a skip does to the states to what it costs: bounds, identities and estimators as pure functions.

"Link" names a step of this chain, as docs/theory.md numbers them: the geometry of states, the shift of the logits, KL,
and from KL to accuracy and information.

Z are dense logits, p = softmax(Z); Z' and p' the same after skipping; dz = Z' - Z; KL = KL(p, p'), always in nats.
The notions named geometric, proximal, functional and informational are the paper's [P]; every formula is ours [D], and
docs/theory.md proves it. "Real" arguments are tensors or floats that broadcast. Results are float64 unless a docstring
says otherwise.
"""

from adaskip.theory.bounds.certificates import argmax_certified_kl, argmax_certified_margin, argmax_kl_limit
from adaskip.theory.bounds.compose import compose, gate_matrix, joint_quadratic, joint_shift, redundancy_bound
from adaskip.theory.bounds.fisher import fisher_form
from adaskip.theory.bounds.geometry import cosine_band, distance_sq, geometric_from_proximal, proximal_from_geometric
from adaskip.theory.bounds.information import fano, information_lost
from adaskip.theory.bounds.keys import key_removal
from adaskip.theory.bounds.logits import (
    LogitShift,
    kl_bennett,
    kl_exact,
    kl_for_accuracy,
    kl_lower,
    kl_quadratic,
    kl_range,
    kl_sequence,
    kl_two_point,
    logit_shift,
    risk_shift,
    tv_from_kl,
    tv_from_range,
)

__all__ = [
    "LogitShift",
    "argmax_certified_kl",
    "argmax_certified_margin",
    "argmax_kl_limit",
    "compose",
    "cosine_band",
    "distance_sq",
    "fano",
    "fisher_form",
    "gate_matrix",
    "geometric_from_proximal",
    "information_lost",
    "joint_quadratic",
    "joint_shift",
    "key_removal",
    "kl_bennett",
    "kl_exact",
    "kl_for_accuracy",
    "kl_lower",
    "kl_quadratic",
    "kl_range",
    "kl_sequence",
    "kl_two_point",
    "logit_shift",
    "proximal_from_geometric",
    "redundancy_bound",
    "risk_shift",
    "tv_from_kl",
    "tv_from_range",
]
