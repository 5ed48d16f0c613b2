"""A first estimate of a run's memory, from a model that has shapes but no numbers (torch's meta device).

    peak = weights + max(importance, training)
    importance = 4 bytes for every adapted weight (the retain sums), and the activations of its batch
    training = trained and anchor weights + gradients + two moments of AdamW + activations + head

Activations are counted, not derived: the tensors that autograd keeps of one forward pass over the longest batch, each
storage once, forget and retain pass together, since both are alive when the backward pass begins. Attention counts as
a fused kernel keeps it (queries, keys, values, output, one number a row); models that build the matrix of attention
weights themselves, such as GPT-Neo, are counted with it. The head counts as `scores_from_hidden` needs it, or, for
losses that look at whole distributions and for finetuning, as the tokens x vocabulary logits that they make.

What is left out: the libraries themselves, what the allocator wastes, buffers that live within one operation. The
estimate lies within 35 % of what was measured on a CPU (tests/bench/test_footprint.py); it is no promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loku.adapters.importance import BATCH, OFFICIAL_BATCH
from loku.adapters.initialisers import initialiser_of
from loku.adapters.layers import Layers, is_transposed, parameter_share, shortest_targets, target_layers
from loku.config import FinetuneOptions, UnlearnOptions
from loku.forward import unfreeze
from loku.losses.lm_head import HeadSpec, last_hidden_state
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES
from loku.losses.tiles import default_tile
from loku.objective import COPIED

LOGITS = ("positions", "logits", "reference_logits")  # needs of losses that look at whole distributions


@dataclass(frozen=True)
class Batch:
    """The longest batch that a run can meet: sequences, their tokens, and the supervised tokens among all of them."""

    rows: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Footprint:
    """What a process holds, in bytes, and how many weights it trains; `share` is their part of the model's own."""

    trained: int
    share: float
    weights: int
    importance: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    head: int

    @property
    def peak(self) -> int:
        """Weights, and the larger of the two phases."""
        training = self.adapter + self.gradients + self.optimiser + self.activations + self.head
        return self.weights + max(self.importance, training)


def skeleton(config: Any, dtype: str = "auto") -> nn.Module:
    """Return a model of a configuration without weights. `auto` is the configuration's own type."""
    from transformers import AutoModelForCausalLM

    stored = getattr(config, "dtype", None)
    kind = (stored if isinstance(stored, torch.dtype) else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=kind)
    return model


def finetuning_footprint(config: Any, options: FinetuneOptions, batch: Batch) -> Footprint:
    """Estimate one process of `loku finetune`: all weights are trained, and all logits are made."""
    model = skeleton(config, "float32" if options.dtype == "auto" else options.dtype)
    weights = _bytes(model.parameters())
    vocab = _head(model).out_features
    return Footprint(
        trained=sum(p.numel() for p in model.parameters()),
        share=1.0,
        weights=weights,
        importance=0,
        adapter=0,
        gradients=weights,
        optimiser=2 * weights,
        activations=_activations(model, [batch], checkpointed=options.activation_checkpointing),
        # the logits, their log-softmax in float32, and the gradient of both
        head=batch.rows * batch.tokens * vocab * (2 * _width(model) + 8),
    )


def unlearning_footprint(config: Any, options: UnlearnOptions, forget: Batch, retain: Batch | None) -> Footprint:
    """Estimate one process of `loku unlearn`; without a retain term `retain` is None."""
    full = options.tune == "full"
    model = skeleton(config, "float32" if full and options.dtype == "auto" else options.dtype)
    weights = _bytes(model.parameters())
    needs = [FORGET_LOSSES[options.forget_loss].needs, RETAIN_LOSSES[options.retain_loss].needs]
    passes = [(forget, needs[0])] + ([(retain, needs[1])] if retain is not None and options.retain_weight else [])
    # a loss that compares with other answers runs them as well: about as long a batch again
    passes += [(batch, ("scores",)) for batch, found in passes if "alternate" in found]
    importance = 0
    if full:
        adapter = 0
        unfreeze(model, options.tune_layers)
        trained, share = parameter_share(model)
        if any(need in COPIED for _, found in passes for need in found):
            weights *= 2  # the target model is kept beside the one that is trained
        moving = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    else:
        layers = target_layers(model, options.targets)
        anchored = initialiser_of(options.init).needs is not None or options.init == "pissa"
        importance = _importance(model, layers, options, forget)
        model = _adapted(model, layers, options, anchored=anchored)
        trained, share = parameter_share(model)
        moving = 4 * trained  # adapters are float32
        adapter = moving * (2 if anchored else 1)
    head = sum(_head_bytes(model, batch, found) for batch, found in passes)
    return Footprint(
        trained=trained,
        share=share,
        weights=weights,
        importance=importance,
        adapter=adapter,
        gradients=moving,
        optimiser=2 * moving,
        activations=_activations(
            model, [b for b, _ in passes], checkpointed=options.activation_checkpointing, layers=options.tune_layers
        ),
        head=head,
    )


def _importance(model: nn.Module, layers: Layers, options: UnlearnOptions, forget: Batch) -> int:
    """Return what the importance pass holds beside the weights: float32 sums, and a batch's activations."""
    if initialiser_of(options.init).needs != "fisher":
        return 0
    sums = 4 * sum(layer.weight.numel() for layer in layers.values())
    if options.importance_memory is not None:
        sums = min(sums, int(options.importance_memory * 2**30))
    usual = OFFICIAL_BATCH if options.init.endswith("-official") else BATCH
    rows = options.importance_batch_size or usual
    return sums + _activations(model, [Batch(rows, forget.tokens, 0)], checkpointed=options.activation_checkpointing)


def _adapted(model: nn.Module, layers: Layers, options: UnlearnOptions, *, anchored: bool) -> nn.Module:
    """Return the model with adapters of the right shapes, as `loku.adapters.anchor.attach` puts them there."""
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha,
        target_modules=shortest_targets(model, layers),
        init_lora_weights=False,
        fan_in_fan_out=any(is_transposed(layer) for layer in layers.values()),
    )
    with torch.device("meta"):
        adapted = get_peft_model(model, settings)
        if anchored:
            adapted.add_adapter("anchor", settings)
            adapted.base_model.set_adapter(["default", "anchor"])
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad_(".default." in name)
    return adapted


def _activations(model: nn.Module, batches: list[Batch], *, checkpointed: bool, layers: int | None = None) -> int:
    """Return the bytes that autograd keeps of one forward pass over each batch, each storage counted once.

    `layers` is how many of the model's layers keep anything; None: all of them.
    """
    found = sum(kept_bytes(model, batch) for batch in batches)
    if not checkpointed:
        return found
    layers = layers or int(getattr(_text_config(model), "num_hidden_layers", 1))
    inputs = sum(batch.rows * batch.tokens for batch in batches) * _head(model).in_features * _width(model)
    return inputs * layers + found // layers  # each layer's input, and one layer at a time


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """Count what autograd keeps of a forward pass to the states that enter the head."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that its address is not used again
        return tensor

    ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long, device="meta")
    # A mask of four dimensions is taken as it is: making one from two would look at values, and here are none.
    mask = torch.ones(batch.rows, 1, batch.tokens, batch.tokens, dtype=torch.bool, device="meta")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.device("meta"), _fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if trained:
            last_hidden_state(model, {"input_ids": ids, "attention_mask": mask}, HeadSpec(_head(model)))
    return sum(size for size, _ in kept.values())


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention be counted as fused kernels keep it; on the meta device torch would take the slow path apart."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        yield


def _head_bytes(model: nn.Module, batch: Batch, needs: tuple[str, ...]) -> int:
    """Return what turning states into a loss holds: tiles of the vocabulary, or logits and their copies."""
    head = _head(model)
    if any(need in LOGITS for need in needs):
        copies = 2 if "reference_logits" in needs else 1
        all_positions = batch.rows * batch.tokens * head.out_features * _width(model) * copies
        return all_positions + 12 * batch.supervised * head.out_features * copies  # float32: logits, softmax, gradient
    tile = min(default_tile(head.in_features, head.weight.dtype), head.out_features)
    return 4 * batch.supervised * (3 * tile + 4 * head.in_features)


def _head(model: Any) -> nn.Linear:
    found: nn.Linear = model.get_output_embeddings()
    return found


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _width(model: nn.Module) -> int:
    """Return the bytes of one weight."""
    return _head(model).weight.element_size()


def _bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
