"""The demo backbone `digits-vlm`: a LLaVA of three million parameters in a standard Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

EMBEDDED = "digits-vlm"
"""In a recipe, as `backbone.path` this model, as `data.source` its questions."""
FOLDER: Path = Path(__file__).parent / EMBEDDED


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the model (float32, eval mode) and its processor from `FOLDER`, without a network."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
