"""What a run says of itself: the plan before it starts, and the method, model, data and importance in run.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from loku.adapters.activations import share
from loku.adapters.initialisers import Factors, initialiser_of
from loku.adapters.layers import target_layers
from loku.config import UnlearnOptions
from loku.evidence import Evidence
from loku.guarded_trainer import steps_per_epoch
from loku.job import Job
from loku.progress import console, say
from loku.runs import RunFolder


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
    say("loku unlearn", f" {options.model} -> {run.path}")
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


def describe_model(model: PreTrainedModel, options: UnlearnOptions, digest: str) -> dict[str, Any]:
    """Return what run.json says about the target model."""
    return {
        "name": options.model or "in memory",
        "sha256": digest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "architecture": type(model).__name__,
    }


def describe_data(job: Job) -> dict[str, Any]:
    """Return what run.json says about the rows: names, hashes and counts."""
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


def describe_method(options: UnlearnOptions) -> dict[str, Any]:
    """Return what run.json says about the method."""
    names = ("forget_loss", "retain_loss", "forget_weight", "retain_weight", "tune")
    described = {"name": options.method} | {name: getattr(options, name) for name in names}
    if options.tune == "lora":
        described |= {"initialiser": options.init, "rank": options.rank, "alpha": options.lora_alpha}
        described |= {"orthogonality": options.orthogonality}
    return described


def describe_initialisation(factors: Mapping[str, Factors], options: UnlearnOptions) -> dict[str, Any]:
    """Return what run.json says about where each layer's adapter starts."""
    layers = [
        {"name": name, "energy_captured": energy, "norm_a": float(A.norm()), "norm_b": float(B.norm())}
        for name, (A, B, energy) in factors.items()
    ]
    return {"initialiser": options.init, "options": options.init_options, "layers": layers}


def describe_importance(
    evidence: Evidence, factors: Mapping[str, Factors], options: UnlearnOptions
) -> dict[str, Any] | None:
    """Return what run.json says about what the initialiser saw of each layer, or None where it looked at nothing.

    `forget` and `retain` are mean importances; of ReGLU the shares of the rows' energy in the chosen directions.
    """
    initialiser = initialiser_of(options.init)
    if initialiser.needs == "activations" and evidence.activations is not None:
        layers: list[dict[str, Any]] = []
        for name, seen in evidence.activations.items():
            B = factors[name].B
            Q = B[:, B.any(dim=0)].cpu()  # the columns that do not start as plain LoRA
            layers.append(
                {
                    "name": name,
                    "forget": share(seen.forget, Q),
                    "retain": share(seen.retain, Q),
                    "directions": Q.shape[1],
                }
            )
        return {"mode": "activations", "layers": layers}
    if evidence.importance is None:
        return None
    layers = [
        {
            "name": name,
            "forget": float(layer.forget.mean() / len(layer.columns)),
            "retain": float(layer.retain.mean() / len(layer.columns)),
            "relative_max": float(layer.relative.max() / layer.relative.mean().clamp(min=1e-38)),
            "eps": layer.eps,
            "share_below_eps": layer.share_below_eps,
            "rank_correlation_forget_only": layer.rank_correlation_forget_only(),
        }
        for name, layer in evidence.importance.layers.items()
    ]
    recipe = "official" if initialiser.official else "default"
    return {"mode": recipe if initialiser.needs == "fisher" else f"variance, {recipe}", "layers": layers}
