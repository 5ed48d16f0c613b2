"""Empirical Fisher information of forget and retain rows, reduced to one weight per output neuron (row)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedModel

from loku.adapters.layers import Layers, weight
from loku.data.batching import pad_batch
from loku.data.encoding import Example
from loku.errors import DivergenceError, InputError
from loku.files import json_line, replace_file
from loku.losses.positions import IGNORE

Mode = Literal["default", "official"]

OFFICIAL_EPS = 1e-5
RELATIVE_EPS = 0.01  # times the layer's mean retain Fisher
MIN_RETAIN_ROWS = 256


@dataclass(frozen=True)
class LayerImportance:
    """What one layer's Fisher information says about its rows (output neurons).

    `relative[i]` = sum_j F_f[i, j] / (F_r[i, j] + eps), the row weights of FILA; `forget` and `retain` are the row
    sums of F_f and F_r; `eps` is the value used; `share_below_eps` is the share of entries with F_r < eps.
    """

    relative: Float[Tensor, " out"]
    forget: Float[Tensor, " out"]
    retain: Float[Tensor, " out"]
    eps: float
    share_below_eps: float

    def rank_correlation_forget_only(self) -> float:
        """Spearman correlation of the row weights with forget-only Fisher: near 1, the retain set did not count."""
        if self.relative.unique().numel() < 2 or self.forget.unique().numel() < 2:
            return 1.0
        return float(spearmanr(self.relative.numpy(), self.forget.numpy()).statistic)


@dataclass(frozen=True)
class Importance:
    """Row importances of every adapted layer, with the provenance that makes them reusable."""

    layers: dict[str, LayerImportance]
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: three vectors a layer, the rest as JSON in the metadata. Atomic."""
        tensors: dict[str, Tensor] = {}
        numbers = {}
        for name, layer in self.layers.items():
            tensors |= {
                f"{name}.relative": layer.relative,
                f"{name}.forget": layer.forget,
                f"{name}.retain": layer.retain,
            }
            numbers[name] = {"eps": layer.eps, "share_below_eps": layer.share_below_eps}
        metadata = {"provenance": json_line(self.provenance), "layers": json_line(numbers)}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read what `save` wrote. Raises InputError when the file is missing or something else."""
        if not Path(path).is_file():
            raise InputError(f"The importance file '{path}' does not exist.", "Make one with `loku importance`.")
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
            numbers = json.loads(metadata["layers"])
            layers = {
                name: LayerImportance(
                    **{part: tensors[f"{name}.{part}"] for part in ("relative", "forget", "retain")}, **values
                )
                for name, values in numbers.items()
            }
            return cls(layers, json.loads(metadata["provenance"]))
        except (SafetensorError, KeyError, ValueError, OSError, TypeError) as error:
            raise InputError(
                f"'{path}' is not an importance file ({error}).", "Make one with `loku importance --output <file>`."
            ) from error


def sample_retain(retain: Sequence[Example], forget: Sequence[Example], mode: Mode, seed: int) -> list[Example]:
    """Draw the retain examples whose Fisher information is compared with the forget set's.

    `official`: as many as there are forget examples, as released. Default: at least 256 (all, when fewer), since the
    element-wise ratio inherits the noise of a small retain sample.
    """
    wanted = len(forget) if mode == "official" else max(len(forget), MIN_RETAIN_ROWS)
    if wanted >= len(retain):
        return list(retain)
    return random.Random(seed).sample(list(retain), wanted)


def estimate_importance(
    model: PreTrainedModel,
    layers: Layers,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    pad_id: int,
    mode: Mode = "default",
    eps: float | None = None,
    batch_size: int = 4,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Estimate the relative Fisher importance of each row of each layer's weight.

    With g_i the gradient of example i's mean token cross entropy (nats) and c_i its supervised tokens,

        F = sum_i c_i g_i^2 / sum_i c_i          for forget (F_f) and retain (F_r) examples
        relative[o] = sum_j F_f[o, j] / (F_r[o, j] + eps)

    Default mode: one gradient per example, eps = 0.01 * mean(F_r) of the layer. `official` is the released recipe:
    g is the gradient of the mean over a whole batch, c its token count, eps = 1e-5. `eps` overrides either (absolute
    value). Squares are accumulated in float32 whatever the model's dtype.

    The model stays frozen: gradients of the weights are formed from each layer's input and output gradient and
    consumed at once. Only F_r is stored (one float32 matrix a layer), because the ratio is linear in F_f.

    Raises DivergenceError when a gradient is not finite.

    Source: LoKU (arXiv 2408.06621), relative Fisher information; `official` follows the authors' released code.
    """
    per_example = mode == "default"
    total = len(forget) + len(retain)
    done = 0

    def run(recorder: _Recorder, examples: Sequence[Example]) -> int:
        nonlocal done
        tokens = 0
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            tokens += recorder.backward(model, pad_batch(chunk, pad_id))
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        return max(tokens, 1)

    with _frozen(model, train=mode == "official"):
        fisher_r = {
            name: torch.zeros(weight(layer).shape, device=layer.weight.device) for name, layer in layers.items()
        }
        with _Recorder(layers, per_example, lambda name, square: fisher_r[name].add_(square)) as recorder:
            tokens_r = run(recorder, retain)

        eps_of, below, retain_rows = {}, {}, {}
        for name, fisher in fisher_r.items():
            fisher.div_(tokens_r)
            eps_of[name] = _eps(fisher, mode, eps)
            below[name] = float((fisher < eps_of[name]).float().mean())
            retain_rows[name] = fisher.sum(1)
            fisher.add_(eps_of[name]).reciprocal_()  # from here on the weights 1 / (F_r + eps)

        relative = {name: torch.zeros(len(fisher), device=fisher.device) for name, fisher in fisher_r.items()}
        forget_rows = {name: torch.zeros_like(rows) for name, rows in relative.items()}

        def consume(name: str, square: Tensor) -> None:
            forget_rows[name] += square.sum(1)
            relative[name] += torch.linalg.vecdot(square, fisher_r[name])

        with _Recorder(layers, per_example, consume) as recorder:
            tokens_f = run(recorder, forget)

    result = {}
    for name in layers:
        rows = (relative[name] / tokens_f).cpu()
        if not torch.isfinite(rows).all():
            raise DivergenceError(
                f"The Fisher information of layer '{name}' is not finite.",
                "Its gradients overflow before any training: check the model and the data, or try --dtype float32.",
            )
        result[name] = LayerImportance(
            relative=rows,
            forget=(forget_rows[name] / tokens_f).cpu(),
            retain=retain_rows[name].cpu(),
            eps=eps_of[name],
            share_below_eps=below[name],
        )
    return Importance(result, dict(provenance or {}))


def _eps(fisher: Tensor, mode: Mode, override: float | None) -> float:
    if override is not None:
        return override
    if mode == "official":
        return OFFICIAL_EPS
    # A layer that no retain token reaches has mean 0: any positive number keeps the ratio finite and flat.
    return max(RELATIVE_EPS * float(fisher.mean()), torch.finfo(torch.float32).tiny)


class _Recorder:
    """Hooks that form each layer's squared weight gradient during a backward pass, without weight gradients.

    For an input x and an output gradient d, the weight gradient is d^T x. `consume(name, c * G^2)` is called for
    every example (`per_example`) or every batch.
    """

    def __init__(self, layers: Layers, per_example: bool, consume: Callable[[str, Tensor], Any]) -> None:
        self.layers = layers
        self.per_example = per_example
        self.consume = consume
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.counts: list[int] = []
        self.lengths: list[int] = []

    def __enter__(self) -> _Recorder:
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_hook(self._record(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _record(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:  # not in the first, gradient-free pass of a checkpointed block
                recorded = inputs[0].detach()
                output.register_hook(lambda gradient: self._consume(name, recorded, gradient))

        return hook

    def _consume(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        rows = len(self.lengths)
        inputs = inputs.reshape(rows, -1, inputs.shape[-1]).float()
        gradient = gradient.reshape(rows, -1, gradient.shape[-1]).float()
        if self.per_example:
            for row, (count, length) in enumerate(zip(self.counts, self.lengths, strict=True)):
                square = (gradient[row, :length].T @ inputs[row, :length]).square_()
                self.consume(name, square.mul_(count))
        else:
            square = torch.einsum("bto,bti->oi", gradient, inputs).square_()
            self.consume(name, square.mul_(sum(self.counts)))

    def backward(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> int:
        """Run one batch through the model and back. Returns its number of supervised tokens."""
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        counts = (labels != IGNORE).sum(1)
        self.counts = counts.tolist()
        self.lengths = batch["attention_mask"].sum(1).tolist()
        logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none").sum(1)
        # Examples do not meet inside the model, so the gradient of the sum holds every example's own gradient.
        total = (losses / counts.clamp(min=1)).sum() if self.per_example else losses.sum() / counts.sum().clamp(min=1)
        total.backward()
        return sum(self.counts)


@contextmanager
def _frozen(model: PreTrainedModel, *, train: bool) -> Iterator[None]:
    """Freeze every parameter and let gradients start at the embeddings; restore everything afterwards."""
    was_training = model.training
    was_trainable = [parameter.requires_grad for parameter in model.parameters()]

    def start_gradient(_: nn.Module, __: object, output: Tensor) -> None:
        output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(start_gradient)
    try:
        model.train(train)
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, trainable in zip(model.parameters(), was_trainable, strict=True):
            parameter.requires_grad_(trainable)
        model.train(was_training)
