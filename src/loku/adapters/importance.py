"""Empirical Fisher information of forget and retain rows, reduced to one weight per output neuron (row)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from loku.adapters.backward import Taps, backward, frozen, plan_batches
from loku.adapters.fisher import ForgetPass, RetainPass, Scratch, invert, layer_groups
from loku.adapters.layers import Layers
from loku.adapters.partial import SAVE_SECONDS, Journal, Position, sum_over_processes, world
from loku.data.encoding import Example
from loku.errors import DivergenceError, InputError
from loku.files import json_line, replace_file, sha256_json

Mode = Literal["default", "official"]

OFFICIAL_EPS = 1e-5
RELATIVE_EPS = 0.01  # times the layer's mean retain Fisher
MIN_RETAIN_ROWS = 256
BATCH = 8
OFFICIAL_BATCH = 4  # a batch's mean gradient depends on it

VECTORS = ("relative", "forget", "retain", "columns")


@dataclass(frozen=True)
class LayerImportance:
    """What one layer's Fisher information says about its rows (output neurons) and columns (inputs).

    With R[i, j] = F_f[i, j] / (F_r[i, j] + eps): `relative[i]` = sum_j R[i, j], the row weights of FILA, and
    `columns[j]` = sum_i R[i, j]; `forget` and `retain` are the row sums of F_f and F_r; `eps` is the value used;
    `share_below_eps` is the share of entries with F_r < eps.
    """

    relative: Float[Tensor, " out"]
    forget: Float[Tensor, " out"]
    retain: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]
    eps: float
    share_below_eps: float

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return everything as tensors, under keys that start with the layer's name."""
        vectors = {f"{name}.{part}": getattr(self, part) for part in VECTORS}
        return vectors | {f"{name}.numbers": torch.tensor([self.eps, self.share_below_eps], dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> LayerImportance:
        """Make it from what `tensors` returned."""
        eps, below = tensors[f"{name}.numbers"].tolist()
        return cls(**{part: tensors[f"{name}.{part}"] for part in VECTORS}, eps=eps, share_below_eps=below)

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
        """Write a safetensors file: the vectors of each layer, provenance as JSON in the metadata. Atomic."""
        tensors = {key: value for name, layer in self.layers.items() for key, value in layer.tensors(name).items()}
        metadata = {"provenance": json_line(self.provenance), "layers": json_line(list(self.layers))}
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
            layers = {name: LayerImportance.from_tensors(tensors, name) for name in json.loads(metadata["layers"])}
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
    batch_size: int | None = None,
    memory: float | None = None,
    partial: str | Path | None = None,
    save_seconds: float = SAVE_SECONDS,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Estimate the relative Fisher importance of each row and column of each layer's weight.

    With g_i the gradient of example i's mean token cross entropy (nats) and c_i its supervised tokens,

        F = sum_i c_i g_i^2 / sum_i c_i          for forget (F_f) and retain (F_r) examples
        R = F_f / (F_r + eps)                    relative[o] = sum_j R[o, j], columns[j] = sum_o R[o, j]

    Default mode: one gradient per example, eps = 0.01 * mean(F_r) of the layer; examples are sorted by length and
    `batch_size` (default 8) changes nothing but speed. `official` is the released recipe: g is the gradient of the
    mean over a whole batch (default 4), c its token count, eps = 1e-5. `eps` overrides either (absolute value). Squares
    are accumulated in float32 whatever the model's dtype.

    The model stays frozen: gradients of the weights are formed from each layer's input and output gradient and
    consumed at once. Only F_r is stored (one float32 matrix a layer), because R is linear in F_f. Where these matrices
    do not fit, `memory` (GiB) splits the layers into groups, each with two passes over the data of its own.

    Where torch.distributed is initialised, each process takes its share of the batches, and all return the same sums.
    With a folder `partial` the sums are saved every `save_seconds` or more, and the same call goes on from them, to
    the same bits; the folder is removed at the end.

    Raises DivergenceError when a gradient is not finite.

    Source: LoKU (arXiv 2408.06621), relative Fisher information; `official` follows the authors' released code.
    """
    official = mode == "official"
    size = batch_size or (OFFICIAL_BATCH if official else BATCH)
    batches = {
        "retain": plan_batches(retain, size, sort=not official),
        "forget": plan_batches(forget, size, sort=not official),
    }
    groups = layer_groups(layers, memory)
    fingerprint = ""
    if partial is not None:
        fingerprint = _fingerprint(model, groups, batches, (mode, eps, dict(provenance or {})))
    journal = Journal(Path(partial) if partial is not None else None, fingerprint, save_seconds)
    position, finished, retain_fisher = journal.start()
    done = {name: LayerImportance.from_tensors(finished, name) for group in groups[: position.group] for name in group}
    report = _Progress(progress, batches, len(groups))
    with frozen(model, train=official):
        for number, group in enumerate(groups):
            if number < position.group:
                continue
            here = position if number == position.group else Position(number)
            run = _Run(model, pad_id, batches, official, journal, report)
            fisher = retain_fisher if here.phase == "forget" else run.retain(group, here)
            if here.phase == "retain":
                journal.save_retain(number, fisher)
                here = Position(number, "forget")
                journal.save(here, {})
            done |= run.forget(group, here, fisher, mode, eps)
            journal.save_finished({k: v for name, layer in done.items() for k, v in layer.tensors(name).items()})
            journal.save(Position(number + 1), {})
            retain_fisher = fisher = {}  # free them before the next group's are made
    journal.clear()
    return Importance({name: done[name] for name in layers}, dict(provenance or {}))


@dataclass
class _Run:
    """The two passes over one group of layers."""

    model: PreTrainedModel
    pad_id: int
    batches: dict[str, list[list[Example]]]
    whole: bool
    journal: Journal
    report: _Progress
    scratch: Scratch = field(default_factory=Scratch)

    def retain(self, group: Layers, here: Position) -> dict[str, Float[Tensor, "out in"]]:
        """Return F_r of each layer."""
        consume = RetainPass(group, self.scratch)
        tokens = self._pass(group, here, consume)
        for fisher in consume.tensors.values():
            fisher.div_(tokens)
        return consume.tensors

    def forget(
        self, group: Layers, here: Position, fisher: dict[str, Tensor], mode: Mode, eps: float | None
    ) -> dict[str, LayerImportance]:
        """Return what the layers' importances come to; `fisher` (F_r) is used up."""
        inverted = {}
        for name, layer in group.items():
            fisher[name] = fisher[name].to(layer.weight.device)
            inverted[name] = invert(fisher[name], lambda mean: _eps(mean, mode, eps))
        consume = ForgetPass(fisher, self.scratch)
        tokens = self._pass(group, here, consume)
        result = {}
        for name in group:
            sums = {part: consume.tensors[f"{name}.{part}"] / tokens for part in ("relative", "forget", "columns")}
            check_finite(name, sums["relative"])
            result[name] = LayerImportance(
                **{part: vector.cpu() for part, vector in sums.items()},
                retain=inverted[name].rows.cpu(),
                eps=inverted[name].eps,
                share_below_eps=inverted[name].share_below_eps,
            )
        return result

    def _pass(self, group: Layers, here: Position, consume: RetainPass | ForgetPass) -> int:
        """Run the rest of a phase's batches, this process's share. Returns the tokens of all processes."""
        rank, size = world()
        tokens = here.tokens
        if here.batches:
            self.journal.restore(consume.tensors)
        with Taps(group, consume, whole=self.whole) as taps:
            for number, batch in enumerate(self.batches[here.phase][rank::size]):
                if number >= here.batches:
                    tokens += backward(self.model, batch, taps, pad_id=self.pad_id)
                    if self.journal.due():
                        self.journal.save(Position(here.group, here.phase, number + 1, tokens), consume.tensors)
                self.report(here, len(batch) * size)
        total = torch.tensor(tokens, device=self.model.device)
        sum_over_processes([total, *consume.tensors.values()])
        return max(int(total), 1)


class _Progress:
    """Turns batches done into examples done of all passes."""

    def __init__(
        self, update: Callable[[int, int], None] | None, batches: dict[str, list[list[Example]]], groups: int
    ) -> None:
        self.update = update
        self.sizes = {phase: sum(map(len, found)) for phase, found in batches.items()}
        self.total = groups * sum(self.sizes.values())
        self.phase = (-1, "")
        self.done = 0

    def __call__(self, here: Position, examples: int) -> None:
        """Count the examples of one batch."""
        if (here.group, here.phase) != self.phase:
            self.phase = (here.group, here.phase)
            self.done = here.group * sum(self.sizes.values()) + (here.phase == "forget") * self.sizes["retain"]
        self.done += examples
        if self.update is not None:
            self.update(min(self.done, self.total), self.total)


def _fingerprint(model: PreTrainedModel, groups: Sequence[Layers], batches: Any, settings: Any) -> str:
    """Return a hash of everything the sums depend on, the weights by their sums only."""
    sums = [float(parameter.detach().sum(dtype=torch.float64)) for parameter in model.parameters()]
    shapes = [[(name, list(layer.weight.shape)) for name, layer in group.items()] for group in groups]
    rows = {phase: [[(e.input_ids, e.labels) for e in batch] for batch in found] for phase, found in batches.items()}
    return sha256_json([sums, str(model.dtype), shapes, rows, settings, world()])


def check_finite(name: str, vector: Tensor) -> None:
    """Raise DivergenceError when a layer's importance is not finite."""
    if not torch.isfinite(vector).all():
        raise DivergenceError(
            f"The Fisher information of layer '{name}' is not finite.",
            "Its gradients overflow before any training: check the model and the data, or try --dtype float32.",
        )


def relative_eps(mean: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the default eps for a layer's mean retain importance.

    A layer that no retain token reaches has mean 0: any positive number keeps the ratio finite and flat.
    """
    return max(RELATIVE_EPS * mean, torch.finfo(dtype).tiny)


def _eps(mean: float, mode: Mode, override: float | None) -> float:
    if override is not None:
        return override
    return OFFICIAL_EPS if mode == "official" else relative_eps(mean)
