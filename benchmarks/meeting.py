"""What each way in which the two gradients meet costs: time and peak memory of a training step.

    python benchmarks/meeting.py --output benchmarks/results/meeting.json        about 3 minutes on one core

A 30M Llama, batches of 4 forget and 4 retain sequences of 40 to 80 tokens, two micro-batches a step; a LoRA of rank 16
on all linear layers, and all weights. All ways run in every round, one after the other; ratios to the weighted sum are
taken within a round. The clock is the process's CPU time on one thread. Memory is the peak of torch's allocations in a
step.
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
from measure import environment, peak_megabytes, seconds, summary
from transformers import LlamaConfig, LlamaForCausalLM

from loku.adapters.anchor import attach
from loku.adapters.initialisers import initial_factors
from loku.adapters.layers import target_layers
from loku.config import UnlearnOptions
from loku.data.encoding import IGNORE, Example
from loku.guarded_trainer import training_arguments
from loku.trainer import UnlearnTrainer

WAYS = ("sum", "primal-dual", "pcgrad", "gru")
VOCAB = 16_000


def model_30m() -> LlamaForCausalLM:
    """Return a randomly initialised Llama of 30 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def examples(count: int, seed: int) -> list[Example]:
    """Return random question and answer sequences of TOFU's lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(40, 80, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append(Example(index, ids, [IGNORE] * 20 + ids[20:], 20, 20))
    return made


def stepper(tune: str, combine: str, folder: str) -> Callable[[], None]:
    """Return a function that makes one optimiser step's forward and backward passes (two micro-batches)."""
    model: Any = model_30m()
    if tune == "lora":
        layers = target_layers(model)
        model = attach(model, layers, initial_factors(layers, "lora", rank=16, scaling=2.0), rank=16, alpha=32)
    options = UnlearnOptions(batch_size=4, grad_accum=2, save_steps=-1, device="cpu").as_dict()
    forget, retain = examples(8, 1), examples(8, 2)
    bound = 1.0 if combine == "primal-dual" else None
    trainer = UnlearnTrainer(
        model, training_arguments(folder, 1, **options), forget=forget, retain=retain, pad_id=0, combine=combine,
        retain_bound=bound,
    )  # fmt: skip
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(k, k + 4)]) for k in (0, 4)]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))

    def step() -> None:
        for last, batch in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(bool(last))
            trainer.training_step(trainer.model, batch, items)
        trainer.model.zero_grad()

    return step


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, device, results = environment(threads=1), torch.device("cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        for tune in ("lora", "full"):
            steps = {way: stepper(tune, way, folder) for way in WAYS}
            peak = {way: peak_megabytes(step, device)[0] for way, step in steps.items()}  # the warm-up, too
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way, step in steps.items():
                    times[way].append(seconds(step, device, time.process_time))
            for way in WAYS:
                ratios = [a / b for a, b in zip(times[way], times["sum"], strict=True)]
                entry = {
                    "tune": tune,
                    "combine": way,
                    "seconds": summary(times[way]),
                    "time_over_sum": summary(ratios),
                    "peak_megabytes": peak[way],
                    "memory_over_sum": peak[way] / peak["sum"],
                }
                results.append(entry)
                print(f"{tune:5} {way:12} {entry['time_over_sum']['median']:.2f}x time, {peak[way]:.0f} MB")
    if args.output:
        args.output.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
