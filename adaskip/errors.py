"""Errors a user can act on: what was expected, what arrived, where, and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdaSkipError(Exception):
    """Unite all errors that adaskip raises on purpose; the CLI prints their text without a traceback and exits 2."""


class ConfigError(AdaSkipError, ValueError):
    """Say that a recipe, override or argument is wrong; the text lists all faults at once."""


class BackboneError(AdaSkipError):
    """Say that the model cannot be routed, or is not the one a router was trained on."""


class DataError(AdaSkipError):
    """Say that a batch or a data file does not hold what the configuration needs."""


class CheckpointError(AdaSkipError):
    """Say that files on disk are missing, damaged, or belong to something else."""


class MissingAttributeError(AdaSkipError, AttributeError):
    """Say that a tool looked for an attribute of a Hugging Face object on one of adaskip's own.

    Args:
        owner: the class of the object that lacks the attribute.
        name: of the attribute.
    """

    def __init__(self, owner: str, name: str) -> None:
        super().__init__(
            f"{owner} has no {name!r}, because it is no Hugging Face object: pass model.backbone, which follows the "
            "routing, to tools that expect one, such as pipeline; train routers with adaskip.RouterTuner instead of "
            "transformers.Trainer; for lm-eval use adaskip.harness.RoutedLM(model, tokenizer)"
        )


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return a short hint that names the closest valid word, or all valid words when none is close.

    >>> did_you_mean("kep", ["keep", "group"])
    "did you mean 'keep'?"
    >>> did_you_mean("zzz", ["keep", "group"])
    'valid: group, keep'
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
