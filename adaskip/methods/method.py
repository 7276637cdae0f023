"""What a method is: where it is from, what it can leave out, and the policy that it makes for a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from adaskip.errors import ConfigError, did_you_mean
from adaskip.methods.evidence import Evidence
from adaskip.methods.names import METHODS
from adaskip.plan import KV, Group, Phase, SkipPlan
from adaskip.policy import Policy
from adaskip.sites import Unit
from adaskip.survey.greedy import Path

Rule = Callable[[Evidence, float, int], Path | Policy]
"""Choose the layers that go for every input, or a policy, from evidence, for a keep rate and with a seed.

Raises `ConfigError` where no choice of the method keeps so little.
"""


@dataclass(frozen=True)
class Method:
    """Describe one method, and make its policies.

    Args:
        name: by which it is asked for.
        title: what it is called.
        source: where it was published.
        choose: its rule.
        groups: the token groups whose layers it can leave out.
        kv: whether keys of vision tokens that leave are kept.
        unit: what of a layer it leaves out.
        phases: of reading and generating, when its choice may leave.
        looks: what of the inputs it looks at: ``nothing``, ``states`` (a dense pass), ``costs`` (reruns) or ``answers``
            (the data's own: it needs labels).
        draws: whether its choice depends on a seed.
        ours: what is ours where the published text leaves a gap; empty: nothing.
    """

    name: str
    title: str
    source: str
    choose: Rule
    groups: tuple[Group, ...] = ("all", "vision")
    kv: KV = "absent"
    unit: Unit = "block"
    phases: tuple[Phase, ...] = ("both", "prefill", "decode")
    looks: str = "nothing"
    draws: bool = False
    ours: str = ""

    def empty(self, group: Group, phase: Phase = "both") -> SkipPlan:
        """Return the plan that leaves out nothing yet: what evidence for the method is measured under.

        Raises:
            ConfigError: the method has nothing to say of this group or phase.
        """
        if group not in self.groups:
            raise ConfigError(
                f"method {self.name}: expected group {' or '.join(self.groups)}, got {group!r}; {self.title} speaks of "
                "no other tokens"
            )
        if phase not in self.phases:
            raise ConfigError(f"method {self.name}: expected phase {' or '.join(self.phases)}, got {phase!r}")
        return SkipPlan(group=group, kv=self.kv if group == "vision" else "absent", unit=self.unit, phase=phase)

    def policy(self, evidence: Evidence, keep: float, seed: int = 0) -> SkipPlan | Policy:
        """Return the policy of least skipping that holds a budget, mean over the evidence's inputs.

        Args:
            evidence: of a model attached with `empty`.
            keep: executed over dense decoder FLOPs, in (0, 1].
            seed: of what the method draws.

        Raises:
            ConfigError: the method has nothing to say of this group or phase, or no choice of it keeps so little.
        """
        target = evidence.model.target
        empty = self.empty(evidence.group, target.phase)
        for name in ("kv", "unit"):
            if (got := getattr(target, name)) != (expected := getattr(empty, name)):
                raise ConfigError(
                    f"method {self.name}: expected evidence of {name}={expected!r}, got {got!r}; "
                    f"attach find({self.name!r}).empty({empty.group!r})"
                )
        chosen = self.choose(evidence, keep, seed)
        return chosen if isinstance(chosen, Policy) else replace(empty, skip=tuple(evidence.model.sites.labels(chosen)))

    def to_dict(self) -> dict[str, Any]:
        """Return what it is, JSON-ready."""
        return {
            "method": self.name,
            "title": self.title,
            "source": self.source,
            "groups": list(self.groups),
            "kv": self.kv,
            "unit": self.unit,
            "looks": self.looks,
            "draws": self.draws,
            "ours": self.ours,
        }


def find(name: str) -> Method:
    """Return a method by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: no such method, {did_you_mean(str(name), METHODS)}")
    method: Method = import_module(f"adaskip.methods.{name}").METHOD
    return method
