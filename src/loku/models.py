"""Models and tokenizers from folders or the hub, checked before any work starts."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loku.errors import InputError


def pick_device(device: str | None) -> torch.device:
    """Return the device asked for, or a GPU when there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device '{device}' is not a device.", "Give cpu, cuda or cuda:<number>.") from error
    count = _device_count(picked.type)
    if not 0 <= (picked.index or 0) < count:
        found = f"only {count} of that kind" if count else "none of that kind"
        raise InputError(
            f"--device '{device}' was given, but torch can use {found} here.", "Leave --device out, or give another."
        )
    return picked


def _device_count(kind: str) -> int:
    """Return how many devices of a kind torch can compute on here."""
    try:
        return int(torch.get_device_module(kind).device_count())
    except RuntimeError:  # "meta" and the like: torch knows the word, but no such device
        return 0


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


def load_config(name: str, *, trust_remote_code: bool = False, quantised: bool = False, option: str = "--model") -> Any:
    """Load a model's configuration.

    Raises InputError when there is none, when it is not that of a causal language model, and, unless `quantised` is
    allowed, for quantised weights.
    """
    check_model_source(name, option=option)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The model '{name}' cannot be loaded: {_first_line(error)}",
            "Check the name and the connection, or give a local folder; a model with its own code needs "
            "--trust-remote-code.",
        ) from error
    if not is_causal(config):
        raise InputError(
            f"The model '{name}' ({config.model_type}) is not a causal language model.",
            "Give one that writes a text from left to right, such as Llama, Qwen or GPT-2.",
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None and not quantised:
        kind = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise InputError(
            f"The model '{name}' is quantised ({kind}).",
            "Give the floating-point model it was made from: importance, FILA and merging need the real weights.",
        )
    return config


def _first_line(error: Exception) -> str:
    """Return the first line that an error says; some of transformers' begin with empty ones, some say nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def is_causal(config: Any) -> bool:
    """Return whether a configuration is that of a model that writes from left to right, without an encoder."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return True  # the repository's own code says so
    if type(config) not in AutoModelForCausalLM._model_mapping or getattr(config, "is_encoder_decoder", False):
        return False
    # BERT's kind can be either: without `is_decoder` a token also sees those that come after it.
    return type(config) not in AutoModelForMaskedLM._model_mapping or getattr(config, "is_decoder", True)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    adapter: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    quantised: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode, with an adapter on it if one is given.

    `quantised` weights are refused unless allowed: they can be measured, and nothing else. Raises InputError when the
    folder or repository lacks weights, or holds other sizes than its configuration says.
    """
    picked = pick_device(device)
    config = load_config(name, trust_remote_code=trust_remote_code, quantised=quantised)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    is_quantised = getattr(config, "quantization_config", None) is not None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch_dtype,
            device_map={"": picked} if is_quantised else None,  # packed weights are placed once and not moved
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(
            f"The weights of '{name}' cannot be loaded: {_first_line(error)}",
            "Give a whole causal language model, as save_pretrained writes it.",
        ) from error
    _check_whole(name, loading)
    if not is_quantised:
        model.to(picked)
    model.eval()
    return load_adapter(model, adapter) if adapter else model


def _check_whole(name: str, loading: Mapping[str, Collection[Any]]) -> None:
    """Raise InputError when weights were missing or had another size: transformers fills them with random numbers."""
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have another size for")):
        found = sorted(str(item[0] if isinstance(item, tuple) else item) for item in loading.get(key) or ())
        if found:
            others = f" and {len(found) - 1} others" if len(found) > 1 else ""
            raise InputError(
                f"The weights of '{name}' {what} '{found[0]}'{others}.",
                "Give a whole causal language model, as save_pretrained writes it.",
            )


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read at most, or None when its configuration does not say."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Raise InputError when a sequence of `longest` tokens, or an id of the tokenizer, is beyond what a model can read.

    Without this both end in an index error, or on a GPU in a failed assertion, somewhere inside the work.
    """
    context = context_length(model)
    if context is not None and longest > context:
        raise InputError(
            f"The longest row has {longest} tokens, but the model reads {context} at most.",
            f"Give --max-length {context} or less: long texts are then cut into windows, long answers cut short.",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"The tokenizer has ids up to {largest}, but the model's embedding has {rows} rows.",
            "Give the tokenizer that belongs to the model, or resize the model (model.resize_token_embeddings).",
        )


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
                f"--adapter '{adapter}' does not fit this model: {_first_line(error)}",
                "Give the base model that the adapter was trained on (see its adapter_config.json).",
            ) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer; it must know an end of sequence. Without a padding token the end of sequence pads."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The tokenizer of '{name}' cannot be loaded: {_first_line(error)}",
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
