"""What methods of the field are called; light, so that a recipe is read without what methods need."""

from __future__ import annotations

from typing import Literal, get_args

Name = Literal[
    "none",
    "random",
    "uniform",
    "unified",
    "late_entry",
    "early_exit",
    "block_influence",
    "relative_change",
    "attention_mass",
    "skip_it_input",
    "fastv",
    "pyramid_drop",
    "skip_vision",
    "skip_it",
    "shortv",
    "greedy",
    "gm_skip",
    "ada_skip",
    "knapspec",
    "greedy_halves",
]
METHODS: tuple[Name, ...] = get_args(Name)
"""One module of this folder a method, which holds it under ``METHOD``; in the order of what they look at."""
