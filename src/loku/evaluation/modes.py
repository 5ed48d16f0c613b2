"""A model's state during measurement, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every one of its modules back into its own mode afterwards.

    `model.train(was_training)` would not do: a module that was deliberately in another mode than its parent, such as
    a frozen dropout, would come out changed.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def end_ids(model: nn.Module, tokenizer: object) -> list[int]:
    """Return the ids that end an answer: the tokenizer's end of sequence, and what the model's own settings add.

    Chat models often end a turn with another token than the one that ends a document.
    """
    ids: list[int] = []
    for owner in (tokenizer, getattr(model, "generation_config", None)):
        found = getattr(owner, "eos_token_id", None)
        ids += [found] if isinstance(found, int) else list(found or [])
    return list(dict.fromkeys(ids))
