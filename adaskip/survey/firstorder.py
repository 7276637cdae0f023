"""Measure what a skip does to the logits to first order [D, link 8]: forward mode, or one backward pass for all layers.

    forward mode     J dh_l: how the logits move with the state after layer l; exact to first order, a pass a layer
    backward mode    (d log p(Y) / d something of layer l)^2, Y ~ p: all layers at once, noisy for a single input

In backward mode that something is the state after the layer (`score_products`), or the gate of the soft mix
``skipped + g_l (run - skipped)`` (`first_order`), whose gradient is the first-order change by the skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaskip.batch import Batch
from adaskip.errors import BackboneError, DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import Recorded
from adaskip.theory.costs import predicted

DRAWS = 2
"""Labels drawn of an input; constants hold only for slopes of as many draws as they were calibrated on."""


# -- forward mode ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logit_tangent(recorded: Recorded, layer: int, shift: Tensor) -> Tensor:
    """Return J dh: how the logits move, to first order, when the state after ``layer`` moves by ``shift``.

    One forward-mode product through the decoder's suffix; linear in ``shift``. (b t d) -> (k vocab), at the predicted
    tokens. An estimator of the real change; with s = std_p(J dh), s^2/2 estimates the KL (no bound).

    Args:
        recorded: a dense pass.
        layer: whose result moves.
        shift: by so much.

    Raises:
        BackboneError: an operation of this model has no forward-mode derivative.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        state = recorded.states[layer + 1]
        try:
            out = recorded.rerun_dense(layer + 1, forward_ad.make_dual(state, shift.to(state.dtype)))
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward-mode" not in str(error):
                raise
            raise BackboneError(
                f"{type(recorded.model.backbone).__name__}: an operation behind layer {layer} has no forward-mode "
                f"derivative ({error}); leave the first-order measure out, or load the model with "
                "attn_implementation='eager'"
            ) from error
        tangent = forward_ad.unpack_dual(out).tangent
    return torch.zeros_like(out) if tangent is None else tangent


# -- backward mode -----------------------------------------------------------------------------------------------------


def score_products(recorded: Recorded, shifts: list[Tensor], draws: int = 1, seed: int = 0) -> Tensor:
    """Return (grad_h log p(Y*) . dh)^2 per predicted token for all layers, one backward pass a draw. -> (b l).

    An unbiased estimator [D, link 8] of the mean over the predicted tokens of s_l^2 (nats^2), s_l the std of J dh_l
    under p. Still noisy for one input: average over inputs to rank layers.

    Args:
        recorded: a dense pass over prompts with answers.
        shifts: dh of every layer, (b t d) each: the state after the layer when it is skipped less the dense one.
        draws: label draws, each one backward pass.
        seed: of the draws.

    Raises:
        DataError: an input predicts nothing.
    """
    supervised = recorded.batch.supervised
    if not supervised.any(1).all():
        raise DataError("score_products: expected a supervised token in every input; collate with answers=True")
    # nothing before the state after layer 0 needs a gradient: the backward pass ends there
    after = [recorded.states[1].detach().requires_grad_()]
    with torch.enable_grad(), recorded.model.observe(lambda index, before, result: after.append(result)):
        log_p = recorded.rerun_dense(1, after[0]).double().log_softmax(-1)
    noise = torch.Generator(log_p.device).manual_seed(seed)
    total = torch.zeros(len(supervised), len(shifts), dtype=torch.float64, device=log_p.device)
    for slopes in draw_scores(log_p, after, draws, noise, _draw_by_weight):
        products = [(g.float() * dh.float()).sum((1, 2)) for g, dh in zip(slopes, shifts, strict=True)]
        total += torch.stack(products, 1).double() ** 2
    mean: Tensor = total / draws / supervised.sum(1, keepdim=True)
    return mean


def first_order(model: RoutedModel, batch: Batch, draws: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the dense logits, and s_l of every skip to first order: (b t v) and (b l), nats; estimator [D, link 8].

        s_l^2 = E_{Y ~ p} (d log p(Y) / d g_l)^2 at g = 1,  mean over the input's predicted tokens

    One soft pass with every gate open and a backward pass a draw price all layers at once. Noisy for a single input.

    Args:
        model: attached, with routers.
        batch: prompts with answers.
        draws: label draws, a backward pass each.
        noise: of the draws, on any device.
    """
    supervised = batch.supervised
    with torch.enable_grad(), model.keep_all(), model.soft():
        logits = model(**batch.arguments()).logits
        gates = model.gates()
        log_p = predicted(logits, supervised).double().log_softmax(-1)
    total = torch.zeros(len(supervised), len(gates), dtype=torch.float64, device=log_p.device)
    for slopes in draw_scores(log_p, gates, draws, noise, _draw_by_inversion):
        total += torch.stack(slopes, 1).double() ** 2
    return logits.detach(), (total / draws / supervised.sum(1, keepdim=True)).sqrt()


def first_order_of(model: RoutedModel, batches: Iterable[Batch], draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Return the s_l of `first_order` over batches: (n l), on the CPU."""
    noise = torch.Generator().manual_seed(seed)
    return torch.cat([first_order(model, batch, draws, noise)[1].cpu() for batch in batches])


def draw_scores(
    log_p: Tensor,
    variables: Sequence[Tensor],
    draws: int,
    noise: torch.Generator,
    draw: Callable[[Tensor, torch.Generator], Tensor],
) -> Iterator[tuple[Tensor, ...]]:
    """Draw a label for every predicted token and yield the gradients of their summed scores, once a draw.

        d / d variable of  sum_k sign_k sqrt(p(Y_k) / q(Y_k)) log p(Y_k),  Y_k ~ q of `label_law`

    The weight makes squares under q stand for squares under p. Signs at random let the mean of a squared sum be the sum
    of squares: products of different tokens cancel.

    Args:
        log_p: (k v) with a graph.
        variables: what it is differentiated by.
        draws: how often.
        noise: of labels and signs.
        draw: (k v) probabilities -> long (k 1) labels.
    """
    p, q = label_law(log_p)
    for after in reversed(range(draws)):
        label = draw(q, noise)
        sign = torch.randint(2, label.shape, generator=noise, device=noise.device).to(q) * 2 - 1
        weight = (p.gather(1, label) / q.gather(1, label).clamp_min(1e-300)).sqrt() * sign
        upstream = torch.zeros_like(p).scatter(1, label, weight)
        yield torch.autograd.grad(log_p, variables, upstream, retain_graph=after > 0)


def label_law(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return p, and the law q ~ p (1 - p) to draw labels from, (... v) each.

    Weighted by p / q such labels stand for p, and the sure label, whose gradient vanishes, is not drawn in vain.
    """
    log_p = log_p.detach()
    p = log_p.exp()
    q = p * -torch.expm1(log_p)
    q = torch.where(q.sum(-1, keepdim=True) > 0, q, p)  # p is one label: every score is 0
    return p, q / q.sum(-1, keepdim=True)


def _draw_by_weight(q: Tensor, noise: torch.Generator) -> Tensor:
    return torch.multinomial(q, 1, generator=noise)


def _draw_by_inversion(q: Tensor, noise: torch.Generator) -> Tensor:
    """Draw the same labels on every device: the noise may lie on another than the probabilities."""
    cut = torch.rand(len(q), 1, generator=noise, device=noise.device, dtype=torch.float32).to(q)
    return (q.cumsum(-1) < cut).sum(-1, keepdim=True).clamp(max=q.shape[-1] - 1)
