"""The estimate of memory: counted against formulas where they are exact, and against a measured peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.adapters.anchor import attach
from loku.adapters.initialisers import initial_factors
from loku.adapters.layers import parameter_share, target_layers
from loku.bench.footprint import Batch, finetuning_footprint, kept_bytes, skeleton, unlearning_footprint
from loku.config import FinetuneOptions, UnlearnOptions, resolve

WITHIN = 0.35  # as docs and module say


def unlearn_options(**values):
    return resolve(UnlearnOptions, {"rank": 4} | values, {})


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_weights_and_trained_share_are_those_of_the_real_model(architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    found = unlearning_footprint(model.config, unlearn_options(method="ihl"), Batch(2, 12, 8), Batch(2, 12, 8))
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    factors = initial_factors(layers, "lora", rank=4, scaling=2.0, seed=0)
    assert (found.trained, found.share) == parameter_share(attach(model, layers, factors, rank=4, alpha=8))
    assert found.gradients == 4 * found.trained
    assert found.optimiser == 8 * found.trained


def test_an_anchor_and_the_importance_pass_are_counted_where_there_are_any():
    config, batch = tiny_model().config, Batch(2, 12, 8)
    plain = unlearning_footprint(config, unlearn_options(method="ihl"), batch, batch)
    anchored = unlearning_footprint(config, unlearn_options(method="loku"), batch, batch)
    pissa = unlearning_footprint(config, unlearn_options(method="ihl", init="pissa"), batch, batch)
    assert (plain.importance, pissa.importance) == (0, 0)
    sums = 4 * sum(layer.weight.numel() for layer in target_layers(tiny_model()).values())
    assert anchored.importance >= sums
    assert plain.adapter == 4 * plain.trained
    assert anchored.adapter == pissa.adapter == 2 * plain.adapter


def test_without_a_retain_term_only_the_forget_pass_counts():
    config, batch = tiny_model().config, Batch(2, 12, 8)
    both = unlearning_footprint(config, unlearn_options(method="graddiff"), batch, batch)
    one = unlearning_footprint(config, unlearn_options(method="ga"), batch, batch)
    assert 2 * one.activations == both.activations
    assert one.head < both.head


def test_all_weights_are_as_many_gradients_and_twice_as_many_moments():
    config, batch = tiny_model().config, Batch(2, 12, 8)
    full = unlearning_footprint(config, unlearn_options(method="graddiff", tune="full"), batch, batch)
    assert full.share == 1.0
    assert (full.gradients, full.optimiser, full.adapter) == (full.weights, 2 * full.weights, 0)
    copied = unlearning_footprint(config, unlearn_options(method="kl", tune="full"), batch, batch)
    assert copied.weights == 2 * full.weights  # the target model is kept beside


def test_of_a_model_trained_in_part_only_that_part_moves():
    config, batch = tiny_model().config, Batch(2, 12, 8)
    some = unlearning_footprint(config, unlearn_options(method="ga", tune="full", tune_layers=1), batch, None)
    model = tiny_model()
    last = sum(p.numel() for p in model.model.layers[-1].parameters())
    assert some.trained == last
    assert some.share == last / sum(p.numel() for p in model.parameters())
    assert (some.gradients, some.optimiser) == (4 * last, 8 * last)
    every = unlearning_footprint(config, unlearn_options(method="ga", tune="full"), batch, None)
    assert some.weights == every.weights
    assert some.activations < every.activations


def test_the_released_importance_reads_smaller_batches():
    config, batch = tiny_model().config, Batch(2, 12, 8)
    ours, released, set_by_hand = (
        unlearning_footprint(config, unlearn_options(method="ihl", **more), batch, batch).importance
        for more in ({"init": "fila"}, {"init": "fila-official"}, {"init": "fila", "importance_batch_size": 4})
    )
    assert released == set_by_hand < ours


def test_activations_grow_with_rows_and_shrink_with_checkpointing():
    model = skeleton(tiny_model().config, "float32")
    one, two = (kept_bytes(model, Batch(rows, 12, 8)) for rows in (1, 2))
    # All but the position tables, which the rows share.
    assert one < two <= 2 * one
    assert two - one == kept_bytes(model, Batch(3, 12, 8)) - two
    options = {"data": "rows"}
    plain = finetuning_footprint(model.config, resolve(FinetuneOptions, dict(options), {}), Batch(8, 200, 200))
    less = finetuning_footprint(
        model.config, resolve(FinetuneOptions, options | {"activation_checkpointing": True}, {}), Batch(8, 200, 200)
    )
    assert less.activations < plain.activations


def test_attention_is_counted_as_a_fused_kernel_keeps_it():
    """No tokens x tokens matrix for Llama; one for each head and layer of GPT-Neo, which makes it itself."""
    sizes = {}
    for architecture in ("llama", "gpt_neo"):
        model = skeleton(tiny_model(architecture).config, "float32")
        lengths = (32, 64, 128)
        found = [kept_bytes(model, Batch(1, tokens, tokens)) for tokens in lengths]
        sizes[architecture] = found[2] - 2 * found[1] - (found[1] - 2 * found[0])  # what is not linear
    assert sizes["llama"] == 0
    assert sizes["gpt_neo"] > 0


def test_half_precision_halves_the_weights_and_not_the_adapter():
    config, batch = tiny_model().config, Batch(2, 12, 8)
    single, half = (
        unlearning_footprint(config, unlearn_options(method="ihl", dtype=kind), batch, batch)
        for kind in ("float32", "bfloat16")
    )
    assert half.weights * 2 == single.weights
    assert half.adapter == single.adapter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "settings"), [("unlearn", {"method": "ihl", "rank": 8, "evaluate": False}), ("finetune", {})]
)
def test_the_estimate_is_near_the_measured_peak(tmp_path, verb, settings):
    tokenizer = byte_level_tokenizer()
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 8, "max_position_embeddings": 512}  # fmt: skip
    for name, more in (("real", sizes), ("tiny", {})):
        tiny_model("llama", **more).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"text": " ".join(f"{i * j % 97}" for j in range(1, 400))} for i in range(1, 9)]
    for file in ("forget.jsonl", "retain.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"text": f"Then {row['text']}"} for row in rows]
    settings = settings | {"max_steps": 2, "batch_size": 8, "grad_accum": 1, "max_length": 256, "save_steps": -1}
    if verb == "unlearn":
        settings["retain"] = str(tmp_path / "retain.jsonl")
    script = Path(__file__).with_name("peak_of_a_run.py")
    pairs = [f"{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, script, verb, tmp_path / "real", tmp_path / "tiny", tmp_path / "forget.jsonl",
         tmp_path / "out", *pairs],
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("grown ")[1])
    config, batch = AutoConfig.from_pretrained(tmp_path / "real"), Batch(8, 256, 8 * 255)
    if verb == "unlearn":
        found = unlearning_footprint(config, resolve(UnlearnOptions, dict(settings), {}), batch, batch)
    else:
        found = finetuning_footprint(config, resolve(FinetuneOptions, dict(settings), {}), batch)
    print(f"{verb}: estimated {found.peak / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert abs(measured / found.peak - 1) < WITHIN
