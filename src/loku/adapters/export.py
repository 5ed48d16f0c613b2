"""From the anchored adapter to what others can load: an ordinary LoRA, a truncated one, a merged model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from loku.adapters.anchor import ANCHOR, TRAINED, is_anchored, lora_layers
from loku.errors import InputError
from loku.files import write_json

# Settings of PEFT whose adapters are more, or scaled otherwise, than alpha / r * B A.
BEYOND_LORA = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


@dataclass(frozen=True)
class PortableLora:
    """An ordinary LoRA on the untouched base: factors by layer name, in float32, and its PEFT settings."""

    A: dict[str, Float[Tensor, "rank in"]]
    B: dict[str, Float[Tensor, "out rank"]]
    rank: int
    scaling: float
    target_modules: list[str]
    fan_in_fan_out: bool

    def delta(self, name: str) -> Float[Tensor, "out in"]:
        """Return the change of one layer's weight, scaling * B A."""
        return self.scaling * (self.B[name] @ self.A[name])

    def scaled(self, factor: float) -> PortableLora:
        """Return the same adapter with its change of the weights times `factor`."""
        return dataclasses.replace(self, scaling=self.scaling * factor)

    def save(self, folder: str | Path, *, base_model: str | None, dtype: torch.dtype = torch.float32) -> Path:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT and the hub expect them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name in self.A:
            for letter, factors in (("A", self.A), ("B", self.B)):
                tensors[f"base_model.model.{name}.lora_{letter}.weight"] = factors[name].to("cpu", dtype).contiguous()
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.scaling * self.rank,
            lora_dropout=0.0,
            target_modules=sorted(self.target_modules),
            fan_in_fan_out=self.fan_in_fan_out,
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base_model,
        ).to_dict()
        write_json(
            folder / "adapter_config.json", {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        )
        return folder


def portable_lora(model: PeftModel) -> PortableLora:
    """Fold the anchor into one ordinary LoRA on the original base.

    Without an anchor that is the adapter itself. With one the rank doubles:

        B A - B0 A0 = [B | B - B0] [A - A0 ; A0]

    which, unlike concatenating the two adapters, has no large terms that cancel when cast to half precision.
    """
    config = model.peft_config[TRAINED]
    A, B = {}, {}
    for name, layer in lora_layers(model).items():
        a, b = (part[TRAINED].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
        if is_anchored(model):
            a0, b0 = layer.lora_A[ANCHOR].weight.detach().float(), -layer.lora_B[ANCHOR].weight.detach().float()
            a, b = torch.cat([a - a0, a0]), torch.cat([b, b - b0], dim=1)
        A[name], B[name] = a.clone(), b.clone()
    return PortableLora(
        A=A,
        B=B,
        rank=config.r * (2 if is_anchored(model) else 1),
        scaling=config.lora_alpha / config.r,
        target_modules=list(config.target_modules),
        fan_in_fan_out=config.fan_in_fan_out,
    )


@dataclass(frozen=True)
class Truncated:
    """A LoRA of smaller rank, and what it lost.

    `error` is the relative Frobenius error of all weight changes together, `worst` that of the worst layer.
    """

    lora: PortableLora
    error: float
    worst: float


def truncate(lora: PortableLora, rank: int) -> Truncated:
    """Approximate every layer's change by its best one of rank r (truncated SVD), and measure the error.

    The SVD is taken of the small core R_B R_A^T of two QR factorisations, so no full matrix is formed.
    """
    if not 1 <= rank <= lora.rank:
        raise InputError(
            f"--rank {rank} is outside 1 to {lora.rank}.", f"This adapter has rank {lora.rank}; give less."
        )
    A, B = {}, {}
    lost = total = worst = 0.0
    for name in lora.A:
        Q_b, R_b = torch.linalg.qr(lora.B[name].double())
        Q_a, R_a = torch.linalg.qr(lora.A[name].double().T)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.T)
        kept = min(rank, len(S))
        root = S[:kept].sqrt()
        pad = rank - kept
        A[name] = torch.nn.functional.pad((root.unsqueeze(1) * Vh[:kept]) @ Q_a.T, (0, 0, 0, pad)).float()
        B[name] = torch.nn.functional.pad(Q_b @ (U[:, :kept] * root), (0, pad)).float()
        square, layer_lost = float(S.square().sum()), float(S[kept:].square().sum())
        lost, total = lost + layer_lost, total + square
        worst = max(worst, (layer_lost / square) ** 0.5 if square else 0.0)
    truncated = PortableLora(A, B, rank, lora.scaling, lora.target_modules, lora.fan_in_fan_out)
    return Truncated(truncated, error=(lost / total) ** 0.5 if total else 0.0, worst=worst)


def merged_weights(base: PreTrainedModel, lora: PortableLora) -> dict[str, Tensor]:
    """Return the base model's state dict with the changes added, computed in float32 and cast back.

    The base is not written: only the adapted weights are new tensors.
    """
    state: dict[str, Tensor] = dict(base.state_dict())
    for name in lora.A:
        key = f"{name}.weight"
        delta = lora.delta(name)
        stored = state[key]
        if lora.fan_in_fan_out:
            delta = delta.T
        state[key] = (stored.float() + delta.to(stored.device)).to(stored.dtype)
    return state


def check_fits_base(base: PreTrainedModel, lora: PortableLora, name: str) -> None:
    """Raise InputError when the adapter changes a weight that the base called `name` lacks or has in another size."""
    sizes = {key: tuple(weight.shape) for key, weight in base.state_dict().items()}
    for layer in lora.A:
        size = (lora.B[layer].shape[0], lora.A[layer].shape[1])
        if sizes.get(f"{layer}.weight") != (size[::-1] if lora.fan_in_fan_out else size):
            raise InputError(
                f"The adapter changes '{layer}' ({size[0]} x {size[1]}), which '{name}' does not have.",
                "Give the base model that the adapter was trained on with --model.",
            )


def save_merged(base: PreTrainedModel, lora: PortableLora, folder: str | Path) -> Path:
    """Write a full model folder with the adapter merged in, in the base's dtype."""
    base.save_pretrained(str(folder), state_dict=merged_weights(base, lora))
    return Path(folder)


def load_lora(folder: str | Path) -> PortableLora:
    """Read an ordinary LoRA folder back. Raises InputError when it is something else."""
    import json

    from safetensors.torch import load_file

    folder = Path(folder)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (config_file.is_file() and weights_file.is_file()):
        raise InputError(
            f"'{folder}' is not an adapter folder: it lacks {config_file.name} or {weights_file.name}.",
            "Give the `adapter` folder of a finished run.",
        )
    config: Mapping = json.loads(config_file.read_text())
    beyond = [name for name in BEYOND_LORA if config.get(name)]
    beyond += [key for key in load_file(weights_file) if not key.endswith((".lora_A.weight", ".lora_B.weight"))][:1]
    if config.get("peft_type") != "LORA" or beyond or isinstance(config["target_modules"], str):
        raise InputError(
            f"'{folder}' is not an ordinary LoRA ({', '.join(beyond) or 'by its adapter_config.json'}).",
            "Give an adapter that `loku` wrote.",
        )
    factors: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in load_file(weights_file).items():
        name, letter = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        factors[letter][name] = tensor.float()
    return PortableLora(
        A=factors["A"],
        B=factors["B"],
        rank=config["r"],
        scaling=config["lora_alpha"] / config["r"],
        target_modules=list(config["target_modules"]),
        fan_in_fan_out=config["fan_in_fan_out"],
    )
