"""The same scores straight from hidden states: one sweep over tiles of the vocabulary, never all the logits."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from loku.errors import InputError
from loku.losses.positions import Selection, select, widest
from loku.losses.scores import Extra, TokenScores, check_extras
from loku.losses.tiles import add_product, by_tile, default_tile, keeps_half, tiles

BLOCK = 64


def scores_from_hidden(
    hidden: Float[Tensor, "batch seq d"],
    labels: Int[Tensor, "batch seq"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    softcap: float | None = None,
    need: Collection[Extra] = (),
    tile: int | None = None,
) -> TokenScores:
    """Score the supervised positions of a batch from the hidden states that the LM head would turn into logits.

    With r_v = W_v . h + b_v the logits are z_v = r_v, or c tanh(r_v / c) with `softcap` c; s_v = dz_v / dr_v. One sweep
    over tiles of W keeps, for each position, a running maximum over v != y (it ends as z_m), the sum S of
    exp(z_v - z_m) and A = sum_{v != y} exp(z_v - z_m) s_v W_v, so that E_q[s W] = A / S. The gradients g of the scores
    then need no further product:

        dL/dh = g_spread E_q[s W] + g_target s_y W_y + (g_runner_up - g_spread) s_m W_m
                + g_mean_logit mean_v s_v W_v + g_expected_other E_q[s W]

    Two matrix products in all, or one where `hidden` needs no gradient, and N x (tile + d) memory for N supervised
    positions: padding and prompts cost nothing. A weight or bias that requires a gradient gets one by a second sweep,
    two products more; one that is frozen costs nothing. `mean_logit` of soft-capped logits takes a third product.
    `tile` is a number of vocabulary columns (default: `default_tile`). Half-precision inputs are widened tile by tile:
    rounded logits would change the runner-up.

    Values and gradients are those of `scores_from_logits`, to rounding. Second derivatives are not available.
    """
    chosen = select(labels)
    check_targets(chosen.targets, weight.shape[0])
    return scores_of_states(chosen.pick(hidden), chosen, weight, bias, softcap=softcap, need=need, tile=tile)


def check_targets(targets: Int[Tensor, " tokens"], vocab_size: int) -> None:
    """Raise InputError for targets that are no token of the vocabulary."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise InputError(
            f"A label lies outside the vocabulary of {vocab_size} tokens: they span "
            f"{int(targets.min())} to {int(targets.max())}.",
            "Check that the tokenizer belongs to the model; positions to ignore are -100.",
        )


def scores_of_states(
    states: Float[Tensor, "tokens d"],
    chosen: Selection,
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    softcap: float | None = None,
    need: Collection[Extra] = (),
    tile: int | None = None,
) -> TokenScores:
    """Do what `scores_from_hidden` does for states that were picked already; targets are not checked."""
    check_extras(need)
    if tile is None:
        tile = default_tile(weight.shape[1], weight.dtype, weight.device.type, chosen.targets.numel())
    if tile < 1:
        raise InputError(f"tile={tile} is not a number of vocabulary columns.", "Give a whole number of at least 1.")
    learns = torch.is_grad_enabled() and states.requires_grad
    narrow = keeps_half(states, weight)
    options = _Options(softcap, "mean_logit" in need, "expected_other" in need, tile, learns, narrow)
    target, runner_up, spread, mean_logit, expected_other = _Sweep.apply(states, weight, bias, chosen.targets, options)
    return TokenScores(
        target=target,
        runner_up=runner_up,
        spread=spread,
        targets=chosen.targets,
        sequence=chosen.sequence,
        batch_size=chosen.shape[0],
        vocab_size=weight.shape[0],
        mean_logit=mean_logit,
        expected_other=expected_other,
    )


@dataclass(frozen=True)
class _Options:
    softcap: float | None
    mean_logit: bool
    expected_other: bool
    tile: int
    learns: bool  # the hidden states need a gradient; a Function cannot see the caller's no_grad
    narrow: bool  # products stay in half precision: see tiles.keeps_half


def _floor(dtype: torch.dtype) -> float:
    """Return how far below the maximum a logit still counts: exp of less is nothing next to 1.

    Were it to underflow instead, one exponential and one product would take a hundred times as long (denormals).
    """
    return 0.75 * math.log(torch.finfo(dtype).tiny)


class _Sweep(torch.autograd.Function):
    """The sweep of `scores_from_hidden`, with its closed-form gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "tokens d"],
        weight: Float[Tensor, "vocab d"],
        bias: Float[Tensor, " vocab"] | None,
        targets: Int[Tensor, " tokens"],
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        # Autocast would round the logits to half precision.
        with torch.autocast(states.device.type, enabled=False):
            h = states.to(widest(states, weight)).contiguous()
            swept = _finish(_sweep(h, weight, bias, targets, options), h, weight, bias, targets, options)
        ctx.options = options
        ctx.save_for_backward(
            states if any(ctx.needs_input_grad[1:3]) else None,
            weight,
            bias,
            targets,
            swept.choice,
            swept.target,
            swept.runner_up,
            swept.spread,
            swept.expected_weight,
            swept.mean_weight,
            swept.label_rows,
            swept.choice_rows,
        )
        ctx.set_materialize_grads(False)
        ctx.dtype = states.dtype
        return swept.target, swept.runner_up, swept.spread, swept.mean_logit, swept.expected_other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, choice, target, runner_up, spread, *rows = ctx.saved_tensors
        expected_weight, mean_weight, label_rows, choice_rows = rows
        softcap = ctx.options.softcap
        zero = torch.zeros_like(target)
        g_target, g_runner_up, g_spread, g_mean, g_expected = (zero if g is None else g for g in grads)
        # What the raw logits of the others (times q), of the label and of the runner-up receive.
        g_others = g_spread + g_expected
        g_label = g_target * _slope(target, softcap)
        g_choice = (g_runner_up - g_spread) * _slope(runner_up, softcap)
        d_states = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_states = expected_weight * g_others.unsqueeze(1)
            d_states.addcmul_(label_rows, g_label.unsqueeze(1))
            d_states.addcmul_(choice_rows, g_choice.unsqueeze(1))
            if mean_weight is not None:
                d_states.addcmul_(mean_weight, g_mean.unsqueeze(1))
            d_states = d_states.to(ctx.dtype)
        if states is not None:
            g = _Gradients(g_others * torch.exp(-spread), g_label, g_choice, g_mean / weight.shape[0])
            d_weight, d_bias = _weight_gradient(states, weight, bias, targets, choice, runner_up, g, ctx.options)
        wanted = ctx.needs_input_grad
        return d_states, d_weight if wanted[1] else None, d_bias if wanted[2] else None, None, None


def _slope(z: Tensor, softcap: float | None) -> Tensor | float:
    return 1.0 if softcap is None else 1 - (z / softcap).square()


@dataclass
class _Sums:
    """What the sweep keeps of each position; e_v = exp(z_v - peak), and every sum over v != y but the last two."""

    peak: Float[Tensor, " tokens"]  # max z_v
    choice: Int[Tensor, " tokens"]  # its token
    sums: Float[Tensor, " tokens"]  # sum of e_v
    weighted: Float[Tensor, " tokens"] | None  # sum of e_v z_v
    blend: Float[Tensor, "tokens d"] | None  # A, the sum of e_v s_v W_v
    total: Float[Tensor, " tokens"] | None  # sum of z_v over the whole vocabulary
    total_weight: Float[Tensor, "*tokens d"] | None  # sum of s_v W_v over the whole vocabulary


def _sweep(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options) -> _Sums:
    d = weight.shape[1]
    rows = torch.arange(h.shape[0], device=h.device)
    floor = _floor(h.dtype)
    # The label is masked with a large finite number, under a maximum that starts lower still: no inf - inf and no
    # 0 * inf anywhere, even when the first tile holds nothing but the label.
    masked = torch.finfo(h.dtype).min / 2
    sums = h.new_zeros(h.shape[0])
    peak, choice = torch.full_like(sums, -torch.inf), torch.zeros_like(targets)
    total = torch.zeros_like(sums) if options.mean_logit else None
    weighted = torch.zeros_like(sums) if options.expected_other else None
    blend = h.new_zeros(h.shape[0], d) if options.learns else None  # A
    total_weight = None
    if options.mean_logit and options.learns:
        total_weight = h.new_zeros(d) if options.softcap is None else torch.zeros_like(h)
    for tile in tiles(h, weight, bias, options.softcap, options.tile, options.narrow):
        z = tile.logits
        if total is not None:
            total += z.sum(dim=1)
        place = (targets - tile.start).unsqueeze(1)  # not a list of this tile's labels: it would hold up a GPU
        inside = (place >= 0) & (place < z.shape[1])
        place.clamp_(0, z.shape[1] - 1)
        z.scatter_(1, place, z.gather(1, place).masked_fill_(inside, masked))
        # The maximum by blocks: torch's argmax over a whole row costs ten times as much as amax.
        width = BLOCK if z.shape[1] % BLOCK == 0 else z.shape[1]
        blocks = z.view(z.shape[0], z.shape[1] // width, width)
        block = blocks.amax(dim=2).argmax(dim=1)
        highest, column = blocks[rows, block].max(dim=1)
        choice = torch.where(highest > peak, tile.start + block * width + column, choice)
        raised = torch.maximum(peak, highest)
        shrink = torch.exp(peak - raised)
        peak = raised
        torch.maximum(z, (peak + floor).unsqueeze(1), out=z)
        # An in-place exponential, unless the logits are needed next to it.
        e = (z.sub_(peak.unsqueeze(1)) if weighted is None else z - peak.unsqueeze(1)).exp_()
        sums.mul_(shrink).add_(e.sum(dim=1))
        if weighted is not None:
            weighted.mul_(shrink).add_(torch.einsum("nt,nt->n", e, z))
        if blend is not None:
            if tile.slope is not None:
                e.mul_(tile.slope)
            add_product(blend.mul_(shrink.unsqueeze(1)), e, tile.weight)
        if total_weight is not None:
            if tile.slope is None:
                total_weight += tile.weight.sum(dim=0, dtype=h.dtype)
            else:
                add_product(total_weight, tile.slope, tile.weight)
    return _Sums(peak, choice, sums, weighted, blend, total, total_weight)


@dataclass
class _Swept:
    target: Float[Tensor, " tokens"]
    runner_up: Float[Tensor, " tokens"]
    spread: Float[Tensor, " tokens"]
    choice: Int[Tensor, " tokens"]  # the runner-up's token
    mean_logit: Float[Tensor, " tokens"] | None
    expected_other: Float[Tensor, " tokens"] | None
    expected_weight: Float[Tensor, "tokens d"] | None  # E_q[s W]
    mean_weight: Float[Tensor, "*tokens d"] | None  # mean of s_v W_v
    label_rows: Float[Tensor, "tokens d"] | None  # W_y
    choice_rows: Float[Tensor, "tokens d"] | None  # W_m


def _finish(swept: _Sums, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options) -> _Swept:
    """Turn sums into scores.

    The two logits that matter most are made again, by a sum that rounds less than a matrix product: this halves the
    error of the gradient. The sums hold the runner-up with its rounded logit, as exp(0) = 1, and are corrected.
    """
    choice, peak, sums, weighted, blend = swept.choice, swept.peak, swept.sums, swept.weighted, swept.blend
    label_rows, choice_rows = weight[targets], weight[choice]
    target, _ = _logit(h, label_rows, None if bias is None else bias[targets], options.softcap)
    runner_up, slope = _logit(h, choice_rows, None if bias is None else bias[choice], options.softcap)
    shrink = torch.exp(peak - runner_up)
    sums.mul_(shrink).add_(1 - shrink)
    if weighted is not None:
        weighted.mul_(shrink).add_(runner_up - peak * shrink)
    if blend is not None:
        blend.mul_(shrink.unsqueeze(1)).addcmul_(choice_rows, ((1 - shrink) * slope).unsqueeze(1))
        blend.div_(sums.unsqueeze(1))
    vocab = weight.shape[0]
    return _Swept(
        target=target,
        runner_up=runner_up,
        spread=sums.log(),
        choice=choice,
        mean_logit=None if swept.total is None else swept.total / vocab,
        expected_other=None if weighted is None else weighted / sums,
        expected_weight=blend,
        mean_weight=None if swept.total_weight is None else swept.total_weight / vocab,
        label_rows=label_rows if options.learns else None,
        choice_rows=choice_rows if options.learns else None,
    )


def _logit(
    h: Float[Tensor, "tokens d"], rows: Float[Tensor, "tokens d"], offset: Tensor | None, softcap: float | None
) -> tuple[Float[Tensor, " tokens"], Tensor | float]:
    """Return each position's logit for its own row of the weights, and its slope."""
    z = (h * rows).sum(dim=1)
    if offset is not None:
        z += offset
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z, _slope(z, softcap)


@dataclass
class _Gradients:
    """With respect to the raw logits; exp(z_v - z_m) times `others`, and both it and `every` times the slope."""

    others: Float[Tensor, " tokens"]
    label: Float[Tensor, " tokens"]
    choice: Float[Tensor, " tokens"]
    every: Float[Tensor, " tokens"]


def _weight_gradient(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    choice: Tensor,
    runner_up: Float[Tensor, " tokens"],
    g: _Gradients,
    options: _Options,
) -> tuple[Float[Tensor, "vocab d"], Float[Tensor, " vocab"] | None]:
    """Return the gradients of weight and bias: the logits again tile by tile, dW_tile = G_tile^T h."""
    h = states.to(widest(states, weight)).contiguous()
    floor = _floor(h.dtype)
    d_weight = torch.empty_like(weight)
    d_bias = None if bias is None else torch.empty_like(bias)
    labels_in, choices_in = (by_tile(tokens, weight.shape[0], options.tile) for tokens in (targets, choice))
    swept = tiles(h, weight, bias, options.softcap, options.tile, options.narrow)
    for tile, labels, choices in zip(swept, labels_in, choices_in, strict=True):
        z = tile.logits.sub_(runner_up.unsqueeze(1)).clamp_(min=floor).exp_().mul_(g.others.unsqueeze(1))
        if tile.slope is not None:
            z.mul_(tile.slope)
        # The label first overwrites what is no member of q, and may have overflowed.
        z[labels, targets[labels] - tile.start] = g.label[labels]
        z[choices, choice[choices] - tile.start] += g.choice[choices]
        if options.mean_logit:
            every = g.every.unsqueeze(1)
            z.add_(every if tile.slope is None else every * tile.slope)
        if d_weight.dtype == h.dtype:
            torch.mm(z.T, h, out=d_weight[tile.start : tile.stop])
        else:
            d_weight[tile.start : tile.stop] = z.T @ h
        if d_bias is not None:
            d_bias[tile.start : tile.stop] = z.sum(dim=0)
    return d_weight, d_bias
