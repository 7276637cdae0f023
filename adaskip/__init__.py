"""Teach a frozen transformer which of its layers an input does not need, and really leave that work out.

    import adaskip
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")
    adaskip.profile(base, batches).to_dict()                             # redundancy per layer; no training
    model = adaskip.attach(base, adaskip.RouterConfig(group="vision"))   # one router per decoder layer
    tuner = adaskip.RouterTuner(model, adaskip.Objective(keep=0.6), calibration=held_out)  # a LightningModule
    lightning.Trainer(callbacks=[adaskip.ConditionCheck(every=50)]).fit(tuner, train, validation)
    model.save_pretrained("out/router")                                  # the routers only
    model = adaskip.RoutedModel.from_pretrained("out/router")            # finds and checks its backbone
    ids = model.generate(**inputs, max_new_tokens=64)                    # skipped layers are not computed
    print(model.routing.keep_rate)                                       # executed over dense decoder FLOPs
    with model.dense(): ...                                              # exactly the original model

What `adaskip VERB` does on the command line is a function of the same name; each returns a dataclass with ``to_dict``:

    adaskip.train("digits-vlm", {"objective.keep": 0.5})                 # a recipe's name, file or object
    adaskip.evaluate("runs/digits-vlm").mean["routed_accuracy"]          # then check, calibrate, heal, compare, export

Names are loaded when they are first used; importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaskip.version import __version__ as __version__

if TYPE_CHECKING:
    from adaskip import policies as policies
    from adaskip.batch import Batch as Batch
    from adaskip.errors import AdaSkipError as AdaSkipError
    from adaskip.generate.cut import cut as cut
    from adaskip.plan import Routing as Routing
    from adaskip.plan import SkipPlan as SkipPlan
    from adaskip.plan import Target as Target
    from adaskip.policies.learned.config import RouterConfig as RouterConfig
    from adaskip.runtime.adapters import adapt as adapt
    from adaskip.runtime.attach import RoutedModel as RoutedModel
    from adaskip.runtime.attach import attach as attach
    from adaskip.runtime.lora import Lora as Lora
    from adaskip.runtime.patch import detach as detach
    from adaskip.survey.profile import profile as profile
    from adaskip.training.batches import RoundBatches as RoundBatches
    from adaskip.training.callbacks import ConditionCheck as ConditionCheck
    from adaskip.training.collate import Collator as Collator
    from adaskip.training.healing import AdapterTuner as AdapterTuner
    from adaskip.training.module import RouterTuner as RouterTuner
    from adaskip.training.objective import Objective as Objective
    from adaskip.verbs.budget import hold_budget as hold_budget
    from adaskip.verbs.calibrate import calibrate as calibrate
    from adaskip.verbs.check import check as check
    from adaskip.verbs.compare import compare as compare
    from adaskip.verbs.data import data as data
    from adaskip.verbs.evaluate import evaluate as evaluate
    from adaskip.verbs.export import export as export
    from adaskip.verbs.heal import heal as heal
    from adaskip.verbs.train import train as train


_HOMES = {
    "AdapterTuner": "training.healing",
    "AdaSkipError": "errors",
    "Batch": "batch",
    "Collator": "training.collate",
    "ConditionCheck": "training.callbacks",
    "Lora": "runtime.lora",
    "Objective": "training.objective",
    "RoundBatches": "training.batches",
    "RoutedModel": "runtime.attach",
    "RouterConfig": "policies.learned.config",
    "RouterTuner": "training.module",
    "Routing": "plan",
    "SkipPlan": "plan",
    "Target": "plan",
    "adapt": "runtime.adapters",
    "attach": "runtime.attach",
    "calibrate": "verbs.calibrate",
    "check": "verbs.check",
    "compare": "verbs.compare",
    "cut": "generate.cut",
    "data": "verbs.data",
    "detach": "runtime.patch",
    "evaluate": "verbs.evaluate",
    "export": "verbs.export",
    "heal": "verbs.heal",
    "hold_budget": "verbs.budget",
    "profile": "survey.profile",
    "train": "verbs.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "policies":
        return import_module("adaskip.policies")
    if name not in _HOMES:
        raise AttributeError(f"module 'adaskip' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"adaskip.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
