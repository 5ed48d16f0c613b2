"""Models and tokenizers from folders or the hub, checked before any work starts."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loku.errors import InputError


def pick_device(device: str | None) -> torch.device:
    """Return the device asked for, or a GPU when there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device '{device}' is not a device.", "Give cpu, cuda or cuda:<number>.") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device '{device}' was given, but torch sees no GPU here.", "Leave --device out.")
    return picked


def check_model_source(name: str | None, *, option: str = "--model") -> str:
    """Raise InputError unless `name` can be a model: an existing folder with a configuration, or a hub id."""
    if not name:
        raise InputError(f"{option} is missing.", "Give a model folder or a hub id such as owner/name.")
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return name
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{option} '{name}' is an adapter, not a model.",
                "Give its base model; an adapter goes to `loku evaluate --adapter`, or merge it with `loku export`.",
            )
        raise InputError(f"{option} '{name}' holds no config.json.", "Give a folder written by save_pretrained.")
    if folder.is_file() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"{option} '{name}' does not exist as a folder.", "Check the path, or give a hub id owner/name."
        )
    return name


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration and refuse quantised weights."""
    check_model_source(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The model '{name}' cannot be loaded: {str(error).splitlines()[0]}",
            "Check the name and the connection, or give a local folder; a model with its own code needs "
            "--trust-remote-code.",
        ) from error
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        kind = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise InputError(
            f"The model '{name}' is quantised ({kind}).",
            "Give the floating-point model it was made from: importance, FILA and merging need the real weights.",
        )
    return config


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    adapter: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode, with an adapter on it if one is given."""
    load_config(name, trust_remote_code=trust_remote_code)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"The weights of '{name}' cannot be loaded: {str(error).splitlines()[0]}",
            "Give a whole causal language model, as save_pretrained writes it.",
        ) from error
    model.to(pick_device(device)).eval()
    return load_adapter(model, adapter) if adapter else model


def load_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Put an adapter folder on a model, by PEFT, ready for inference."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"--adapter '{adapter}' holds no adapter_config.json.", "Give the `adapter` folder of a run.")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, adapter).eval()
        except (OSError, RuntimeError, ValueError, KeyError, UserWarning, SafetensorError) as error:
            raise InputError(
                f"--adapter '{adapter}' does not fit this model: {str(error).splitlines()[0]}",
                "Give the base model that the adapter was trained on (see its adapter_config.json).",
            ) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer; it must know an end of sequence. Without a padding token the end of sequence pads."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The tokenizer of '{name}' cannot be loaded: {str(error).splitlines()[0]}",
            "Save the tokenizer into the model folder (tokenizer.save_pretrained).",
        ) from error
    return check_tokenizer(tokenizer, name)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str = "this model") -> PreTrainedTokenizerBase:
    """Refuse a tokenizer without end of sequence; give it a padding token when it has none."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of '{name}' has no end-of-sequence token.",
            "Set one (tokenizer.eos_token = ...): without it no answer ever ends.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: attention masks come from lengths, not from ids
    return tokenizer


def weights_sha256(model: nn.Module) -> str:
    """Return a SHA-256 over all weights: names, types, shapes and bytes, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        stored = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{stored.dtype}|{tuple(stored.shape)}|".encode())
        digest.update(stored.reshape(-1).view(torch.uint8).numpy().tobytes() if stored.numel() else b"")
    return digest.hexdigest()
