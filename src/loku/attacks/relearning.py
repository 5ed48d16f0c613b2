"""Relearning: fine-tune on a little, and see what of the rest comes back. The model is left as it was.

What is trained on is relearned by any model; only rows that were not trained on are evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loku.data.batching import pad_batch
from loku.data.encoding import Encoder, Example
from loku.data.prompts import Template, resolve_template
from loku.data.sources import RecordSet
from loku.errors import DivergenceError, InputError
from loku.evaluation.measuring import Effort, Measured, measure
from loku.evaluation.modes import evaluating
from loku.files import sha256_json
from loku.forward import Forward
from loku.losses.lm_head import unwrapped
from loku.losses.retain import nll

FIGURES = ("exact_match", "probability", "exact_memorisation", "rougeL_recall", "repetition")
TUNES = ("lora", "full")
CLIP = 1.0  # gradient norm
STEPS, LEARNING_RATE, SHARE, RANK, EVERY, BATCH = 20, 5e-4, 0.25, 8, 5, 8

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RelearningCurve:
    """What a model knew after each of `steps` optimiser steps; step 0 is the model as it was given.

    `means[set][figure]` holds one mean for each of the steps, `per_example[set][figure]` the rows' values for each of
    the steps, in the order of `indices[set]`; figures that a set's rows do not have are absent. `losses` are the
    training losses, in nats per token, of all steps.
    """

    steps: list[int]
    indices: dict[str, list[int]]
    means: dict[str, dict[str, list[float]]]
    per_example: dict[str, dict[str, list[list[float]]]]
    losses: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def last(self, name: str, figure: str = "exact_match") -> float:
        """Return a set's mean after the last step."""
        return self.means[name][figure][-1]

    def gain(self, name: str, figure: str = "exact_match") -> float:
        """Return by how much a set's mean rose from the first to the last step."""
        values = self.means[name][figure]
        return values[-1] - values[0]

    def to_json(self) -> dict[str, Any]:
        """Return everything as one JSON object: numbers only, no text."""
        return asdict(self)


def split_forget(records: RecordSet, share: float = SHARE, seed: int = 0) -> tuple[RecordSet, RecordSet]:
    """Split rows at random into a share to learn, at least one row, and the disjoint rest, at least one row.

    The same rows, share and seed give the same split. Rows keep their order and their index. Raises InputError for
    fewer than two rows and for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise InputError(f"--share {share} is not between 0 and 1.", "Give the part of the forget set to train on.")
    if len(records) < 2:
        raise InputError(
            f"The forget set '{records.name}' has one row: nothing is left to test.", "Give two rows or more."
        )
    count = min(len(records) - 1, max(1, round(share * len(records))))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    parts = [sorted(chosen), [place for place in range(len(records)) if place not in chosen]]
    names = (f"{count} rows of {records.name}", f"the other {len(records) - count} rows of {records.name}")
    learn, rest = (subset(records, part, name) for part, name in zip(parts, names, strict=True))
    return learn, rest


def subset(records: RecordSet, places: Sequence[int], name: str) -> RecordSet:
    """Return the rows at some places as a set with a hash of its own."""
    chosen = tuple(records[place] for place in places)
    return RecordSet(name, chosen, sha256_json([records.sha256, list(places)]), records.origin)


def relearn(
    model: nn.Module,
    tokenizer: Any,
    *,
    learn: RecordSet,
    probe: Mapping[str, RecordSet],
    template: Template | None = None,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH,
    every: int = EVERY,
    tune: str = "lora",
    rank: int = RANK,
    max_length: int = 500,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RelearningCurve:
    """Fine-tune on the rows of `learn` and measure the `probe` sets at step 0, every `every` steps and at the end.

    AdamW without decay at a constant rate, gradients clipped to norm 1, on the mean token cross entropy of batches
    from seeded permutations of the rows. `tune` "lora" trains a fresh adapter of that rank (alpha twice the rank) on
    every linear layer but the head, on top of whatever the model holds; "full" trains copies, in float32, of all
    weights that are no adapter's. Training is in eval mode, without dropout. Measured are exact match and ROUGE-L
    recall of the greedy answer, its repetition, the right answer's probability and exact memorisation.

    The model comes back as it was, bit by bit, also after an error. Raises InputError for settings and rows that
    cannot be used, DivergenceError when the loss is no number any more.
    """
    if tune not in TUNES:
        raise InputError(f"tune '{tune}' is not known.", f"Give one of: {', '.join(TUNES)}.")
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size), ("rank", rank)):
        if value < 1:
            raise InputError(f"{name} {value} is too small.", "Give at least 1.")
    encoder = Encoder(tokenizer, template or resolve_template(tokenizer), max_length)
    examples = encoder.encode_records(learn, option="learn").examples
    settings = {
        "tune": tune, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed,
        "rank": rank if tune == "lora" else None, "learned_rows": len(learn),
    }  # fmt: skip
    curve = RelearningCurve(
        [], {name: [row.index for row in rows] for name, rows in probe.items()}, {}, {}, [], settings
    )

    def look(step: int) -> None:
        effort = Effort(None, max_new_tokens, fit_answers=True, answers_only=True)
        _record(curve, step, measure(model, tokenizer, encoder, {n: list(r) for n, r in probe.items()}, effort=effort))

    with evaluating(model), _trainable(model, tune, rank, seed) as parameters:
        forward = Forward(model)
        optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        batches = _batches(examples, batch_size, seed)
        look(0)
        for step in range(1, steps + 1):
            curve.losses.append(_step(model, forward, optimiser, next(batches), tokenizer.pad_token_id))
            if step % every == 0 or step == steps:
                look(step)
            if progress is not None:
                progress(step, steps, f"loss {curve.losses[-1]:.3g}")
    return curve


def _record(curve: RelearningCurve, step: int, measured: Mapping[str, list[Measured]]) -> None:
    curve.steps.append(step)
    for name, rows in measured.items():
        numbers = [row.numbers() for row in rows]
        for figure in FIGURES:
            values = [row[figure] for row in numbers if figure in row]
            if len(values) == len(numbers):
                curve.means.setdefault(name, {}).setdefault(figure, []).append(math.fsum(values) / len(values))
                curve.per_example.setdefault(name, {}).setdefault(figure, []).append(values)


def _step(model: nn.Module, forward: Forward, optimiser: Any, rows: Sequence[Example], pad_id: int) -> float:
    """Take one optimiser step and return its loss."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in pad_batch(rows, pad_id).items()}
    parameters = [item for group in optimiser.param_groups for item in group["params"]]
    with torch.enable_grad():
        loss = nll(forward.scores(model, batch))
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
    if not torch.isfinite(loss):
        raise DivergenceError(f"Relearning blew up (loss {loss.item()}).", "Give a smaller learning rate.")
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimiser.step()
    return loss.item()


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches for ever; every example is used once before any is used again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [examples[place] for place in order[start : start + size]]


@contextmanager
def _trainable(model: nn.Module, tune: str, rank: int, seed: int) -> Iterator[list[Tensor]]:
    """Give the tensors to train, and the model back as it was."""
    flags = [(item, item.requires_grad, item.grad) for item in model.parameters()]
    try:
        for item, _, _ in flags:
            item.requires_grad_(False)
        with fresh_lora(model, rank, seed) if tune == "lora" else _copies(model) as parameters:
            yield parameters
    finally:
        for item, required, gradient in flags:
            item.requires_grad_(required)
            item.grad = gradient


@contextmanager
def _copies(model: nn.Module) -> Iterator[list[Tensor]]:
    """Swap all weights that are no adapter's for float32 copies that can be trained, and back.

    With the adapters frozen on top this is fine-tuning of the merged model: W + s B A moves as W does.
    """
    weights = [item for name, item in model.named_parameters() if ".lora_" not in name]
    if not all(item.is_floating_point() for item in weights):
        raise InputError("Quantised weights cannot be tuned in full.", 'Give tune="lora", or the weights themselves.')
    everything = [(item, item.data) for item in model.parameters()]
    try:
        for item, stored in everything:
            item.data = stored.to(torch.float32, copy=True)
        for item in weights:
            item.requires_grad_(True)
        yield list(weights)
    finally:
        for item, stored in everything:
            item.data = stored


@contextmanager
def fresh_lora(model: nn.Module, rank: int, seed: int) -> Iterator[list[Tensor]]:
    """Put x ↦ W x + 2 B A x on every linear layer but the head, with B = 0, by hooks; take them off again.

    A starts as PEFT's: uniform within ±1/√in. Hooks leave the model's modules, adapters and weights alone, whatever
    kind they are. The factors are float32.
    """
    generator = torch.Generator().manual_seed(seed)
    handles, parameters = [], []
    try:
        for layer in linear_layers(model):
            device = next(layer.parameters()).device
            wide, out = _sizes(layer)
            start = torch.rand(rank, wide, generator=generator) * 2 - 1
            A = (start / math.sqrt(wide)).to(device).requires_grad_(True)
            B = torch.zeros(out, rank, device=device, requires_grad=True)
            parameters += [A, B]
            handles.append(layer.register_forward_hook(_adding(A, B)))
        yield parameters
    finally:
        for handle in handles:
            handle.remove()


def _adding(A: Tensor, B: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = 2.0 * ((inputs[0].to(A.dtype) @ A.T) @ B.T)
        return output + change.to(output.dtype)

    return hook


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Return every linear layer but the head, in the model's order; one that PEFT wraps counts once, with its wrapper.

    Raises InputError when there are none.
    """
    base: Any = unwrapped(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    inner: set[int] = set()
    found: list[nn.Module] = []
    for layer in base.modules():
        if id(layer) in inner or layer is head:
            continue
        if isinstance(layer, LoraLayer):
            inner |= {id(part) for part in layer.modules()}
            found.append(layer)
        elif isinstance(layer, (nn.Linear, Conv1D)):
            found.append(layer)
    if not found:
        raise InputError(f"{type(base).__name__} has no linear layers to adapt.", 'Give tune="full".')
    return found


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return how many numbers go into a layer and come out of it."""
    known: Any = layer
    if isinstance(layer, Conv1D):
        return int(known.weight.shape[0]), int(known.weight.shape[1])
    return int(known.in_features), int(known.out_features)
