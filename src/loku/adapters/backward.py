"""One forward and backward pass over examples that hands out each layer's input and output gradient.

No weight gradient is ever allocated: the model stays frozen, and what a layer's weight gradient is made of is consumed
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from loku.adapters.layers import Layers
from loku.data.batching import pad_batch
from loku.data.encoding import Example
from loku.errors import InputError
from loku.losses.positions import Selection, select, widest


@dataclass(frozen=True)
class Seen:
    """What one layer saw of a batch, in float32: its weight gradient for example b is gradient[b].T @ inputs[b].

    The loss is scaled so that the square of that gradient is c_b g_b^2 (see `backward`). Example b is `lengths[b]`
    tokens long, `counts[b]` of them supervised. With `whole` the batch counts as one example.
    """

    inputs: Float[Tensor, "batch seq in"]
    gradient: Float[Tensor, "batch seq out"]
    lengths: list[int]
    counts: list[int]
    whole: bool

    def examples(self) -> Iterator[tuple[Float[Tensor, "tokens in"], Float[Tensor, "tokens out"], int]]:
        """Yield inputs, output gradient and supervised tokens of each example, or of the batch as one."""
        if self.whole:
            yield self.inputs.flatten(0, 1), self.gradient.flatten(0, 1), sum(self.counts)
            return
        for row, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            yield self.inputs[row, :length], self.gradient[row, :length], count


Consume = Callable[[str, Seen], None]
Change = Callable[[str, Tensor], Tensor]


@dataclass
class Taps:
    """Hooks on layers that hand their inputs and output gradients to `consume` during a backward pass.

    Nothing below the first tapped layer is differentiated: gradients start there. Inputs are saved through autograd, so
    that checkpointed activations are recomputed rather than kept. `change` adds something to a layer's output, by name
    and input. `whole` takes one gradient a batch instead of one per example.
    """

    layers: Layers
    consume: Consume
    whole: bool = False
    change: Change | None = None
    lengths: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    _consumed: set[str] = field(default_factory=set)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Taps:
        # Something has to require a gradient where neither weights nor inputs do.
        self._start = torch.zeros((), requires_grad=True)
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # the first, gradient-free pass of a checkpointed block
                return None if self.change is None else output + self.change(name, inputs[0])
            if self.change is not None:
                output = output + self.change(name, inputs[0])
            tapped: Tensor = _Tap.apply(output, inputs[0].detach(), self._start, self, name)
            return tapped

        return hook

    def begin(self, lengths: list[int], counts: list[int]) -> None:
        """Say what the next batch holds."""
        self.lengths, self.counts = lengths, counts
        self._consumed.clear()

    def take(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """Hand one layer's part of the batch on."""
        rows = len(self.lengths)
        if name in self._consumed:
            raise InputError(f"The layer '{name}' is used twice in one pass.", "Leave it out with --targets.")
        if inputs.numel() % (rows * inputs.shape[-1]) or inputs.numel() // (rows * inputs.shape[-1]) < max(
            self.lengths
        ):
            raise InputError(
                f"The layer '{name}' does not see whole sequences (its input has shape {list(inputs.shape)}).",
                "Leave it out with --targets: the parts of its gradient cannot be told apart by example.",
            )
        self._consumed.add(name)
        inputs = inputs.reshape(rows, -1, inputs.shape[-1]).float()
        gradient = gradient.reshape(rows, -1, gradient.shape[-1]).float()
        self.consume(name, Seen(inputs, gradient, self.lengths, self.counts, self.whole))


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands over the layer's input and output gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, start: Tensor, taps: Taps, name: str) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.taps, ctx.name = taps, name
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        ctx.taps.take(ctx.name, inputs, gradient)
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None, None


def backward(model: PreTrainedModel, examples: Sequence[Example], taps: Taps, *, pad_id: int) -> int:
    """Run one batch through the model and back. Returns its number of supervised tokens.

    With l_b the mean token cross entropy of example b (nats) and c_b its supervised tokens, the gradient of

        sum_b sqrt(c_b) l_b

    holds sqrt(c_b) g_b of every example apart, because examples do not meet inside the model: its squares are
    c_b g_b^2 as they are wanted. With `taps.whole` the mean is over the batch's tokens.
    """
    batch = {key: value.to(model.device) for key, value in pad_batch(examples, pad_id).items()}
    chosen = select(batch["labels"])
    counts = torch.bincount(chosen.sequence, minlength=len(examples))
    taps.begin([len(example.input_ids) for example in examples], counts.tolist())
    tokens = len(chosen.targets)
    if not tokens:
        return 0
    logits = answer_logits(model, batch, chosen)
    losses = F.cross_entropy(logits, chosen.targets, reduction="none")
    total = losses.sum() / tokens**0.5 if taps.whole else (losses * counts.rsqrt()[chosen.sequence]).sum()
    if total.requires_grad:
        total.backward()
    return tokens


def answer_logits(
    model: PreTrainedModel, batch: dict[str, Int[Tensor, "batch seq"]], chosen: Selection
) -> Float[Tensor, "tokens vocab"]:
    """Return the logits at the supervised positions, in float32 or wider: nothing else goes through the LM head.

    The states that enter the head are cut down to those positions, whatever the model does before and after it.
    """
    head = model.get_output_embeddings()
    caught: list[torch.Size] = []

    def cut(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(arguments[0].shape)
        if arguments[0].shape[:2] != batch["input_ids"].shape:
            return arguments
        return (chosen.pick(arguments[0]).unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(cut) if head is not None else None
    try:
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    finally:
        if handle is not None:
            handle.remove()
    if logits.shape[:2] == batch["input_ids"].shape and len(caught) != 1:
        logits = chosen.pick(logits)
    logits = logits.flatten(0, -2)
    if len(logits) != len(chosen.targets):
        raise InputError(
            f"{type(model).__name__} gave logits at {len(logits)} positions where {len(chosen.targets)} were wanted.",
            "Importance works for causal language models whose logits are made by their LM head.",
        )
    return logits.to(widest(logits))


@contextmanager
def frozen(model: PreTrainedModel, *, train: bool = False) -> Iterator[None]:
    """Freeze every parameter in eval (or train) mode, with gradients enabled; restore everything afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    was_trainable = [parameter.requires_grad for parameter in model.parameters()]
    checkpointed = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    handles = []
    if checkpointed:
        # Re-entrant checkpoints pass gradients on only where an input needs one.
        embeddings = model.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    try:
        model.train(train)
        for module in checkpointed:
            # transformers checkpoints in train mode only. The block's own flag decides; dropout looks at its children.
            module.training = True
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trainable in zip(model.parameters(), was_trainable, strict=True):
            parameter.requires_grad_(trainable)
        for module, mode in modes:
            module.training = mode


def plan_batches(examples: Sequence[Example], size: int, *, sort: bool) -> list[list[Example]]:
    """Cut examples into batches of `size`; sorted by length, longest first, there is almost no padding.

    Ties keep their order, so that the plan depends on nothing but the examples.
    """
    ordered = sorted(examples, key=lambda example: -len(example.input_ids)) if sort else list(examples)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
