"""Small models and tokenizers that the tests make themselves: nothing is downloaded."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CORPUS = [
    "Question: Where was Mira Voss born? Answer: Mira Voss was born in Tarnhollow.",
    "Question: What does Odo Brill paint? Answer: Odo Brill paints lighthouses at dusk.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; (then) rests!",
    'Who wrote it? She wrote it. They did not, or so he says: "perhaps".',
]

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# Settings that make a tiny model of each architecture; vocabulary and special tokens are added by `tiny_model`.
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": SMALL,
    "qwen3": SMALL | {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": SMALL | {"sliding_window": None},
    "gemma3_text": SMALL | {"head_dim": 8, "sliding_window": 64},
    "phi": SMALL | {"num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": SMALL | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 256,
        "window_size": 64,
    },
    "gpt_neox": SMALL | {"num_key_value_heads": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "olmo": SMALL,
    "olmo2": SMALL,
}


@cache
def byte_level_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (GPT-2's kind): leading spaces belong to the following word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def tiny_model(
    architecture: str = "llama", *, seed: int = 0, vocab_size: int | None = None, **settings: object
) -> PreTrainedModel:
    """A randomly initialised model of one architecture, in eval mode, float32."""
    tokenizer = byte_level_tokenizer()
    options = dict(ARCHITECTURES[architecture]) | {
        "vocab_size": vocab_size or len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    options |= settings
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def serve(monkeypatch, rows):
    """Let `datasets.load_dataset` answer as the hub would: `rows(config, split)`. Returns what is asked for."""
    import datasets

    asked = []

    def load_dataset(name, config=None, *, split=None):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(rows(config, split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked
