"""`UnlearnTrainer`: transformers' Trainer with a forget loss, a retain loss and the anchored adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from loku.adapters.anchor import restore, save_checkpoint
from loku.adapters.folded import folded
from loku.adapters.penalty import Orthogonality
from loku.data.batching import PairedCollator, PairedDataset
from loku.data.encoding import Example
from loku.errors import InputError
from loku.forward import Forward, text_config
from loku.guarded_trainer import GuardedTrainer, checkpoint_step
from loku.meeting import Combiner, Meeting, load_weight, save_weight
from loku.objective import Objective, OnLogits, Term, forget_term, retain_term


class UnlearnTrainer(GuardedTrainer):
    """Minimise forget_weight * forget loss + retain_weight * retain loss over pairs of forget and retain rows.

    An epoch visits every forget example once; each is paired with a retain example, drawn cyclically so that all
    retain examples are used before any repeats. Losses are normalised over all micro-batches and processes of a step:
    splitting a batch changes nothing but rounding.

    `forget_loss` and `retain_loss` are names (`FORGET_LOSSES`, `RETAIN_LOSSES`), with `forget_options` and
    `retain_options` for their keyword options, or functions of (logits, labels) that return a mean over supervised
    tokens. Without `retain` (or with weight 0) there is no retain term. `alternates` and `retain_alternates` hold other
    answers to each example's prompt, for the losses that compare with them; `layer` is the decoder layer of losses on
    hidden states (default: the middle one). `level` holds the log-probabilities that IHL's stop mask compares with.

    `combine` says how the two gradients meet: "sum", "pcgrad", "gru", "primal-dual" (the retain weight rises and falls
    so that the retain loss stays below `retain_bound`) or a function of two lists of gradients that returns one.

    With `orthogonality` > 0 the adapter is penalised by that much times sum ||B^T P||_F^2, once a step, where P is the
    layer's entry in `subspaces` (`retain_subspace`): the output directions that the retain rows use.

    Values of the target model are computed once here, before the first step, or with the adapters off; no second model
    is loaded, unless all weights are trained and a loss needs full distributions or hidden states.

    Losses on scores never build the tokens x vocabulary logits where the model's head allows it, and sequences stand
    side by side without padding, forget and retain rows in one forward pass, where the model's attention allows it;
    `plain_head` takes the plain path instead (logits of padded rows), `packed=False` pads.

    Checkpoints hold both adapters of an anchored model, and resuming restores both. The training stops with a
    DivergenceError as soon as a loss is not finite or its size exceeds `max_loss` (nats per item).
    """

    loss_is_scaled_for_ga = True  # by compute_loss, over the whole accumulated batch

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        forget: Sequence[Example],
        retain: Sequence[Example] | None,
        pad_id: int,
        forget_loss: str | OnLogits = "ihl",
        retain_loss: str | OnLogits = "nll",
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        forget_options: Mapping[str, Any] | None = None,
        retain_options: Mapping[str, Any] | None = None,
        alternates: list[list[Example]] | None = None,
        retain_alternates: list[list[Example]] | None = None,
        layer: int | None = None,
        level: Sequence[Tensor] | None = None,
        reference: Sequence[Tensor] | None = None,
        orthogonality: float = 0.0,
        subspaces: Mapping[str, Tensor] | None = None,
        combine: str | Combiner = "sum",
        retain_bound: float | None = None,
        dual_rate: float = 1.0,
        plain_head: bool = False,
        packed: bool = True,
        max_loss: float = 1000.0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.weights = [forget_weight, retain_weight if retain is not None else 0.0]
        self.penalty = Orthogonality.checked(model, orthogonality, subspaces)
        self.meeting = Meeting.named(combine, bound=retain_bound, rate=dual_rate)
        forward = Forward(
            model, layer=layer if layer is not None else _middle_layer(model), plain=plain_head, packed=packed
        )
        self.objective = Objective(
            model,
            forward,
            forget=forget_term(forget_loss, forget_options),
            retain=retain_term(retain_loss, retain_options),
            seed=args.seed,
        )
        for term, examples in ((self.objective.forget, forget), (self.objective.retain, retain)):
            if term.custom and any(example.weights is not None for example in examples or ()):
                raise InputError(
                    f"The loss '{term.name}' is a function of logits, which cannot see the rows' forget_spans.",
                    "Choose a loss by its name, or leave forget_spans out.",
                )
        self.objective.check_vocabulary(forget, retain, alternates, retain_alternates)
        together = self.meeting.combiner is None and bool(forget_weight)
        _check_alternates(self.objective.forget, alternates, "alternates")
        if self.weights[1]:
            _check_alternates(self.objective.retain, retain_alternates, "retain_alternates")
        self.objective.prepare(
            forget, alternates, pad_id=pad_id, batch_size=args.per_device_train_batch_size, cached=reference
        )
        partners = list(retain) if retain is not None and (self.weights[1] or self.meeting.bound is not None) else None
        dataset = PairedDataset(
            list(forget), partners, args.seed, alternates=alternates, retain_alternates=retain_alternates
        )
        self._sums = {
            "forget_loss": torch.zeros((), device=args.device),
            "retain_loss": torch.zeros((), device=args.device),
            "orthogonality": torch.zeros((), device=args.device),
        }
        self._steps_logged = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=PairedCollator(pad_id, self.objective.plan(together=together), level),
            callbacks=[
                _Epochs(dataset),
                *([_DualAscent(self)] if retain_bound is not None else []),
                *(callbacks or []),
            ],
            max_loss=max_loss,
        )
        self.model_accepts_loss_kwargs = False

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Count what the two losses average over, in all micro-batches of the step and all processes."""
        found = [0.0, 0.0]
        for batch in batch_samples:
            found[0] += self.objective.forget.count(batch["forget"], batch.get("alternate"))
            if "retain" in batch:
                found[1] += self.objective.retain.count(batch["retain"], batch.get("retain_alternate"))
        return self.over_processes(torch.tensor(found).to(device)).clamp(min=1e-6)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the weighted sum of both losses for one micro-batch, scaled to the whole step."""
        forget, retain = self._terms(model, inputs, num_items_in_batch)
        total = torch.zeros((), device=self.args.device)
        for weight, term in zip(self.weights, (forget(), retain()), strict=True):
            if term is not None:
                total = total + weight * term
        if self.penalty:
            total = total + self._penalty(model, inputs, num_items_in_batch)
        # Processes average their gradients, while the counts above are over all of them.
        loss = total * self.args.world_size
        return (loss, None) if return_outputs else loss

    def _penalty(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | None) -> Tensor:
        """Return this micro-batch's share of the penalty on the adapter: its shares of a step add up to one."""
        if items is None:
            items = self._get_num_items_in_batch([inputs], self.args.device)
        assert items is not None
        count = self.objective.forget.count(inputs["forget"], inputs.get("alternate"))
        value: Tensor = self.penalty(self.accelerator.unwrap_model(model)) * (count / items[0])
        self._sums["orthogonality"] += value.detach()
        return value

    def _terms(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | None
    ) -> tuple[Callable[[], Tensor | None], Callable[[], Tensor | None]]:
        """Return both terms as functions to call, so that one can be differentiated before the other is computed."""
        if items is None:
            items = self._get_num_items_in_batch([inputs], self.args.device)
        assert items is not None
        counted: Tensor = items
        if "blocks" in inputs:  # one forward pass for all parts
            states = self.objective.forward.states(model, inputs["blocks"])
            inputs = {p: {**value, "states": states} for p, value in inputs.items() if p != "blocks"}

        def forget() -> Tensor | None:
            if not self.weights[0]:
                return None
            value = self.objective.forget_term(model, inputs["forget"], inputs.get("alternate"), counted[0])
            self._sums["forget_loss"] += value.detach()
            return value

        def retain() -> Tensor | None:
            if "retain" not in inputs:
                return None
            value = self.objective.retain_term(model, inputs["retain"], inputs.get("retain_alternate"), counted[1])
            self._sums["retain_loss"] += value.detach()
            return value

        return forget, retain

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Make one micro-batch's step; with a combiner the two gradients are kept apart until the last micro-batch."""
        with folded(self.accelerator.unwrap_model(model)):
            if self.meeting.combiner is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._combined_step(model, inputs, num_items_in_batch)

    def _combined_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        total = torch.zeros((), device=self.args.device)
        terms = self._terms(model, inputs, num_items_in_batch)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for side, (weight, term) in enumerate(zip(self.weights, terms, strict=True)):
            # autograd.grad leaves the processes' own gradient exchange alone; the exchange comes once, in `finish`.
            with self.accelerator.no_sync(model), self.compute_loss_context_manager():
                value = term()
                if value is not None:
                    self.meeting.add(side, torch.autograd.grad(weight * value, parameters, allow_unused=True))
                    total += weight * value.detach()
        if self.penalty:  # it protects what the retain loss protects
            value = self._penalty(model, inputs, num_items_in_batch)
            self.meeting.add(1, torch.autograd.grad(value, parameters, allow_unused=True))
            total += value.detach()
        if self.accelerator.sync_gradients:
            self.meeting.finish(parameters, self.accelerator)
        return total * self.args.world_size

    def adapt_weight(self, retain_loss: float) -> None:
        """Take a step of dual ascent on the retain weight, where there is a bound."""
        self.weights[1] = self.meeting.next_weight(self.weights[1], retain_loss)

    def step_losses(self) -> dict[str, float]:
        """Return the mean forget and retain loss per optimiser step since the last call of `log`."""
        steps = max(self.state.global_step - self._steps_logged, 1)
        used = {
            "forget_loss": bool(self.weights[0]),
            "retain_loss": self.train_dataset.retain is not None,
            "orthogonality": bool(self.penalty),
        }
        found = {}
        for name, shown in used.items():
            if shown:  # each process holds its part of the sum
                total = self.accelerator.reduce(self._sums[name].clone(), reduction="sum")
                found[name] = float(total) / steps
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both losses to what the Trainer logs."""
        if "loss" in logs:
            losses = self.step_losses()
            logs = {"loss": logs["loss"], **losses, **{k: v for k, v in logs.items() if k != "loss"}}
            if self.meeting.bound is not None:
                logs["retain_weight"] = self.weights[1]
            for value in self._sums.values():
                value.zero_()
            self._steps_logged = self.state.global_step
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        folder = output_dir or str(self.args.output_dir)
        if isinstance(model, PeftModel):
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_checkpoint(model, folder)
        else:
            super()._save(output_dir, state_dict)
        if self.meeting.bound is not None:
            save_weight(folder, self.weights[1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        if isinstance(model, PeftModel):
            restore(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.meeting.bound is not None:
            self.weights[1] = load_weight(resume_from_checkpoint)
        self._steps_logged = checkpoint_step(resume_from_checkpoint)


def _middle_layer(model: nn.Module) -> int:
    """Return the decoder layer that losses on hidden states look at unless told otherwise: 7, or the middle one."""
    return min(7, text_config(model).num_hidden_layers // 2)


def _check_alternates(term: Term, given: Any, name: str) -> None:
    if term.needs("alternate") and given is None:
        raise InputError(
            f"The loss '{term.name}' compares with other answers, but {name} is missing.",
            f"Pass {name}=encode_alternates(encoder, records).",
        )


class _Epochs(TrainerCallback):
    """Tell the paired dataset which epoch it is, whatever samplers accelerate puts in between."""

    def __init__(self, dataset: PairedDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.set_epoch(math.floor(state.epoch or 0))


class _DualAscent(TrainerCallback):
    """Move the retain weight after every step, where there is a bound."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.meeting.bound is not None:
            self.trainer.adapt_weight(self.trainer.step_losses()["retain_loss"])
