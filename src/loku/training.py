"""A checked job done: importance, adapter, training, export, each recorded in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from loku.adapters.anchor import attach, detach
from loku.adapters.export import portable_lora
from loku.adapters.initialisers import initial_factors
from loku.adapters.layers import parameter_share, target_layers
from loku.assessment_rows import AssessmentRows
from loku.config import UnlearnOptions
from loku.data.encoding import tokens_sha256
from loku.data.prompts import save_template
from loku.errors import InputError, LokuError
from loku.evidence import Subspaces, check_importance_file, gather, retain_subspaces
from loku.files import sha256_file, sha256_json
from loku.forward import Forward, unfreeze
from loku.guarded_trainer import TrainingProgress, check_finite, steps_per_epoch, training_arguments
from loku.job import Job, UnlearnResult
from loku.losses.table import FORGET_LOSSES
from loku.models import load_model, weights_sha256
from loku.plan import describe_data, describe_importance, describe_initialisation, describe_method, describe_model
from loku.progress import progress
from loku.runs import MetricsLog, RunFolder, peak_memory_bytes
from loku.target_values import TargetValues, read_logprobs, write_logprobs
from loku.trainer import UnlearnTrainer
from loku.watch_plan import WatchPlan, conclude_watch, make_watch, plan_watch
from loku.watching import Watch


def run_job(job: Job, run: RunFolder, options: UnlearnOptions, rows: AssessmentRows | None = None) -> UnlearnResult:
    """Do the work of a checked job in its run folder: importance, adapter, training, export.

    `rows` are those that were read for measuring; of them --eval-steps takes its own.
    """
    plan = plan_watch(job, options, rows) if rows is not None else None
    if options.eval_steps and rows is None:
        raise InputError(
            "--eval-steps got no rows to measure.", "Pass run_job the rows of load_assessment_rows(options)."
        )
    data = describe_data(job)
    model_hash = weights_sha256(job.model)
    run.check_inputs(data, model_hash)
    check_importance_file(job, options, model_hash)
    if options.threads:
        torch.set_num_threads(options.threads)  # before the record says how many there are
    run.start(command="unlearn", device=str(job.model.device))
    save_template(job.template, run.path)
    run.update(seed=options.seed, model=describe_model(job.model, options, model_hash), data=data)
    try:
        with _given_back(job.model):
            trained, subspaces = (
                _adapt(job, run, options, model_hash)
                if options.tune == "lora"
                else (unfreeze(job.model, options.tune_layers), None)
            )
            _train(trained, subspaces, job, run, options, plan)
            check_finite(trained)
            with run.timed("export"):
                exported = _export(trained, job, run, options)
    except LokuError as error:
        run.update(status="stopped", error=error.given)
        raise
    if isinstance(trained, PeftModel):  # its own modules, around the model
        trained.training = trained.base_model.training = job.model.training
    run.update(peak_memory_bytes=peak_memory_bytes(str(job.model.device)), adapter=exported)
    return UnlearnResult(trained, run.path, run.record)


@contextmanager
def _given_back(model: PreTrainedModel) -> Iterator[None]:
    """Leave the model's modes as they were and, when something goes wrong, no adapter in it and nothing frozen."""
    training, modes = model.training, {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        detach(model)
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
        raise
    finally:
        for module in model.modules():
            module.training = modes.get(module, training)


def _adapt(job: Job, run: RunFolder, options: UnlearnOptions, model_hash: str) -> tuple[PeftModel, Subspaces]:
    """Choose (A0, B0) for every layer by what the initialiser needs to know of it, and attach the adapters.

    Returns the retain rows' directions, too, where the penalty on them is on.
    """
    layers = target_layers(job.model, options.targets)
    evidence = gather(job, run, options, layers, model_hash)
    with run.timed("initialisation"):
        factors = initial_factors(
            layers,
            options.init,
            rank=options.rank,
            scaling=options.lora_alpha / options.rank,
            importance=evidence.importance,
            activations=evidence.activations,
            options=options.init_options,
            seed=options.seed,
        )
        subspaces = retain_subspaces(evidence, options)
        model = attach(job.model, layers, factors, rank=options.rank, alpha=options.lora_alpha)
    run.update(
        importance=describe_importance(evidence, factors, options),
        initialisation=describe_initialisation(factors, options),
    )
    return model, subspaces


def _train(
    model: Any, subspaces: Subspaces, job: Job, run: RunFolder, options: UnlearnOptions, plan: WatchPlan | None
) -> None:
    checkpoint = run.last_checkpoint()
    run.rewind_metrics(checkpoint)
    forget = job.encoded_forget.examples
    retain = job.encoded_retain.examples if job.encoded_retain is not None else None
    pad_id = job.tokenizer.pad_token_id
    reference, level = _reference(model, job, run, options), _level(job, run, options)
    arguments = training_arguments(
        run.checkpoints, steps_per_epoch(len(forget), options.batch_size, options.grad_accum), **options.as_dict()
    )
    watch = None
    if plan is not None:
        with run.timed("watching"):
            watch = make_watch(plan, model, job, run, options)
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
            orthogonality=options.orthogonality,
            subspaces=subspaces,
            combine=options.combine,
            retain_bound=options.retain_bound,
            dual_rate=options.dual_rate,
            max_loss=options.max_loss,
            callbacks=[MetricsLog(run.metrics), TrainingProgress(update), *([watch] if watch is not None else [])],
        )
        total, share = parameter_share(model)
        run.update(
            method=describe_method(options),
            trainable={"parameters": total, "share": share},
            steps=trainer.total_steps(),
            plain_head=trainer.objective.forward.plain_because,
            padded=trainer.objective.forward.padded_because,
        )
        if watch is None:
            with run.timed("training"):
                trainer.train_from(checkpoint)
        else:
            _train_watched(trainer, checkpoint, watch, run)


def _train_watched(trainer: UnlearnTrainer, checkpoint: Path | None, watch: Watch, run: RunFolder) -> None:
    """Train with measurements; put the best weights back where that was asked for. Their time counts apart."""
    with run.timed("watching"):
        watch.begin(trainer.model)
    with run.timed("training"):
        if not watch.stopped:
            trainer.train_from(checkpoint)
        elif checkpoint is not None:  # it stopped there before it was killed
            trainer.load_weights(checkpoint)
    seconds = run.record["seconds"]
    for phase, spent in (("watching", watch.seconds), ("training", -watch.seconds)):
        seconds[phase] = round(seconds[phase] + spent, 3)
    trainer.accelerator.wait_for_everyone()  # the first process writes the best weights, all of them read
    watch.restore(trainer.model)
    conclude_watch(watch, run)


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
        "tokens": tokens_sha256(job.encoded_forget.examples),
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
