"""Gradient norms of examples, for the membership attack by that name. Costs a backward pass per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.errors import InputError
from loku.evaluation.cache import BatchCache
from loku.evaluation.modes import evaluating
from loku.evaluation.sharing import gathered, own_share


def gradient_norms(
    model: nn.Module,
    examples: Sequence[Example],
    answers: Sequence[slice],
    *,
    p: float = 2.0,
    cache: BatchCache | None = None,
) -> list[float]:
    """Return each example's gradient norm: the mean, over weight tensors, of the p-norm of d(loss)/d(tensor).

    loss = -mean log p over the supervised tokens that `answers` selects (the answer without the end of sequence), as
    in open-unlearning's `mia_gradnorm` (p = 2), but with dropout off. Every weight tensor of a float type counts,
    trainable or not; those that the loss does not reach do not. The processes share the examples, and `cache` keeps
    each norm. The model's gradients and `requires_grad` are left as they were. Raises InputError for a
    model without any such tensor.
    """
    weights = [item for item in model.parameters() if item.is_floating_point()]
    if not weights:
        raise InputError(
            "The gradient norm was asked for, but the model has no weights of a float type.",
            "Leave gradient_norm out of --extras, or load the model unquantised.",
        )
    found: dict[int, float] = {}
    with evaluating(model), _requiring(weights):
        for place in own_share(range(len(examples))):
            example, part = examples[place], answers[place]
            content = (example.input_ids, example.labels, part.start, part.stop, p)
            known = None if cache is None else cache.numbers("gradient", 1, ("norm",), *content)
            norm = known[0]["norm"] if known else _norm(model, weights, example, part, p)
            if cache is not None and not known:
                cache.put_numbers("gradient", [{"norm": norm}], ("norm",), *content)
            found[place] = norm
    found = gathered(found)
    return [found[place] for place in range(len(examples))]


def _norm(model: nn.Module, weights: Sequence[nn.Parameter], example: Example, answer: slice, p: float) -> float:
    ids = torch.tensor([example.input_ids], device=weights[0].device)
    targets = torch.tensor(example.labels[1:], device=ids.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    places = (targets != IGNORE).nonzero().squeeze(1)[answer]
    loss = nn.functional.cross_entropy(logits[places].float(), targets[places].to(logits.device))
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    norms = [float(item.float().norm(p=p)) for item in gradients if item is not None]
    return sum(norms) / len(norms)


@contextmanager
def _requiring(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to weights for a while."""
    before = [item.requires_grad for item in weights]
    for item in weights:
        item.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for item, required in zip(weights, before, strict=True):
            item.requires_grad_(required)
