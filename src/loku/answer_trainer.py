"""`AnswerTrainer`: the cross entropy of answer tokens, with sequences side by side where the model reads them so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from loku.data.batching import pad_batch
from loku.data.encoding import Example
from loku.data.packing import Layout, lay_out, part_of_batch, read_ids
from loku.forward import Forward, count_items
from loku.guarded_trainer import GuardedTrainer
from loku.losses.retain import nll


class AnswerTrainer(GuardedTrainer):
    """Minimise the mean cross entropy (nats) of the supervised tokens of a step, over its micro-batches and processes.

    Sequences stand side by side without padding where the model's attention allows it (`layout_of`), and only states
    that predict a supervised token go through the head; otherwise rows are padded. The loss is the same to rounding.
    """

    loss_is_scaled_for_ga = True  # by compute_loss, over the whole accumulated batch

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        examples: Sequence[Example],
        pad_id: int,
        max_loss: float,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.forward = Forward(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Examples(examples),
            data_collator=AnswerCollator(pad_id, self.forward.layout),
            callbacks=callbacks,
            max_loss=max_loss,
        )
        self.model_accepts_loss_kwargs = False

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Count the supervised tokens in all micro-batches of the step and all processes."""
        count = float(sum(count_items(batch) for batch in batch_samples))
        return self.over_processes(torch.tensor(count).to(device)).clamp(min=1.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return one micro-batch's part of the step's mean."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        # Processes average their gradients, while the count is over all of them.
        loss = nll(self.forward.scores(model, inputs), num_items=num_items_in_batch) * self.args.world_size
        return (loss, None) if return_outputs else loss


class AnswerCollator:
    """Makes batches of examples: laid out in blocks, or padded where `layout` is None."""

    def __init__(self, pad_id: int, layout: Layout | None) -> None:
        self.pad_id = pad_id
        self.layout = layout

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return one batch."""
        if self.layout is None:
            return dict(pad_batch(examples, self.pad_id))
        blocks, starts = lay_out([read_ids(example) for example in examples], self.layout, self.pad_id)
        return {"blocks": blocks, **part_of_batch(examples, starts)}


class _Examples(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
