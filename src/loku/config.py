"""Every option, defined once: name, type, default, help and the source of the default. Needs no torch.

The command line, YAML recipes and the Python API all read these dataclasses.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loku.errors import InputError, suggestion
from loku.methods import METHODS
from loku.options import Options, option, pairs, seed_option, several
from loku.record_options import RecordOptions, VerifyOptions  # noqa: F401 - all option sets are found here

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


@dataclass
class EvaluateOptions(ModelOptions):
    """Options of `loku evaluate`."""

    adapter: str | None = option(None, "adapter folder to put on the model")
    max_length: int = option(
        0, "longest sequence in tokens; 0: the suite's (own 500, tofu and tdec 200)", source="TOFU", least=0
    )
    suite: str = option(
        "own",
        "own: your rows; or a benchmark, as its own code measures it",
        choices=("own", "tofu", "tdec", "muse", "lume", "rwku", "utility"),
    )
    forget: str | None = option(None, "suites own and lume: forget rows (lume: default from --data-dir)")
    retain: str | None = option(None, "suites own and lume: retain rows (lume: default from --data-dir)")
    holdout: str | None = option(None, "suites own, tofu and tdec: rows never trained on")
    general: str | None = option(None, "suite own: general-knowledge rows")
    forget_split: str = option("forget10", "suite tofu: forget01, forget05 or forget10", source="TOFU")
    sets: str = option("forget,retain,real_authors,world_facts", "suite tofu: which of its sets, and holdout")
    data: str | None = option(None, "suite tdec: the sequences that must go")
    validation: str | None = option(None, "suite tdec: unseen texts for level and perplexity, comma-separated")
    corpus: str = option("news", "suite muse: news or books", choices=("news", "books"))
    members: str | None = option(None, "suite lume: texts (`document`) that were trained on and must go")
    nonmembers: str | None = option(None, "suite lume: texts (`document`) never trained on")
    mmlu: float | None = option(None, "suite lume: the model's MMLU accuracy, for the final score", least=0, most=1)
    utility: str = option(
        "",
        "with any suite, or alone with --suite utility: tasks of lm-eval by name, and local rows as lambada=FILE, "
        "pubmedqa=FILE, perplexity=FILE, dialogue=FILE; comma-separated",
    )
    extras: str = option("", "suites own and tofu: costly figures: gradient_norm, memo, sampling, comma-separated")
    reference_model: str | None = option(
        None, "suites own and tofu: a model that judges how likely the generated answers are"
    )
    reference: str | None = option(None, "results.json or official or open-unlearning log of the retain-only model")
    target: str | None = option(None, "results.json of the target model, for the verdict")
    max_rows: int | None = option(
        None, "most rows per set (default: 300 for own, tofu and tdec, else all)", source="TOFU: ds_size 300", least=1
    )
    max_new_tokens: int | None = option(None, "longest generated answer (default: the suite's)", least=1)
    output: str | None = option(None, "folder for results.json (with --from-logs: results_from_logs.json)")
    keep_text: bool = option(False, "also write generations to examples.jsonl")
    from_logs: str | None = option(None, "instead of a model: an official TOFU or open-unlearning log (.json, .gz)")
    retain_logs: str | None = option(None, "with --from-logs: the retain-only model's log")
    write_logs: str | None = option(
        None, "also write the results in another project's format", choices=("tofu", "open-unlearning")
    )
    compare: list[str] = several("instead of a model: two results.json of the same rows, compared row by row", 2)
    seeds: list[str] = several("instead of a model: results.json of several seeds, aggregated")
    json: bool = option(False, "print one JSON object")
    cache: bool = option(True, "keep scores in the output folder, go on from them, and answer a repeated call at once")
    seed: int = seed_option(42, "seed of the bootstrap intervals")


@dataclass
class ExportOptions(Options):
    """Options of `loku export`."""

    run: str | None = option(None, "run folder, or adapter folder together with --model")
    model: str | None = option(None, "base model (default: the one the run or adapter names)")
    form: str = option(
        "merged",
        "lora: rank as trained; truncated: --rank; merged: a whole model",
        choices=("lora", "truncated", "merged"),
    )
    rank: int | None = option(None, "with --form truncated: the rank to keep", least=1)
    dtype: str = option(
        "auto", "type of the merged weights: auto keeps the base's", choices=("auto", "float32", "bfloat16", "float16")
    )
    output: str | None = option(None, "folder to write")
    rescore: bool = option(True, "merged: measure the forget set again in the stored type, and warn when it moved")
    data_dir: str | None = option(None, "folder with benchmark files (default: $LOKU_DATA_DIR, else the hub)")
    trust_remote_code: bool = option(False, "run the model repository's own code")


@dataclass
class AttackOptions(ModelOptions):
    """Options of `loku attack`. What a run folder says itself need not be given."""

    run: str | None = option(None, "run folder of `loku unlearn`; without it --model, and --adapter or --target-model")
    adapter: str | None = option(None, "adapter folder: target and unlearned model are --model without and with it")
    target_model: str | None = option(None, "the model before unlearning, when --model is a whole unlearned model")
    retain_only_model: str | None = option(None, "a model that never saw the forget set: scores are relative to it")
    other_base: str | None = option(None, "another base to put the adapter on, such as the one before fine-tuning")
    forget: str | None = option(None, "what had to go")
    retain: str | None = option(None, "what had to stay: related benign text, examples, and the proof of no damage")
    holdout: str | None = option(None, "rows of the same kind, never trained on: for membership")
    unrelated: str | None = option(None, "unrelated benign rows to relearn on (default: the run's general rows)")
    attacks: str = option("all", "which, comma-separated: families such as relearn,quantise, or single attacks")
    share: float = option(
        0.25, "relearning: share of the forget set to train on", source="prototype: 10 of 40", above=0, below=1
    )
    steps: int = option(20, "relearning: optimiser steps", source="prototype", least=1)
    every: int = option(5, "relearning: steps between measurements", least=1)
    learning_rate: float | None = option(
        None, "relearning: rate (default: 2e-3 with LoRA, 5e-4 in full at width 96; less for wider models)", above=0
    )
    batch_size: int = option(8, "relearning: rows per step", least=1)
    rank: int = option(8, "relearning: rank of the fresh LoRA", least=1)
    prune_rates: str = option("0.1,0.3,0.5", "shares of weights to prune, comma-separated")
    adapter_scales: str = option("0.75,0.5,0.25", "factors to scale the adapter by, comma-separated")
    samples: int = option(8, "sampling: answers per question", least=1)
    temperature: float = option(1.0, "sampling: temperature", above=0)
    max_rows: int = option(100, "most rows per set", least=2)
    retain_rows: int = option(32, "retain rows measured beside each attack", least=2)
    output: str | None = option(None, "folder for attacks.json (default: the run folder)")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", least=0)
    json: bool = option(False, "print one JSON object")
    seed: int = seed_option(42, "seed of splits, batches, samples and intervals")


@dataclass
class ReportOptions(Options):
    """Options of `loku report`."""

    folders: list[str] = field(
        default_factory=list, metadata={"help": "run or evaluation folders; several are compared"}
    )
    output: str | None = option(None, "HTML file to write (default: report.html in the first folder)")
    title: str | None = option(None, "title of the page")


@dataclass
class DemoOptions(Options):
    """Options of `loku demo`."""

    output: str = option("demo", "folder to write")
    full: bool = option(False, "also attack the models unlearned by ihl and loku: a minute more")
    seed: int = seed_option(0, "seed of corpus and training")


@dataclass
class BenchOptions(Options):
    """Options of `loku bench`."""

    recipe: str | None = option(None, "the benchmark's YAML file; see docs/bench.md")
    output: str | None = option(None, "folder to write and to go on in (default: bench/<the recipe's name>)")
    workers: int = option(0, "processes, one thread each; 0: one a core", least=0)
    backend: str = option("local", "local: processes of this machine; ray: a Ray cluster", choices=("local", "ray"))
    ray_address: str | None = option(None, "with --backend ray: the cluster's address (default: a local Ray)")
    only: list[str] = several("names of the arms to run (default: all)")
    time_limit: float | None = option(
        None, "minutes after which no run begins; those begun go on to their end", above=0
    )
    dry_run: bool = option(False, "check the recipe, print what would be run and what it costs, and stop")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe: a flat mapping of option names (with _ or -) to values."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise InputError(f"The recipe '{path}' does not exist.", "Give the path of a YAML file, or options only.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"The recipe '{path}' is not UTF-8 text ({error}).", "Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise InputError(f"The recipe '{path}' is not YAML: {error}", "Write one `option: value` a line.") from error
    if not isinstance(values, dict):
        raise InputError(f"The recipe '{path}' holds no options.", "Write one `option: value` a line.")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def recorded_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings of a `loku finetune` run, for --like; its output folder is not among them."""
    file = Path(folder) / "config.yaml"
    values = read_recipe(file) if file.is_file() else {}
    known = FinetuneOptions.fields()
    if not {"data", "learning_rate"} <= set(values) <= set(known):
        raise InputError(
            f"--like '{folder}' holds no config.yaml of `loku finetune`.",
            "Give the folder that the target was written to, or its recipe: --model, --data and the settings.",
        )
    return {name: value for name, value in values.items() if name != "output"}


def resolve(cls: type[Options], recipe: dict[str, Any], flags: dict[str, Any], *, where: str = "The recipe") -> Any:
    """Combine defaults, the method's settings (or those of --like), a recipe and flags; later ones win."""
    hints = typing.get_type_hints(cls)
    for name in recipe:
        if name not in hints:
            raise InputError(f"{where} has the unknown option '{name}'.", suggestion(name, hints))
    settings: dict[str, Any] = {}
    method = flags.get("method", recipe.get("method"))
    if "method" in hints and isinstance(method, str) and method in METHODS:
        settings = dict(METHODS[method].settings)
    like = flags.get("like", recipe.get("like"))
    if "like" in hints and isinstance(like, str):
        settings = recorded_settings(like)
    return cls.from_mapping(settings | recipe | flags, where=where)
