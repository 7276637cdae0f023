"""What a skip does to the logits to first order [D, link 8]: forward-mode products; one backward pass to rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaskip.batch import Batch
from adaskip.errors import BackboneError, DataError
from adaskip.runtime.attach import RoutedModel

DRAWS = 2
"""Labels drawn of an input; constants hold only for slopes of as many draws as they were calibrated on."""


def label_law(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """p, and the law q ~ p (1 - p) to draw labels from, (... v) each.

    Weighted by p / q such labels stand for p, and the sure label, whose gradient vanishes, is not drawn in vain.
    """
    log_p = log_p.detach()
    p = log_p.exp()
    q = p * -torch.expm1(log_p)
    q = torch.where(q.sum(-1, keepdim=True) > 0, q, p)  # p is one label: every score is 0
    return p, q / q.sum(-1, keepdim=True)


@torch.no_grad()
def logit_tangent(model: RoutedModel, batch: Batch, states: list[Tensor], layer: int, shift: Tensor) -> Tensor:
    """J dh: how the logits move, to first order, when the state after ``layer`` moves by ``shift``.

    One forward-mode product through the decoder's suffix; linear in ``shift``. (b t d) -> (b t vocab). An estimator of
    the real change; with s = std_p(J dh), s^2/2 estimates the KL (no bound).

    Args:
        model: attached.
        batch: as `Collator` makes it.
        states: before layer 0, then after every layer of the dense pass, as `RoutedModel.replay` takes them.
        layer: whose result moves.
        shift: by so much.

    Raises:
        BackboneError: an operation of this model has no forward-mode derivative.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), model.dense():
        moving = forward_ad.make_dual(states[layer + 1], shift.to(states[layer + 1].dtype))
        try:
            with model.replay([*states[: layer + 1], moving]):
                out = model(**batch.arguments()).logits
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward-mode" not in str(error):
                raise
            raise BackboneError(
                f"{type(model.backbone).__name__}: an operation behind layer {layer} has no forward-mode derivative "
                f"({error}); leave the first-order measure out, or load the model with attn_implementation='eager'"
            ) from error
        tangent = forward_ad.unpack_dual(out).tangent
    return torch.zeros_like(out) if tangent is None else tangent


def score_products(
    model: RoutedModel, batch: Batch, states: list[Tensor], shifts: list[Tensor], draws: int = 1, seed: int = 0
) -> Tensor:
    """(grad_h log p(Y*) . dh)^2 per predicted token for all layers at once, one backward pass a draw. -> (b l).

    An unbiased estimator [D, link 8] of the mean over the predicted tokens of s_l^2 (nats^2), s_l the std of J dh_l
    under p. Labels are drawn from `label_law`, and tokens get random signs, so that squares of their sum add up. Still
    noisy for one input: average over inputs to rank layers.

    Args:
        model: attached.
        batch: with labels, -100 where nothing is predicted.
        states: before layer 0, then after every layer of the dense pass.
        shifts: dh of every layer, (b t d) each: the state after the layer when it is skipped less the dense one.
        draws: label draws, each one backward pass.
        seed: of the draws.

    Raises:
        DataError: an input predicts nothing.
    """
    where = batch.supervised
    if not where.any(1).all():
        raise DataError("score_products: expected a supervised token in every input; collate with answers=True")
    first = states[1].detach().requires_grad_()
    reached = [first]
    with torch.enable_grad(), model.dense(), model.observe(lambda index, before, after: reached.append(after)):
        with model.replay([states[0], first]):
            logits = model(**batch.arguments()).logits
        log_p = logits[:, :-1][where].double().log_softmax(-1)
    draw = torch.Generator(log_p.device).manual_seed(seed)
    p, q = label_law(log_p)
    total = torch.zeros(len(where), len(shifts), dtype=torch.float64, device=log_p.device)
    for left in reversed(range(draws)):
        labels = torch.multinomial(q, 1, generator=draw)
        weight = (p.gather(1, labels) / q.gather(1, labels)).sqrt()
        sign = torch.randint(2, weight.shape, generator=draw, device=weight.device) * 2 - 1
        upstream = torch.zeros_like(p).scatter(1, labels, weight * sign)
        slopes = torch.autograd.grad(log_p, reached, upstream, retain_graph=left > 0)
        products = [(g.float() * dh.float()).sum((1, 2)) for g, dh in zip(slopes, shifts, strict=True)]
        total += torch.stack(products, 1).double() ** 2
    mean: Tensor = total / draws / where.sum(1, keepdim=True)
    return mean


def first_order(model: RoutedModel, batch: Batch, draws: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """The dense logits, and s_l of every skip to first order: (b t v) and (b l), nats; estimator [D, link 8].

        s_l^2 = E_{Y ~ p} (d log p(Y) / d g_l)^2 at g = 1,  mean over the input's predicted tokens

    In the soft mix ``left + g_l (run - left)`` the gate's gradient is the first-order change by the skip, so that one
    pass with every gate open and a backward pass a draw price all layers at once. Labels are drawn from q ~ p (1 - p),
    weighted by p / q, with random signs, so that squares of sums over tokens add up. Noisy for a single input.

    Args:
        model: attached, with routers.
        batch: prompts with answers.
        draws: label draws, a backward pass each.
        noise: of the draws, on any device.
    """
    where = batch.supervised
    with torch.enable_grad(), model.keep_all(), model.soft():
        logits = model(**batch.arguments()).logits
        gates = model.gates()
        log_p = logits[:, :-1][where].double().log_softmax(-1)
    p, q = label_law(log_p)
    total = torch.zeros(len(where), len(gates), dtype=torch.float64, device=log_p.device)
    for left in reversed(range(draws)):
        cut = torch.rand(len(q), 1, generator=noise, device=noise.device, dtype=torch.float32).to(q)
        label = (q.cumsum(-1) < cut).sum(-1, keepdim=True).clamp(max=q.shape[-1] - 1)
        sign = torch.randint(2, label.shape, generator=noise, device=noise.device).to(q) * 2 - 1
        weight = (p.gather(1, label) / q.gather(1, label).clamp_min(1e-300)).sqrt() * sign
        slopes = torch.autograd.grad(log_p, gates, torch.zeros_like(p).scatter(1, label, weight), retain_graph=left > 0)
        total += torch.stack(slopes, 1).double() ** 2
    return logits.detach(), (total / draws / where.sum(1, keepdim=True)).sqrt()


def first_order_of(model: RoutedModel, batches: Iterable[Batch], draws: int = DRAWS, seed: int = 0) -> Tensor:
    """`first_order` over batches: (n l), on the CPU."""
    noise = torch.Generator().manual_seed(seed)
    return torch.cat([first_order(model, batch, draws, noise)[1].cpu() for batch in batches])
