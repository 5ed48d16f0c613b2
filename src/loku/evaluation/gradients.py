"""Gradient norms of examples, for the membership attack by that name. Costs a backward pass per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.errors import InputError
from loku.evaluation.modes import evaluating


def gradient_norms(
    model: nn.Module, examples: Sequence[Example], answers: Sequence[slice], *, p: float = 2.0
) -> list[float]:
    """Return each example's gradient norm: the mean, over weight tensors, of the p-norm of d(loss)/d(tensor).

    loss = -mean log p over the supervised tokens that `answers` selects (the answer without the end of sequence), as
    in open-unlearning's `mia_gradnorm` (p = 2), but with dropout off. Every weight tensor of a float type counts,
    trainable or not; those that the loss does not reach do not. The model's gradients and `requires_grad` are left as
    they were. Raises InputError for a model without any such tensor.
    """
    weights = [item for item in model.parameters() if item.is_floating_point()]
    if not weights:
        raise InputError(
            "The gradient norm was asked for, but the model has no weights of a float type.",
            "Leave gradient_norm out of --extras, or load the model unquantised.",
        )
    found = []
    with evaluating(model), _requiring(weights):
        for example, answer in zip(examples, answers, strict=True):
            ids = torch.tensor([example.input_ids], device=weights[0].device)
            targets = torch.tensor(example.labels[1:], device=ids.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            places = (targets != IGNORE).nonzero().squeeze(1)[answer]
            loss = nn.functional.cross_entropy(logits[places].float(), targets[places].to(logits.device))
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            norms = [float(item.float().norm(p=p)) for item in gradients if item is not None]
            found.append(sum(norms) / len(norms))
    return found


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
