"""The main job: a model, a forget set and a retain set in; an ordinary adapter (or a new model) out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.adapters.anchor import attach
from loku.adapters.export import portable_lora
from loku.adapters.importance import Importance, Mode, estimate_importance, sample_retain
from loku.adapters.initialisers import Factors, initial_factors
from loku.adapters.layers import Layers, check_rank, parameter_share, target_layers
from loku.config import UnlearnOptions
from loku.data.encoding import EncodedSet, Encoder
from loku.data.prompts import ChatTemplate, TagTemplate, resolve_template, save_template
from loku.data.records import check_disjoint
from loku.data.sources import RecordSet, load_records
from loku.errors import DivergenceError, InputError, LokuError
from loku.files import sha256_file, sha256_json
from loku.models import check_tokenizer, weights_sha256
from loku.progress import console, progress
from loku.retain_self import sample_retain as sample_from_model
from loku.runs import MetricsLog, RunFolder, peak_memory_bytes
from loku.trainer import TrainingProgress, UnlearnTrainer, reference_logprobs, steps_per_epoch, training_arguments

SELF = "self"


@dataclass(frozen=True)
class UnlearnResult:
    """What `unlearn` gives back: the model with its adapters on, and the run folder."""

    model: PeftModel | PreTrainedModel
    folder: Path
    record: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The folder of the exported ordinary LoRA (with tune="full": of the new model)."""
        return self.folder / ("model" if (self.folder / "model").is_dir() else "adapter")


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked: nothing that can be refused is left to refuse once the work starts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: TagTemplate | ChatTemplate
    forget: RecordSet
    retain: RecordSet | None
    encoder: Encoder
    encoded_forget: EncodedSet
    encoded_retain: EncodedSet | None


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: str | Path | Iterable[Mapping[str, Any]] | RecordSet,
    retain: str | Path | Iterable[Mapping[str, Any]] | RecordSet | None,
    output: str | Path,
    options: UnlearnOptions | None = None,
    **settings: Any,
) -> UnlearnResult:
    """Remove the forget set from a model in memory by training an adapter (or, with tune="full", its weights).

    `forget` and `retain` are rows (dicts), files or names as on the command line; retain="self" samples retain text
    from the model. `settings` are fields of `UnlearnOptions`, such as method="npo" or epochs=3; without any they are
    LoKU's. The run folder `output` is resumed when it holds an interrupted run with the same settings.

    The given model's weights are not written, except with tune="full", which trains the model that was given.

    Raises InputError before any work when something given cannot be used, DivergenceError when training blows up.

    Example: see the README, whose code is run by the tests.
    """
    options = options or resolve_options(settings)
    run = RunFolder.check(output, options.as_dict())
    job = prepare(model, tokenizer, forget, retain, options)
    return run_job(job, run, options)


def resolve_options(settings: Mapping[str, Any]) -> UnlearnOptions:
    """Return the options of a call from Python: LoKU's defaults, the method's settings, what was given."""
    from loku.config import resolve

    options: UnlearnOptions = resolve(UnlearnOptions, {}, dict(settings), where="unlearn()")
    return options


def load_rows(options: UnlearnOptions) -> tuple[RecordSet, RecordSet | str | None]:
    """Read the forget and retain rows that the options name. Raises InputError when either is missing."""
    if not options.forget:
        raise InputError("--forget is missing.", "Give the rows that must go: a file, a dataset folder or a hub id.")
    forget = load_records(options.forget, option="--forget", data_dir=options.data_dir)
    retain: RecordSet | str | None = options.retain
    if options.retain and options.retain != SELF:
        retain = load_records(options.retain, option="--retain", data_dir=options.data_dir)
    return forget, retain


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Any,
    retain: Any,
    options: UnlearnOptions,
) -> Job:
    """Check everything and encode the rows. Raises InputError; nothing is written or trained."""
    check_tokenizer(tokenizer)
    template = resolve_template(tokenizer, options.model, options.prompt_template)
    forget = as_records(forget, "--forget", options)
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise InputError("The model carries an adapter already.", "Give it without: `model = model.unload()`.")
    if options.tune == "lora":
        layers = target_layers(model, options.targets)
        check_rank(layers, options.rank)
    if retain is None and options.retain_weight:
        raise InputError(
            "--retain is missing.",
            "Give rows that must stay, or `--retain self` to sample them from the model itself, or `--retain-weight 0` "
            "to do without (the model then forgets how to speak).",
        )
    if retain is None and options.tune == "lora" and options.init.startswith("fila"):
        raise InputError(
            f"--init {options.init} compares the forget rows with retain rows, and --retain is missing.",
            "Give --retain, or start without importance: --init lora.",
        )
    encoder = Encoder(tokenizer, template, options.max_length)
    encoded_forget = encoder.encode_records(forget, option="--forget")
    if isinstance(retain, str) and retain == SELF:
        retain = sample_from_model(
            model, tokenizer, template, forget.records, rows=options.self_rows, length=options.self_length,
            seed=options.seed,
        )  # fmt: skip
    elif retain is not None:
        retain = as_records(retain, "--retain", options)
        check_disjoint(forget, retain)
    encoded_retain = encoder.encode_records(retain, option="--retain") if retain is not None else None
    return Job(model, tokenizer, template, forget, retain, encoder, encoded_forget, encoded_retain)


def as_records(rows: Any, option: str, options: UnlearnOptions) -> RecordSet:
    """Return rows given in any form as a record set."""
    return rows if isinstance(rows, RecordSet) else load_records(rows, option=option, data_dir=options.data_dir)


def run_job(job: Job, run: RunFolder, options: UnlearnOptions) -> UnlearnResult:
    """Do the work of a checked job in its run folder: importance, adapter, training, export."""
    data = _describe_data(job)
    model_hash = weights_sha256(job.model)
    run.check_inputs(data, model_hash)
    _check_importance(job, options, model_hash)
    run.start(command="unlearn")
    if options.threads:
        torch.set_num_threads(options.threads)
    run.update(seed=options.seed, model=_describe_model(job.model, options, model_hash), data=data)
    try:
        trained = _adapt(job, run, options, model_hash) if options.tune == "lora" else _unfreeze(job.model)
        _train(trained, job, run, options)
        _check_finite(trained)
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
    run.update(importance=_describe_importance(importance, factors, options) if importance else None)
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


def _unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make all weights trainable (`tune="full"`)."""
    model.requires_grad_(True)
    return model


def _train(model: Any, job: Job, run: RunFolder, options: UnlearnOptions) -> None:
    checkpoint = run.last_checkpoint()
    run.rewind_metrics(checkpoint)
    forget = job.encoded_forget.examples
    retain = job.encoded_retain.examples if job.encoded_retain is not None else None
    pad_id = job.tokenizer.pad_token_id
    reference = None
    if options.forget_loss == "npo":
        # Before any step, and again on resume: with tune="full" the weights are the target's until then.
        reference = reference_logprobs(model, forget, pad_id=pad_id, batch_size=options.batch_size)
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
            loss_options={"beta": options.beta},
            reference=reference,
            max_loss=options.max_loss,
            callbacks=[MetricsLog(run.metrics), TrainingProgress(update)],
        )
        total, share = parameter_share(model)
        run.update(
            method=_describe_method(options),
            trainable={"parameters": total, "share": share},
            steps=trainer.total_steps(),
        )
        with run.timed("training"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise DivergenceError(
                f"The trained weight '{name}' is not finite.",
                "Lower --learning-rate, in a new --output folder. The last good checkpoint is under `checkpoints`.",
            )


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


def _describe_model(model: PreTrainedModel, options: UnlearnOptions, digest: str) -> dict[str, Any]:
    return {
        "name": options.model or "in memory",
        "sha256": digest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "architecture": type(model).__name__,
    }


def _describe_data(job: Job) -> dict[str, Any]:
    described = {}
    for name, records, encoded in (
        ("forget", job.forget, job.encoded_forget),
        ("retain", job.retain, job.encoded_retain),
    ):
        if records is not None and encoded is not None:
            counts = encoded.counts
            described[name] = {
                "name": records.name,
                "sha256": records.sha256,
                "rows": counts.rows,
                "sequences": counts.sequences,
                "supervised_tokens": counts.supervised_tokens,
                "truncated": counts.truncated,
                "windows_cut": counts.windows_cut,
                "shifted_boundaries": counts.shifted_boundaries,
            }
    return described


def _describe_method(options: UnlearnOptions) -> dict[str, Any]:
    names = ("forget_loss", "retain_loss", "forget_weight", "retain_weight", "tune")
    described = {"name": options.method} | {name: getattr(options, name) for name in names}
    if options.tune == "lora":
        described |= {"initialiser": options.init, "rank": options.rank, "alpha": options.lora_alpha}
    return described


def _describe_importance(
    importance: Importance, factors: Mapping[str, Factors], options: UnlearnOptions
) -> dict[str, Any]:
    layers = []
    for name, layer in importance.layers.items():
        A, B, energy = factors[name]
        layers.append(
            {
                "name": name,
                "forget": float(layer.forget.mean() / A.shape[1]),
                "retain": float(layer.retain.mean() / A.shape[1]),
                "relative_max": float(layer.relative.max() / layer.relative.mean().clamp(min=1e-38)),
                "eps": layer.eps,
                "share_below_eps": layer.share_below_eps,
                "rank_correlation_forget_only": layer.rank_correlation_forget_only(),
                "energy_captured": energy,
                "norm_a": float(A.norm()),
                "norm_b": float(B.norm()),
            }
        )
    return {"mode": "official" if options.init == "fila-official" else "default", "layers": layers}


def print_plan(job: Job, run: RunFolder, options: UnlearnOptions) -> None:
    """Print what a run will do before it starts: rows, losses, trainable share, steps."""
    parameters = sum(p.numel() for p in job.model.parameters())
    steps = options.max_steps
    if steps <= 0:
        per_epoch = steps_per_epoch(len(job.encoded_forget.examples), options.batch_size, options.grad_accum)
        steps = int(options.epochs * per_epoch)
    if options.tune == "full":
        what = f"all {parameters:,} weights"
    else:
        layers = target_layers(job.model, options.targets)
        trained = options.rank * sum(sum(layer.weight.shape) for layer in layers.values())
        what = (
            f"LoRA rank {options.rank}, alpha {options.lora_alpha:g}, started by {options.init}, "
            f"on {len(layers)} layers: {trained:,} weights ({trained / parameters:.2%} of the model)"
        )
    console.print(f"[bold]loku unlearn[/bold] {options.model} -> {run.path}")
    for name, records, encoded in (
        ("forget", job.forget, job.encoded_forget),
        ("retain", job.retain, job.encoded_retain),
    ):
        if records is None or encoded is None:
            console.print(f"  {name}: none")
            continue
        counts = encoded.counts
        console.print(
            f"  {name}: {counts.rows} rows, {counts.sequences} sequences, {counts.supervised_tokens:,} supervised "
            f"tokens ({counts.truncated} truncated, {counts.windows_cut} cut into windows)"
        )
    console.print(
        f"  loss: {options.forget_weight:g} x {options.forget_loss} + {options.retain_weight:g} x {options.retain_loss}"
    )
    console.print(f"  train: {what}")
    console.print(
        f"  steps: {steps}, {options.batch_size * options.grad_accum} forget rows each, "
        f"peak learning rate {options.learning_rate:g} ({options.scheduler})"
    )
    console.print(f"  prompts: {job.template.describe()}")
    if run.last_checkpoint():
        console.print(f"  resumes after {run.last_checkpoint()}")
