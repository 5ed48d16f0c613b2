"""The anchored adapter: a trainable LoRA and a frozen one that cancels its starting point.

FILA starts the adapter from (A0, B0) and trains against the residual W - s B0 A0. Writing that residual into the base
would break `disable_adapter()`, ordinary saving and quantised bases. Two ordinary PEFT adapters active together,
trainable (A, B) and frozen anchor (A0, -B0), are the same function of x, W x + s (B A - B0 A0) x, and leave the base
alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from loku.adapters.initialisers import Factors
from loku.adapters.layers import Layers, is_transposed, shortest_targets
from loku.errors import InputError

TRAINED = "default"
ANCHOR = "anchor"


def attach(
    model: PreTrainedModel,
    layers: Layers,
    factors: Mapping[str, Factors],
    *,
    rank: int,
    alpha: float,
) -> PeftModel:
    """Attach a trainable LoRA started at `factors`, and the frozen anchor that cancels it where it is not zero.

    `layers` are the modules to adapt by name (see `target_layers`), `factors` one (A0, B0) for each. The LoRA
    scaling is alpha / rank, dropout is 0 (dropout would drop principal components of the weights), adapter weights
    are float32. The base weights are frozen, never written.
    """
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": shortest_targets(model, layers),
        "fan_in_fan_out": any(is_transposed(layer) for layer in layers.values()),
        "task_type": TaskType.CAUSAL_LM,
    }
    # init_lora_weights=False skips PEFT's own initialisation, which the factors overwrite anyway.
    peft_model = get_peft_model(model, LoraConfig(**config, init_lora_weights=False), adapter_name=TRAINED)
    anchored = any(bool(factor.B.any()) for factor in factors.values())
    if anchored:
        peft_model.add_adapter(ANCHOR, LoraConfig(**config, init_lora_weights=False))
    with torch.no_grad():
        for name, layer in lora_layers(peft_model).items():
            A, B, _ = factors[name]
            layer.lora_A[TRAINED].weight.copy_(A)
            layer.lora_B[TRAINED].weight.copy_(B)
            if anchored:
                layer.lora_A[ANCHOR].weight.copy_(A)
                layer.lora_B[ANCHOR].weight.copy_(-B)  # the sign lives in B: PEFT does not save the scaling
    activate(peft_model)
    return peft_model


def detach(model: nn.Module) -> None:
    """Take all adapters out of a base model again, in place; nothing happens to one without."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the adapted layers by the name they have in the base model."""
    prefix = re.compile(r"^base_model\.model\.")
    return {prefix.sub("", name): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def is_anchored(model: PeftModel) -> bool:
    """Whether the model carries an anchor."""
    return ANCHOR in model.peft_config


def activate(model: PeftModel) -> None:
    """Make the trained adapter and its anchor active together, and only the trained one trainable."""
    names = [TRAINED, ANCHOR] if is_anchored(model) else [TRAINED]
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name and ".lora_" in name)


@contextmanager
def target_model(model: nn.Module) -> Iterator[nn.Module]:
    """Give the target model: the same weights with the adapters off, bit-equal to the base.

    PEFT makes every active adapter trainable when `disable_adapter()` ends, the anchor too; here it is frozen again.
    A model without adapters is given as it is.
    """
    if not isinstance(model, PeftModel):
        yield model
        return
    try:
        with model.disable_adapter():
            yield model
    finally:
        activate(model)


def restore(model: PeftModel, checkpoint: str | Path) -> None:
    """Load both adapters from a Trainer checkpoint and activate both.

    The Trainer of transformers 5.23 re-activates only the first adapter it finds and so drops the anchor.
    """
    for name in model.peft_config:
        folder = Path(checkpoint) if name == TRAINED else Path(checkpoint) / name
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise InputError(
                f"The checkpoint '{checkpoint}' lacks '{file.name}' of the adapter '{name}'.", "Remove it."
            )
        result = set_peft_model_state_dict(model, load_file(file), adapter_name=name)
        if result.unexpected_keys:
            raise InputError(
                f"The checkpoint '{checkpoint}' belongs to another model ({result.unexpected_keys[0]}).",
                "Choose another --output folder.",
            )
    activate(model)


def save_checkpoint(model: PeftModel, folder: str | Path) -> None:
    """Write both adapters: the trained one into the folder, the anchor beneath it."""
    with warnings.catch_warnings():
        # PEFT asks the hub for the base model's vocabulary; there is none for a local or unnamed base.
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(str(folder), save_embedding_layers=False)
