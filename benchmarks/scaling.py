"""How time and memory of importance and training grow with rows, sequence length, rank and model size.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json        about 3 minutes on one core

A Llama of 8 million parameters, 16 forget and 16 retain rows of 64 random tokens, rank 16; one of them is changed at a
time. Importance of all rows, then one epoch in batches of 8 + 8. CPU time of one thread, the least of some runs
(other work on the machine only adds), and the peak of torch's allocations above the start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, peak_megabytes, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from loku.adapters.anchor import attach
from loku.adapters.importance import estimate_importance
from loku.adapters.initialisers import initial_factors
from loku.adapters.layers import target_layers
from loku.config import UnlearnOptions
from loku.data.encoding import IGNORE, Example
from loku.guarded_trainer import training_arguments
from loku.trainer import UnlearnTrainer

BASE = {"rows": 16, "length": 64, "rank": 16, "model": 256}
VARIED = {
    "rows": (8, 16, 32, 64, 128),
    "length": (32, 64, 128, 256, 512),
    "rank": (4, 8, 16, 32, 64),
    "model": (128, 256, 384, 512),
}
VOCAB, BATCH, CPU = 4096, 8, torch.device("cpu")


def model_of(width: int) -> LlamaForCausalLM:
    """Return a randomly initialised Llama of 8 layers; its size grows with the square of its width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=8,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=1024,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows_of(count: int, length: int, seed: int) -> list[Example]:
    """Return random rows; a third of each is the question."""
    generator = torch.Generator().manual_seed(seed)
    asked = length // 3
    made = []
    for index in range(count):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append(Example(index, ids, [IGNORE] * asked + ids[asked:], asked, asked))
    return made


def parts(setting: dict[str, int]) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return importance and training at one setting, and the model's parameters."""
    model: Any = model_of(setting["model"])
    parameters = sum(p.numel() for p in model.parameters())
    forget, retain = (rows_of(setting["rows"], setting["length"], seed) for seed in (1, 2))
    layers = target_layers(model)
    measured: Any = model_of(setting["model"])  # without adapters
    rank = setting["rank"]
    adapted = attach(model, layers, initial_factors(layers, "pissa", rank=rank, scaling=2.0), rank=rank, alpha=2 * rank)
    options = UnlearnOptions(batch_size=BATCH, epochs=1.0, save_steps=-1, device="cpu").as_dict()

    def training() -> None:
        with tempfile.TemporaryDirectory() as folder:
            UnlearnTrainer(
                adapted, training_arguments(folder, 1, **options), forget=forget, retain=retain, pad_id=0
            ).train()

    return {
        "importance": lambda: estimate_importance(measured, target_layers(measured), forget, retain, pad_id=0),
        "training": training,
    }, parameters


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, results = environment(threads=1), []
    for varied, values in VARIED.items():
        for value in values:
            runs, parameters = parts(BASE | {varied: value})
            for part, run in runs.items():
                peak = peak_megabytes(run, CPU)[0]  # the warm-up, too
                least = min(seconds(run, CPU, time.process_time) for _ in range(args.rounds))
                x = parameters if varied == "model" else value
                results.append({"varied": varied, "value": x, "part": part, "seconds": least, "peak_megabytes": peak})
                print(f"{varied} {x}: {part} {least:.2f} s, {peak:.0f} MB")
    if args.output:
        args.output.write_text(json.dumps({"about": about, "base": BASE, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
