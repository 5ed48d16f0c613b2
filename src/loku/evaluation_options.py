"""Options of the verbs that measure: evaluate and attack. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from loku.options import option, seed_option, several
from loku.training_options import ModelOptions


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
