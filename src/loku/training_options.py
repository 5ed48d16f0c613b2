"""Options of the verbs that load a model and train: unlearn, finetune, reference, importance. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loku.errors import InputError
from loku.methods import METHODS
from loku.options import Options, option, pairs, seed_option

FORGET_LOSSES = (
    "ihl", "grad_ascent", "npo", "simnpo", "dpo", "idk", "ce_u", "wga", "satimp", "undial", "max_entropy", "pdu", "rmu",
)  # fmt: skip
RETAIN_LOSSES = ("nll", "kl", "hidden", "ap")
COMBINERS = ("sum", "pcgrad", "gru", "primal-dual")
INITIALISERS = (
    "fila", "fila-official", "fila-two-sided", "vila", "vila-official", "reglu", "pissa", "lora",
)  # fmt: skip
TRACKERS = (
    "none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow",
    "neptune", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip


@dataclass
class ModelOptions(Options):
    """Options of every verb that loads a model."""

    model: str | None = option(None, "model folder or hub id")
    dtype: str = option(
        "auto", "weights' type: auto keeps the stored one", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; by default a GPU when there is one")
    prompt_template: str | None = option(
        None, "JSON file with question and answer tags, for models without a chat template"
    )
    max_length: int = option(500, "longest sequence in tokens", source="TOFU: Maini et al. 2024", least=2)
    data_dir: str | None = option(None, "folder with benchmark files (default: $LOKU_DATA_DIR, else the hub)")
    trust_remote_code: bool = option(False, "run the model repository's own code")


@dataclass
class TrainingOptions(ModelOptions):
    """Options of every verb that trains."""

    output: str | None = option(None, "folder to write; an interrupted run in it is resumed")
    epochs: float = option(5.0, "passes over the data", source="LoKU, released scripts", above=0)
    max_steps: int = option(-1, "optimiser steps instead of --epochs; -1: as many as those take", least=1, special=-1)
    batch_size: int = option(8, "sequences per step and device", least=1)
    grad_accum: int = option(
        4, "batches per optimiser step (8 x 4 = 32 in all)", source="LoKU, released scripts", least=1
    )
    learning_rate: float = option(1e-4, "peak learning rate", source="LoKU, Llama-2-7B on TOFU", least=0)
    warmup_epochs: float = option(1.0, "passes of linear warm-up", source="LoKU, released scripts", least=0)
    warmup_steps: int = option(-1, "steps of linear warm-up; overrides --warmup-epochs unless negative")
    scheduler: str = option(
        "linear", "learning-rate schedule after the warm-up", choices=("linear", "cosine", "constant")
    )
    weight_decay: float = option(
        0.0, "AdamW weight decay; 0, since decay of FILA's factors decays pretrained content", least=0
    )
    adam_beta2: float = option(0.999, "AdamW's second beta", least=0, below=1)
    max_grad_norm: float = option(1.0, "gradient norm to clip at", least=0)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    save_steps: int = option(0, "steps between checkpoints; 0: one per epoch; -1: none", least=-1)
    max_loss: float = option(1000.0, "stop when a mean loss exceeds this size: the run has exploded", least=0)
    report_to: str = option("none", "tracker known to transformers, such as tensorboard or wandb", choices=TRACKERS)
    threads: int = option(0, "CPU threads; 0 leaves torch's choice (small models run best with 1)", least=0)
    seed: int = seed_option(42, "seed of everything random", source="LoKU, released scripts")


@dataclass
class UnlearnOptions(TrainingOptions):
    """Options of `loku unlearn`."""

    forget: str | None = option(None, "what must go: file, dataset folder, hub id or tofu/forget10")
    retain: str | None = option(None, "what must stay: as --forget, or 'self' for text sampled from the model itself")
    method: str = option(
        "loku", "named settings to start from; see `loku methods`", choices=tuple(METHODS), source="LoKU"
    )
    forget_loss: str = option("ihl", "loss on the forget set", choices=FORGET_LOSSES, source="LoKU")
    retain_loss: str = option("nll", "loss on the retain set", choices=RETAIN_LOSSES, source="LoKU")
    forget_weight: float = option(1.0, "weight of the forget loss", source="LoKU, released scripts", least=0)
    retain_weight: float = option(1.0, "weight of the retain loss", source="LoKU, released scripts", least=0)
    forget_options: dict[str, Any] = pairs("the forget loss's own options, such as beta=0.2; see docs/losses.md")
    retain_options: dict[str, Any] = pairs("the retain loss's own options")
    combine: str = option("sum", "how the two gradients meet", choices=COMBINERS, source="LoKU")
    retain_bound: float | None = option(None, "primal-dual: what the retain loss is to stay below, in nats")
    dual_rate: float = option(
        1.0,
        "primal-dual: step of the retain weight per nat above the bound",
        source="PDU: Entesari et al. 2025",
        least=0,
    )
    layer: int | None = option(None, "decoder layer of losses on hidden states (default: 7, or the middle one)")
    refusals: str | None = option(None, "text file of refusals for dpo, idk and ap, one a line (default: 20 built in)")
    level_model: str | None = option(
        None, "ihl: a model that never saw the forget set; tokens below its probability stop sharpening the runner-up"
    )
    init: str = option("fila", "how the adapter starts", choices=INITIALISERS, source="LoKU")
    init_options: dict[str, Any] = pairs("the initialiser's own options, such as beta=0.5; see docs/initialisers.md")
    orthogonality: float = option(
        0.0, "weight of the penalty on what the adapter puts into the retain rows' directions; ReGLU: 0.5", least=0
    )
    tune: str = option("lora", "lora trains an adapter; full trains all weights of a copy", choices=("lora", "full"))
    tune_layers: int | None = option(None, "with --tune full: only this many last decoder layers", least=1)
    rank: int = option(16, "LoRA rank", source="LoKU: 4, 8, 16 and 32", least=1)
    alpha: float | None = option(None, "LoRA alpha (default: twice the rank)", source="LoKU, released scripts", above=0)
    targets: str = option(
        "all-linear", "layers to adapt, comma-separated; all-linear leaves out the head", source="LoKU"
    )
    importance: str | None = option(None, "importance file to use (and to write, when it does not exist yet)")
    importance_eps: float | None = option(
        None, "eps of the importance ratio (default: 0.01 x the layer's mean retain Fisher)", above=0
    )
    importance_batch_size: int | None = option(
        None, "sequences per importance batch (default: 8; official recipes: 4, as released)", least=1
    )
    importance_memory: float | None = option(
        None, "GiB for the Fisher sums (default: all layers at once); less means more passes over the rows", above=0
    )
    self_rows: int = option(200, "texts to sample for --retain self", least=1)
    self_length: int = option(128, "tokens of each sampled text", least=2)
    evaluate: bool = option(True, "measure the model before and after, and write the report")
    eval_rows: int = option(100, "most rows per set to measure", least=1)
    max_new_tokens: int | None = option(
        None, "longest generated answer when measuring (default: from the answers' lengths)", least=1
    )
    holdout: str | None = option(None, "rows of the same kind that were never trained on, for membership figures")
    general: str | None = option(None, "general-knowledge rows, for utility")
    retain_only_model: str | None = option(
        None, "the reference: a model trained without the forget set, its results.json, or its official log"
    )
    keep_text: bool = option(False, "keep example generations in the run folder and the report")
    eval_steps: int = option(0, "steps between measurements while training (teacher-forced figures); 0: none", least=0)
    stop_at: str = option(
        "never",
        "level: stop as soon as the forget set is known no better than unseen text",
        choices=("never", "level"),
    )
    level: dict[str, Any] = pairs(
        "that level by hand, such as probability=0.2 (default: the retain-only model's, else the target's on --holdout)"
    )
    keep: str = option(
        "last",
        "best: of all measurements the nearest to the level that kept --keep-utility",
        choices=("last", "best"),
    )
    keep_utility: float = option(
        0.98, "--keep best: share of the target's answer probability on retain and general rows", least=0, most=1
    )

    @property
    def lora_alpha(self) -> float:
        """The LoRA alpha in use: twice the rank unless given."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def check(self) -> None:
        """Raise InputError for values that no run can use, and when neither loss would train anything."""
        super().check()
        if not self.forget_weight and not self.retain_weight:
            raise InputError(
                "--forget-weight 0 and --retain-weight 0 leave nothing to train.", "Give one of them a larger weight."
            )
        asked = [
            f"--{name} {getattr(self, name.replace('-', '_'))}"
            for name, idle in (("stop-at", "never"), ("keep", "last"))
            if getattr(self, name.replace("-", "_")) != idle
        ] + (["--level"] if self.level else [])
        if asked and not self.eval_steps:
            raise InputError(f"{asked[0]} needs measurements while training.", "Add --eval-steps, such as 5.")


@dataclass
class FinetuneOptions(TrainingOptions):
    """Options of `loku finetune`."""

    data: str | None = option(None, "rows to learn: file, dataset folder, hub id or tofu/full")
    new_model: str | None = option(None, "instead of --model: JSON file with the configuration of a new, random model")
    vocab_size: int = option(2000, "tokens of the byte-level BPE tokenizer made for a new model", least=260)
    tokenizer_data: str | None = option(None, "rows to make a new model's tokenizer from (default: --data)")
    learning_rate: float = option(1e-5, "peak learning rate", source="TOFU, Llama-2-7B", least=0)
    weight_decay: float = option(0.01, "AdamW weight decay", source="TOFU: Maini et al. 2024", least=0)


@dataclass
class ReferenceOptions(FinetuneOptions):
    """Options of `loku reference`."""

    like: str | None = option(None, "the target's folder, written by `loku finetune`: its settings are taken over")
    forget: str | None = option(None, "rows of --data that the model must not learn, matched by what they say")
    output: str | None = option(None, "folder to write (default: beside --like, its name ends in a hash of the recipe)")
    retain: str | None = option(None, "retain rows to measure the model on")
    holdout: str | None = option(None, "rows never trained on to measure it on")
    general: str | None = option(None, "general-knowledge rows to measure it on")
    eval_rows: int = option(100, "most rows per set to measure", least=1)
    max_new_tokens: int | None = option(
        None, "longest generated answer when measuring (default: from the answers' lengths)", least=1
    )
    keep_text: bool = option(False, "also write generations to examples.jsonl")


@dataclass
class ImportanceOptions(ModelOptions):
    """Options of `loku importance`."""

    forget: str | None = option(None, "what must go")
    retain: str | None = option(None, "what must stay")
    init: str = option("fila", "which recipe: fila or fila-official", choices=("fila", "fila-official"), source="LoKU")
    targets: str = option("all-linear", "layers, comma-separated; all-linear leaves out the head", source="LoKU")
    importance_eps: float | None = option(
        None, "eps of the ratio (default: 0.01 x the layer's mean retain Fisher)", above=0
    )
    importance_batch_size: int | None = option(
        None, "sequences per batch (default: 8; fila-official: 4, as released)", least=1
    )
    importance_memory: float | None = option(
        None, "GiB for the Fisher sums (default: all layers at once); less means more passes over the rows", above=0
    )
    seed: int = seed_option(42, "seed of the retain sample")
    output: str | None = option(None, "safetensors file to write")
