"""A checked job done: importance, adapter, training, export, each recorded in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from loku.adapters.anchor import attach
from loku.adapters.export import portable_lora
from loku.adapters.importance import Importance, Mode, estimate_importance, sample_retain
from loku.adapters.initialisers import initial_factors
from loku.adapters.layers import Layers, parameter_share, target_layers
from loku.config import UnlearnOptions
from loku.data.prompts import save_template
from loku.errors import InputError, LokuError
from loku.files import sha256_file, sha256_json
from loku.forward import Forward, decoder_layers
from loku.job import Job, UnlearnResult
from loku.losses.table import FORGET_LOSSES
from loku.models import load_model, weights_sha256
from loku.plan import describe_data, describe_importance, describe_method, describe_model
from loku.progress import console, progress
from loku.runs import MetricsLog, RunFolder, peak_memory_bytes
from loku.target_values import TargetValues, read_logprobs, write_logprobs
from loku.trainer import TrainingProgress, UnlearnTrainer, check_finite, steps_per_epoch, training_arguments


def run_job(job: Job, run: RunFolder, options: UnlearnOptions) -> UnlearnResult:
    """Do the work of a checked job in its run folder: importance, adapter, training, export."""
    data = describe_data(job)
    model_hash = weights_sha256(job.model)
    run.check_inputs(data, model_hash)
    _check_importance(job, options, model_hash)
    run.start(command="unlearn")
    if options.threads:
        torch.set_num_threads(options.threads)
    run.update(seed=options.seed, model=describe_model(job.model, options, model_hash), data=data)
    try:
        trained = (
            _adapt(job, run, options, model_hash)
            if options.tune == "lora"
            else _unfreeze(job.model, options.tune_layers)
        )
        _train(trained, job, run, options)
        check_finite(trained)
        with run.timed("export"):
            exported = _export(trained, job, run, options)
    except LokuError as error:
        run.update(status="stopped", error=error.given)
        raise
    run.update(peak_memory_bytes=peak_memory_bytes(), adapter=exported)
    return UnlearnResult(trained, run.path, run.record)


def _adapt(job: Job, run: RunFolder, options: UnlearnOptions, model_hash: str) -> PeftModel:
    """Choose (A0, B0) for every layer, by importance where the initialiser needs it, and attach the adapters."""
    layers = target_layers(job.model, options.targets)
    importance = None
    if options.init.startswith("fila"):
        with run.timed("importance"):
            importance = _importance(job, run, options, layers, model_hash)
    with run.timed("initialisation"):
        factors = initial_factors(
            layers,
            options.init,
            rank=options.rank,
            scaling=options.lora_alpha / options.rank,
            importance=importance,
            seed=options.seed,
        )
        model = attach(job.model, layers, factors, rank=options.rank, alpha=options.lora_alpha)
    run.update(importance=describe_importance(importance, factors, options) if importance else None)
    return model


def _check_importance(job: Job, options: UnlearnOptions, model_hash: str) -> None:
    """Raise InputError when --importance names a file that was made for something else."""
    if options.tune != "lora" or not options.init.startswith("fila"):
        return
    if not options.importance or not Path(options.importance).is_file():
        return
    found, wanted = Importance.load(options.importance), importance_provenance(job, options.init, options, model_hash)
    changed = sorted(k for k in wanted if found.provenance.get(k) != wanted[k])
    if not changed and set(found.layers) != set(target_layers(job.model, options.targets)):
        changed = ["targets"]
    if changed:
        raise InputError(
            f"--importance '{options.importance}' was made for something else ({', '.join(changed)} differ).",
            "Give the file made for this model and these rows, or a new file name to write.",
        )


def _importance(job: Job, run: RunFolder, options: UnlearnOptions, layers: Layers, model_hash: str) -> Importance:
    """Return the importance: from the file when nothing changed, else estimated and saved."""
    assert job.encoded_retain is not None
    path = Path(options.importance) if options.importance else run.path / "importance.safetensors"
    wanted = importance_provenance(job, options.init, options, model_hash)
    if path.is_file():
        found = Importance.load(path)
        if found.provenance == wanted and set(found.layers) == set(layers):
            console.print(f"importance: reused from {path} (nothing changed)")
            return found
    importance = measure_importance(job, options.init, options, layers, wanted)
    importance.save(path)
    return importance


def measure_importance(job: Job, init: str, options: Any, layers: Layers, provenance: Mapping[str, Any]) -> Importance:
    """Estimate the Fisher importance of a job's rows, showing progress."""
    assert job.encoded_retain is not None
    mode: Mode = "official" if init == "fila-official" else "default"
    retain = sample_retain(job.encoded_retain.examples, job.encoded_forget.examples, mode, options.seed)
    with progress("importance") as update:
        return estimate_importance(
            job.model,
            layers,
            job.encoded_forget.examples,
            retain,
            pad_id=job.tokenizer.pad_token_id,
            mode=mode,
            eps=options.importance_eps,
            batch_size=options.importance_batch_size,
            provenance=provenance,
            progress=lambda done, total: update(done, total, ""),
        )


def importance_provenance(job: Job, init: str, options: Any, model_hash: str) -> dict[str, Any]:
    """Return what an importance file depends on: it may be reused exactly when none of this changed."""
    return {
        "model": model_hash,
        "forget": job.forget.sha256,
        "retain": job.retain.sha256 if job.retain is not None else None,
        "recipe": init,
        "eps": options.importance_eps,
        "batch_size": options.importance_batch_size,
        "max_length": options.max_length,
        "template": sha256_json(job.template.describe()),
        "targets": options.targets,
        "seed": options.seed,
    }


def _unfreeze(model: PreTrainedModel, layers: int | None) -> PreTrainedModel:
    """Make all weights trainable (`tune="full"`), or those of the last decoder layers."""
    model.requires_grad_(layers is None)
    if layers is not None:
        for block in decoder_layers(model)[-layers:]:
            block.requires_grad_(True)
    return model


def _train(model: Any, job: Job, run: RunFolder, options: UnlearnOptions) -> None:
    checkpoint = run.last_checkpoint()
    run.rewind_metrics(checkpoint)
    forget = job.encoded_forget.examples
    retain = job.encoded_retain.examples if job.encoded_retain is not None else None
    pad_id = job.tokenizer.pad_token_id
    reference, level = _reference(model, job, run, options), _level(job, run, options)
    arguments = training_arguments(
        run.checkpoints, steps_per_epoch(len(forget), options.batch_size, options.grad_accum), **options.as_dict()
    )
    with progress(f"unlearning by {options.method}") as update:
        trainer = UnlearnTrainer(
            model,
            arguments,
            forget=forget,
            retain=retain,
            pad_id=pad_id,
            forget_loss=options.forget_loss,
            retain_loss=options.retain_loss,
            forget_weight=options.forget_weight,
            retain_weight=options.retain_weight,
            forget_options=options.forget_options,
            retain_options=options.retain_options,
            alternates=job.alternates,
            retain_alternates=job.retain_alternates,
            layer=options.layer,
            level=level,
            reference=reference,
            combine=options.combine,
            retain_bound=options.retain_bound,
            dual_rate=options.dual_rate,
            max_loss=options.max_loss,
            callbacks=[MetricsLog(run.metrics), TrainingProgress(update)],
        )
        total, share = parameter_share(model)
        run.update(
            method=describe_method(options),
            trainable={"parameters": total, "share": share},
            steps=trainer.total_steps(),
            plain_head=trainer.objective.forward.plain_because,
        )
        with run.timed("training"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _reference(model: Any, job: Job, run: RunFolder, options: UnlearnOptions) -> list[Tensor] | None:
    """Return the target model's log-probabilities of the forget tokens where the loss compares with them.

    Before any step, and again on resume: with tune="full" the weights are the target's until then.
    """
    if "reference" not in FORGET_LOSSES[options.forget_loss].needs:
        return None
    provenance = {"model": run.record["model"]["sha256"], **_token_provenance(job, options)}
    return _cached(run.path / "reference.safetensors", provenance, lambda: model, job, options)


def _level(job: Job, run: RunFolder, options: UnlearnOptions) -> list[Tensor] | None:
    """Return the forget tokens' log-probabilities under the model that IHL should not undercut, if one is given."""
    if options.level_model is None:
        return None

    def load() -> PreTrainedModel:
        return load_model(
            str(options.level_model),
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )

    files = sorted(Path(options.level_model).glob("*.safetensors"))  # none for a hub id
    weights = {file.name: sha256_file(file) for file in files}
    provenance = {"model": options.level_model, "weights": weights, **_token_provenance(job, options)}
    return _cached(run.path / "level.safetensors", provenance, load, job, options)


def _token_provenance(job: Job, options: UnlearnOptions) -> dict[str, Any]:
    return {
        "forget": job.forget.sha256,
        "max_length": options.max_length,
        "template": sha256_json(job.template.describe()),
    }


def _cached(
    path: Path, provenance: dict[str, Any], load: Callable[[], nn.Module], job: Job, options: UnlearnOptions
) -> list[Tensor]:
    """Return the forget tokens' log-probabilities under a model: from the run folder when nothing changed."""
    found = read_logprobs(path, provenance)
    if found is None:
        other = load()
        values = TargetValues(other, Forward(other), copies=False)
        with progress("reference") as update:
            found = values.token_logprobs(
                job.encoded_forget.examples,
                pad_id=job.tokenizer.pad_token_id,
                batch_size=options.batch_size,
                progress=lambda done, total: update(done, total, ""),
            )
        write_logprobs(path, found, provenance)
    return found


def _export(model: Any, job: Job, run: RunFolder, options: UnlearnOptions) -> dict[str, Any]:
    """Write the ordinary adapter, or the new model, into the run folder."""
    if options.tune == "full":
        folder = run.path / "model"
        model.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        save_template(job.template, folder)
        return {"form": "model", "sha256": weights_sha256(model), "rank": None}
    lora = portable_lora(model)
    folder = lora.save(run.path / "adapter", base_model=options.model)
    return {"form": "lora", "sha256": sha256_file(folder / "adapter_model.safetensors"), "rank": lora.rank}
