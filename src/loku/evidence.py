"""What an initialiser needs to have measured before it can choose: measured once, and kept where that is worth it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loku.adapters.activations import ROWS, LayerActivations, pooled_outputs, retain_subspace
from loku.adapters.importance import Importance, Mode, estimate_importance, sample_retain
from loku.adapters.initialisers import initialiser_of
from loku.adapters.layers import Layers, target_layers
from loku.adapters.variance import estimate_variance
from loku.config import UnlearnOptions
from loku.data.encoding import Example, tokens_sha256
from loku.errors import InputError
from loku.files import sha256_json
from loku.job import Job
from loku.progress import console, progress
from loku.runs import RunFolder

Subspaces = Mapping[str, Tensor] | None

MEASURED = ("fisher", "variance")  # needs that come as an importance file


@dataclass(frozen=True)
class Evidence:
    """What was measured: row importances, or layer outputs on forget and retain rows."""

    importance: Importance | None = None
    activations: dict[str, LayerActivations] | None = None


def gather(job: Job, run: RunFolder, options: UnlearnOptions, layers: Layers, model_hash: str) -> Evidence:
    """Measure what the initialiser and the penalty need, or take it from a file where nothing changed."""
    needs = initialiser_of(options.init).needs
    importance = activations = None
    if needs in MEASURED:
        with run.timed("importance"):
            importance = _importance(job, run, options, layers, model_hash)
    if needs == "activations" or options.orthogonality:
        with run.timed("activations"):
            activations = _activations(job, options, layers)
    return Evidence(importance, activations)


def retain_subspaces(evidence: Evidence, options: UnlearnOptions) -> Subspaces:
    """Return each layer's directions that the penalty keeps the adapter out of, or None without a penalty."""
    if not options.orthogonality or evidence.activations is None:
        return None
    return {name: retain_subspace(seen.retain) for name, seen in evidence.activations.items()}


def check_importance_file(job: Job, options: UnlearnOptions, model_hash: str) -> None:
    """Raise InputError when --importance names a file that was made for something else."""
    if options.tune != "lora" or initialiser_of(options.init).needs not in MEASURED:
        return
    if not options.importance or not Path(options.importance).is_file():
        return
    found, wanted = Importance.load(options.importance), importance_provenance(job, options.init, options, model_hash)
    changed = sorted(k for k in wanted if _known(found, wanted).get(k) != wanted[k])
    if not changed and set(found.layers) != set(target_layers(job.model, options.targets)):
        changed = ["targets"]
    if changed:
        raise InputError(
            f"--importance '{options.importance}' was made for something else ({', '.join(changed)} differ).",
            "Give the file made for this model and these rows, or a new file name to write.",
        )


def _known(found: Importance, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's provenance; of one that was made before tokens were part of it they are taken on trust."""
    return {"tokens": wanted["tokens"], **found.provenance}


def _importance(job: Job, run: RunFolder, options: UnlearnOptions, layers: Layers, model_hash: str) -> Importance:
    """Return the importance: from the file when nothing changed, else estimated and saved."""
    path = Path(options.importance) if options.importance else run.path / "importance.safetensors"
    wanted = importance_provenance(job, options.init, options, model_hash)
    if path.is_file():
        found = Importance.load(path)
        if _known(found, wanted) == wanted and set(found.layers) == set(layers):
            console.print(f"importance: reused from {path} (nothing changed)")
            return found
    importance = measure_importance(job, options.init, options, layers, wanted, partial=partial_folder(path))
    importance.save(path)
    return importance


def partial_folder(path: str | Path) -> Path:
    """Return the folder where a half-done importance pass is kept next to the file that it will become."""
    return Path(f"{path}.partial")


def measure_importance(
    job: Job, init: str, options: Any, layers: Layers, provenance: Mapping[str, Any], *, partial: Path | None = None
) -> Importance:
    """Estimate the importance of a job's rows as the initialiser wants it, showing progress."""
    assert job.encoded_retain is not None
    initialiser = initialiser_of(init)
    mode: Mode = "official" if initialiser.official else "default"
    forget, every_retain = job.encoded_forget.examples, job.encoded_retain.examples
    common: dict[str, Any] = {
        "pad_id": job.tokenizer.pad_token_id,
        "mode": mode,
        "eps": options.importance_eps,
        "batch_size": options.importance_batch_size,
        "provenance": provenance,
    }
    checkpoint = getattr(options, "activation_checkpointing", False)
    if checkpoint:
        job.model.activation_checkpointing_enable()
    try:
        with progress("importance") as update:
            common["progress"] = lambda done, total: update(done, total, "")
            if initialiser.needs == "variance":
                # The released recipe draws its partners anew in every pass, from all retain rows.
                retain = (
                    every_retain if initialiser.official else sample_retain(every_retain, forget, mode, options.seed)
                )
                return estimate_variance(
                    job.model, layers, forget, retain, rank=options.rank, scaling=options.lora_alpha / options.rank,
                    seed=options.seed, **initialiser.values(options.init_options), **common,
                )  # fmt: skip
            retain = sample_retain(every_retain, forget, mode, options.seed)
            return estimate_importance(
                job.model, layers, forget, retain, memory=options.importance_memory, partial=partial, **common
            )
    finally:
        if checkpoint:
            job.model.activation_checkpointing_disable()


def _activations(job: Job, options: UnlearnOptions, layers: Layers) -> dict[str, LayerActivations]:
    """Collect the layers' outputs on at most 256 rows of each set (ReGLU's option `rows`)."""
    assert job.encoded_retain is not None
    rows = initialiser_of(options.init).values(options.init_options).get("rows", ROWS)
    found = []
    for examples in (job.encoded_forget.examples, job.encoded_retain.examples):
        with progress("activations") as update:
            found.append(
                pooled_outputs(
                    job.model, layers, _sample(examples, rows, options.seed), pad_id=job.tokenizer.pad_token_id,
                    progress=lambda done, total, update=update: update(done, total, ""),  # type: ignore[misc]
                )
            )  # fmt: skip
    forget, retain = found
    return {name: LayerActivations(forget[name], retain[name]) for name in layers}


def _sample(examples: Sequence[Example], rows: int, seed: int) -> list[Example]:
    return list(examples) if rows >= len(examples) else random.Random(seed).sample(list(examples), rows)


def importance_provenance(job: Job, init: str, options: Any, model_hash: str) -> dict[str, Any]:
    """Return what an importance file depends on: it may be reused exactly when none of this changed.

    `fila-two-sided` reads the same file as `fila`.
    """
    initialiser = initialiser_of(init)
    recipe = {"fisher": "fila", "variance": "vila"}.get(str(initialiser.needs), init)
    found = {
        "model": model_hash,
        "forget": job.forget.sha256,
        "retain": job.retain.sha256 if job.retain is not None else None,
        "recipe": f"{recipe}-official" if initialiser.official else recipe,
        "eps": options.importance_eps,
        "batch_size": options.importance_batch_size if initialiser.official else None,
        "max_length": options.max_length,
        "template": sha256_json(job.template.describe()),
        "tokens": tokens_sha256(job.trained_examples()),
        "targets": options.targets,
        "seed": options.seed,
    }
    if initialiser.needs == "variance":
        found |= initialiser.values(options.init_options)
        found |= {"rank": options.rank, "scaling": options.lora_alpha / options.rank}
    return found
