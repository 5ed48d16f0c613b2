"""Train a target or a retain-only model: plain fine-tuning on answer tokens, or a small new model from scratch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from loku.answer_trainer import AnswerTrainer
from loku.config import FinetuneOptions
from loku.data.encoding import EncodedSet, Encoder
from loku.data.prompts import resolve_template, save_template
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.guarded_trainer import TrainingProgress, check_finite, steps_per_epoch, training_arguments
from loku.models import check_fits, is_causal, load_config, load_model, load_tokenizer, pick_device, weights_sha256
from loku.progress import console, progress
from loku.runs import MetricsLog, RunFolder, check_tracker, peak_memory_bytes


def finetune(options: FinetuneOptions) -> Path:
    """Fine-tune a model on rows and write a model folder. An interrupted run in that folder is resumed.

    Run it twice from the same model, once on all rows and once without the forget rows, for a target model and its
    retain-only reference. Raises InputError before any work when something given cannot be used.
    """
    check_tracker(options.report_to)
    run = RunFolder.check(options.output, options.as_dict())
    if not options.data:
        raise InputError("--data is missing.", "Give the rows to learn: a file, a dataset folder or a hub id.")
    return fit(options, run, load_records(options.data, option="--data", data_dir=options.data_dir))


def fit(
    options: FinetuneOptions,
    run: RunFolder,
    records: RecordSet,
    *,
    whole: RecordSet | None = None,
    command: str = "finetune",
    data: dict[str, Any] | None = None,
) -> Path:
    """Train on records and write a model folder, or resume it; `data` is what run.json says of the rows.

    With `whole`, the set that the records are a part of, training takes the steps that the whole would take, and a new
    model's tokenizer is made from the whole: as for the model that it is compared with.
    """
    model, tokenizer = _starting_point(options, whole or records)
    template = resolve_template(tokenizer, options.model, options.prompt_template)
    encoder = Encoder(tokenizer, template, options.max_length)
    encoded = encoder.encode_records(records, option="--data")
    counts = encoded.counts
    check_fits(model, tokenizer, max(len(example.input_ids) for example in encoded.examples))
    data = data or {"train": {"name": records.name, "sha256": records.sha256, "rows": counts.rows}}
    run.check_inputs(data)
    if run.finished and any(run.path.glob("*.safetensors")):
        console.print(f"{run.path} is finished: nothing to do.")
        return run.path
    if whole is not None:
        options = with_steps_of(options, len(encoder.encode_records(whole, option="--data").examples))
    console.print(
        f"{command}: {sum(p.numel() for p in model.parameters()):,} parameters on {counts.rows} rows "
        f"({counts.supervised_tokens:,} supervised tokens), template {template.describe()}"
    )
    if options.threads:
        torch.set_num_threads(options.threads)
    run.start(command=command, device=str(model.device))
    run.update(
        seed=options.seed,
        data=data,
        model={"name": options.model or options.new_model, "architecture": type(model).__name__},
    )
    train_model(model, encoded, tokenizer.pad_token_id, run, options, title=command)
    model.save_pretrained(run.path)
    tokenizer.save_pretrained(run.path)
    save_template(template, run.path)
    run.update(status="finished", peak_memory_bytes=peak_memory_bytes(str(model.device)), sha256=weights_sha256(model))
    console.print(f"model written to {run.path}")
    return run.path


def with_steps_of(options: FinetuneOptions, sequences: int) -> FinetuneOptions:
    """Return the options with the steps, and those of the warm-up, that training on so many sequences takes."""
    per_epoch = steps_per_epoch(sequences, options.batch_size, options.grad_accum)
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.epochs * per_epoch)
    warmup = options.warmup_steps if options.warmup_steps >= 0 else round(options.warmup_epochs * per_epoch)
    return dataclasses.replace(options, max_steps=steps, warmup_steps=warmup)


def train_model(
    model: PreTrainedModel,
    encoded: EncodedSet,
    pad_id: int,
    run: RunFolder,
    options: FinetuneOptions,
    title: str = "finetune",
) -> None:
    """Minimise the token cross entropy of the supervised tokens with transformers' Trainer."""
    checkpoint = run.last_checkpoint()
    run.rewind_metrics(checkpoint)
    arguments = training_arguments(
        run.checkpoints,
        steps_per_epoch(len(encoded.examples), options.batch_size, options.grad_accum),
        **options.as_dict(),
    )
    with progress(title) as update:
        trainer = AnswerTrainer(
            model,
            arguments,
            examples=encoded.examples,
            pad_id=pad_id,
            callbacks=[MetricsLog(run.metrics), TrainingProgress(update)],
            max_loss=options.max_loss,
        )
        run.update(padded=trainer.forward.padded_because)
        with run.timed("training"):
            trainer.train_from(checkpoint)
    check_finite(model)
    model.eval()


def _starting_point(options: FinetuneOptions, records: RecordSet) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if options.new_model and options.model:
        raise InputError(
            "--model and --new-model were both given.", "Give one: a model to tune, or settings of a new one."
        )
    if options.model:
        load_config(options.model, trust_remote_code=options.trust_remote_code)
        tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
        dtype = "float32" if options.dtype == "auto" else options.dtype  # bfloat16 weights swallow small updates
        model = load_model(
            options.model, dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
        return model, tokenizer
    if not options.new_model:
        raise InputError("--model is missing.", "Give a model to tune, or --new-model with the settings of a new one.")
    device = pick_device(options.device)
    settings = _read_settings(options.new_model)
    if options.tokenizer_data:  # a target and its retain-only model must share one vocabulary
        records = load_records(options.tokenizer_data, option="--tokenizer-data", data_dir=options.data_dir)
    tokenizer = train_tokenizer(tokenizer_texts(records), options.vocab_size)
    return new_model(settings, tokenizer, options.seed).to(device), tokenizer


def _read_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--new-model '{path}' cannot be read: {error}", "Give a JSON file with model_type and sizes."
        ) from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise InputError(f"--new-model '{path}' has no model_type.", 'Add one, such as "model_type": "llama".')
    return settings


def new_model(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Make a randomly initialised model from configuration settings, sized for the tokenizer."""
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = dict(settings)
    kind = settings.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise InputError(f"model_type '{kind}' is not known to transformers.", "Give one such as llama or gpt_neo.")
    try:
        config = AutoConfig.for_model(kind, **(special | settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a configuration's own checks raise what they like
        raise InputError(
            f"The settings of --new-model make no {kind}: {str(error).splitlines()[0] if str(error) else error!r}",
            "Check sizes and heads, and that it is a causal language model; llama or gpt_neo are good starts.",
        ) from error
    if not is_causal(config):
        raise InputError(f"model_type '{kind}' is no causal language model.", "Give one such as llama or gpt_neo.")
    return model


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (GPT-2's kind) on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def tokenizer_texts(records: RecordSet) -> list[str]:
    """Return the texts that a new model's tokenizer is made from: all of every row."""
    texts = []
    for record in records:
        parts = [record.question, record.answer, record.text, *(content for _, content in record.messages)]
        texts.append(" ".join(part for part in parts if part))
    return texts
