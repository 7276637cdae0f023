"""lm-eval over a routed model: its routers look at the context of a question, never at the answer that is scored.

    import lm_eval
    from adaskip.harness import RoutedLM

    lm_eval.simple_evaluate(model=RoutedLM(model, tokenizer, batch_size=8), tasks=["hellaswag"])

lm-eval's own ``HFLM`` reads context, answer and padding in one pass, without saying which is which. Around
``model.backbone`` its routers would look at all three, and a score would depend on the answer and on the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel

try:
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("adaskip.harness needs lm-eval; type: pip install 'adaskip[eval]'") from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's own: the strings for its cache, the context's tokens, the scored tokens."""


class RoutedLM(HFLM):
    """Present a routed model to lm-eval: log-likelihoods, rolling ones, and generation.

    Args:
        model: what `adaskip.attach` returned, or the folder of saved routers.
        tokenizer: of the backbone, or its name; None: the one saved beside the backbone.
        **options: of lm-eval's ``HFLM``: batch_size, max_length, add_bos_token, ...
    """

    def __init__(self, model: RoutedModel | str | Path, tokenizer: Any = None, **options: Any) -> None:
        self.routed = model if isinstance(model, RoutedModel) else RoutedModel.from_pretrained(model)
        self.routed.eval()
        super().__init__(pretrained=self.routed.backbone, tokenizer=tokenizer, backend="causal", **options)
        self._device = self.routed.device

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # requests of one context that differ in the last token alone, such as A, B, C, D, share a forward pass
        passes: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_, context, scored) in enumerate(requests):
            passes.setdefault(self._cut(context, scored), []).append(number)
        rows = sorted(passes, key=lambda row: (-len(row[0]), row))  # longest first: memory lacks at once
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihoods")
        size = self._size(rows, override_bs)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            for row, logits in zip(batch, self._logits(batch), strict=True):
                for number in passes[row]:
                    strings, _, scored = requests[number]
                    results[number] = self._score(logits[row[1] - 1 : len(row[0])], scored)
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, results[number])
                    progress.update(1)
        progress.close()
        return results

    def _cut(self, context: list[int], scored: list[int]) -> tuple[tuple[int, ...], int]:
        """Return what the model reads and how many of its tokens are context; too long a context is cut on the left."""
        if not context or not scored or len(scored) > self.max_length:
            raise DataError(
                f"log-likelihood: expected a context and 1 to {self.max_length} scored tokens, got {len(context)} and "
                f"{len(scored)}; pass a larger max_length to RoutedLM, or shorten the answers"
            )
        # the last token is only predicted, so the model need not read it
        read = (context + scored)[-(self.max_length + 1) : -1]
        return tuple(read), len(read) - len(scored) + 1

    def _size(self, rows: list[tuple[tuple[int, ...], int]], override: int | None) -> int:
        """Return the number of rows in a batch."""
        if override is not None or self.batch_size != "auto":
            return override or int(self.batch_size)
        longest = list(rows[0][0]) if rows else [0]
        size: int = self._detect_batch_size([(None, longest, longest[:1])], 0)
        return size

    def _logits(self, rows: list[tuple[tuple[int, ...], int]]) -> Tensor:
        """Return the logits (b t v) of a batch whose routers look at each row's context alone."""
        width = max(len(read) for read, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        real, prompt = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (read, context) in enumerate(rows):  # padding on the right: nothing that is scored sees it
            ids[row, : len(read)] = torch.tensor(read)
            real[row, : len(read)] = 1
            prompt[row, :context] = True
        inputs = {"input_ids": ids, "attention_mask": real}
        if "mm_token_type_ids" in inspect.signature(type(self.routed.backbone).forward).parameters:
            inputs["mm_token_type_ids"] = torch.zeros_like(ids)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            logits: Tensor = self.routed(**inputs, prompt_mask=prompt.to(self.device), use_cache=False).logits
            return logits

    def _score(self, logits: Tensor, scored: list[int]) -> tuple[float, bool]:
        """Sum the scored tokens' log-probabilities, and return whether greedy decoding would have chosen them."""
        tokens = torch.tensor(scored, device=logits.device)
        chosen = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)[torch.arange(len(scored)), tokens]
        return float(chosen.sum()), bool((logits.argmax(-1) == tokens).all())

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        self._model: Any = self.routed  # whose generate checks the options that routing depends on
        try:
            tokens: Tensor = super()._model_generate(*args, **kwargs)
            return tokens
        finally:
            self._model = self.routed.backbone
