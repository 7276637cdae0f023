"""Save one path's layers as an ordinary Hugging Face model, which any server of such models reads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from adaskip.backbone.load import load_backbone
from adaskip.backbone.probe import dense_pass
from adaskip.errors import AdaSkipError, BackboneError
from adaskip.generate.cut import cut
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.card import write_cut_card
from adaskip.runtime.description import CARD
from adaskip.sources import model_name

_CLOSE = 1e-3
"""How far logits may differ, of the largest: another attention kernel may be loaded."""


def save_plain(model: RoutedModel, folder: Path, processor: Any = None) -> PreTrainedModel:
    """Cut a plan's layers out, merge adapters, and save what is left with its processor; return it.

    What was written is loaded again, and must answer the same: a configuration that cannot say which layers are left
    would give a model with others.

    Args:
        model: with a policy that leaves the same layers out for every input (`adaskip.cut`).
        folder: new or empty.
        processor: or tokenizer; None: none is saved.

    Raises:
        BackboneError: what is left cannot be written as a model of the backbone's class, or the path cannot be cut.
        ConfigError: the model's policy knows no path beforehand.
    """
    plain = cut(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written = Path(scratch)
        plain.save_pretrained(written)
        if processor is not None:
            processor.save_pretrained(written)
        (written / CARD).write_text(_card(model), encoding="utf-8")
        _check_readable(plain, written)
        folder.mkdir(exist_ok=True)
        for path in written.iterdir():
            shutil.move(path, folder / path.name)
    return plain


def _card(model: RoutedModel) -> str:
    assert model.runtime.known is not None
    kept = model.runtime.known.tolist()
    name = model_name(model.backbone.config._name_or_path)
    return write_cut_card(name, kept, model.adapters is not None, model.facts)


def _check_readable(plain: PreTrainedModel, folder: Path) -> None:
    """Load what was written, and compare on plain tokens.

    Raises:
        BackboneError: it cannot be loaded, or answers otherwise.
    """
    name = type(plain).__name__
    try:
        read = load_backbone(str(folder), dtype=plain.dtype).eval()
        read.to(device=plain.device)
        found = dense_pass(read).logits
    except (AdaSkipError, RuntimeError, TypeError) as error:
        raise BackboneError(
            f"{name}: with fewer layers it cannot be loaded again ({error}); ship the routers instead: adaskip export, "
            "without --cut"
        ) from error
    wanted = dense_pass(plain).logits
    if not (found - wanted).abs().max() <= _CLOSE * wanted.abs().max():
        raise BackboneError(
            f"{name}: loaded again, its logits differ by {float((found - wanted).abs().max()):.2g} on plain tokens, so "
            "its configuration does not say which layers are left; ship the routers instead: adaskip export, without "
            "--cut"
        )
