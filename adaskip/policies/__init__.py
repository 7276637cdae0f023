"""Every way to choose what is skipped, one file a method: ``adaskip.policies.Learned(...)``, ``.Static(...)``.

`Policy` and `register` are what a method of your own needs: docs/policies.md has one in twenty lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaskip.policies.delask import DeLask as DeLask
    from adaskip.policies.fastv import FastV as FastV
    from adaskip.policies.learned.routers import Learned as Learned
    from adaskip.policies.path_bank import PathBank as PathBank
    from adaskip.policies.pyramid_drop import PyramidDrop as PyramidDrop
    from adaskip.policies.skip_it import SkipIt as SkipIt
    from adaskip.policies.skip_vision import SkipVision as SkipVision
    from adaskip.policies.static import Static as Static
    from adaskip.policy import Policy as Policy
    from adaskip.policy import find as find
    from adaskip.policy import kinds as kinds
    from adaskip.policy import register as register


def __getattr__(name: str) -> Any:
    from adaskip import policy

    if name in ("Policy", "register", "find", "kinds"):
        return getattr(policy, name)
    homes = {home.split(":")[1]: kind for kind, home in policy.HOMES.items()}
    if name in homes:
        return policy.find(homes[name])
    known = ", ".join(["Policy", "register", "find", "kinds", *homes])
    raise AttributeError(f"module 'adaskip.policies' has no attribute {name!r}; it has {known}")
