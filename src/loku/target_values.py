"""What the target model says about a batch: cached log-probabilities, or its logits and hidden states.

The target model is the same weights with the adapters off; with adapters no second copy is ever loaded. When all
weights are trained, log-probabilities are computed before the first step, and a frozen copy is made only for losses
that need full distributions or hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loku.adapters.anchor import target_model
from loku.data.batching import pad_batch
from loku.data.encoding import Example
from loku.data.packing import lay_out, part_of_batch, read_ids, to_device
from loku.files import json_line, replace_file
from loku.forward import Batch, Forward
from loku.losses.positions import IGNORE


class TargetValues:
    """The target model's values for the training data.

    `copies` says that logits or hidden states will be asked for: a model without adapters is then copied, once, as it
    is now.
    """

    def __init__(self, model: nn.Module, forward: Forward, *, copies: bool) -> None:
        self.forward = forward
        self.model = model
        self.copy: nn.Module | None = None
        if copies and not isinstance(model, PeftModel):
            self.copy = copy.deepcopy(model).requires_grad_(False).eval()
            self.forward = forward.of_copy(self.copy)

    @contextmanager
    def _target(self) -> Iterator[nn.Module]:
        """Give the target model in eval mode without gradients; restore the trained one's mode."""
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy
            return
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), target_model(self.model):
                yield self.model
        finally:
            self.model.train(was_training)

    def logits(self, batch: Batch) -> Tensor:
        """Return the target's float32 logits at the supervised positions."""
        with self._target() as model:
            return self.forward.positions(model, batch).logits

    def hidden(self, batch: Batch) -> Tensor:
        """Return the target's hidden states at the supervised tokens."""
        with self._target() as model:
            return self.forward.hidden(model, batch)

    def token_logprobs(
        self,
        examples: Sequence[Example],
        *,
        pad_id: int,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Return, for every example, the log-probability (nats) of each supervised token, in order, on the CPU."""
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
        with self._target() as model:
            device = next(model.parameters()).device
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                batch = self._batch([examples[place] for place in places], pad_id)
                scores = self.forward.scores(model, to_device(batch, device))
                counts = [sum(label != IGNORE for label in examples[place].labels[1:]) for place in places]
                for place, values in zip(places, scores.label_logprob.cpu().split(counts), strict=True):
                    found[place] = values.clone()
                if progress is not None:
                    progress(min(start + batch_size, len(order)), len(order))
        return found

    def _batch(self, examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
        if self.forward.layout is None:
            return pad_batch(examples, pad_id)
        blocks, starts = lay_out([read_ids(example) for example in examples], self.forward.layout, pad_id)
        return part_of_batch(examples, starts) | {"blocks": blocks}


def weighted_sum(example: Example, logprobs: Tensor) -> Tensor:
    """Return a sequence's log-probability (nats): the sum over its supervised tokens, by their weights."""
    if example.weights is None:
        return logprobs.sum()
    weights = [w for label, w in zip(example.labels[1:], example.token_weights[1:], strict=True) if label != IGNORE]
    return (logprobs * torch.tensor(weights)).sum()


def write_logprobs(path: str | Path, values: Sequence[Tensor], provenance: Mapping[str, Any]) -> None:
    """Write token log-probabilities as safetensors: one flat tensor, the sequences' lengths, and their provenance."""
    tensors = {"logprobs": torch.cat(list(values)), "lengths": torch.tensor([len(value) for value in values])}
    metadata = {"provenance": json_line(dict(provenance))}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_logprobs(path: str | Path, provenance: Mapping[str, Any]) -> list[Tensor] | None:
    """Read what `write_logprobs` wrote, or return None when there is no such file or it was made for something else."""
    try:
        with safe_open(path, framework="pt") as handle:
            if (handle.metadata() or {}).get("provenance") != json_line(dict(provenance)):
                return None
            flat, lengths = handle.get_tensor("logprobs"), handle.get_tensor("lengths")
    except (OSError, SafetensorError):
        return None
    return list(flat.split(lengths.tolist()))
