"""The demo's steps, each run whole in a worker process: pretraining, target, retain-only, one method each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from loku.assessment import assess
from loku.assessment_rows import AssessmentRows
from loku.attack import attack_run
from loku.config import FinetuneOptions, UnlearnOptions, resolve
from loku.data.encoding import Encoder
from loku.data.fiction import REPLAY_SHARE, fiction_model_config, fiction_tokenizer, mix_replay
from loku.data.prompts import TagTemplate, save_template
from loku.data.sources import RecordSet, load_records
from loku.demo_workers import Step
from loku.evaluation.own import evaluate_own
from loku.evaluation.reference import load_reference
from loku.evaluation.results import Results, read_results, write_results
from loku.finetune import train_model
from loku.job import prepare
from loku.models import load_model, load_tokenizer, weights_sha256
from loku.progress import forward_to
from loku.quiet import quiet_libraries
from loku.runs import RunFolder
from loku.training import run_job

EVAL_ROWS = 96

BATCH = 32
PRETRAINING = {"max_steps": 300, "learning_rate": 4e-3}
FINETUNING = {"max_steps": 260, "learning_rate": 4e-3}  # the same steps for target and retain-only
UNLEARNING = {"max_steps": 100, "batch_size": 8, "grad_accum": 1, "warmup_steps": 5, "rank": 8, "learning_rate": 1e-3}
LEARNING_RATES = {"loku": 5e-4}  # FILA starts from large factors: the same rate moves them further
TEMPLATE = TagTemplate()


def start_worker(queue: Any) -> None:
    """Prepare a worker process: one thread, no chatter, progress to the queue."""
    torch.set_num_threads(1)
    quiet_libraries()
    forward_to(lambda *update: queue.put(update))


def run_step(step: Step) -> None:
    """Run one step of the demo."""
    kind, _, method = step.name.partition(" ")
    if kind == "pretrain":
        _pretrain(step)
    elif kind == "unlearn":
        _unlearn(step, method)
    elif kind == "attack":
        _attack(step, method)
    else:
        _finetune(step, kind)


def _rows(step: Step, name: str) -> RecordSet:
    return load_records(step.folder / "data" / f"{name}.jsonl", option=name)


def _raw(records: RecordSet) -> list[dict[str, str]]:
    return [{"question": record.question or "", "answer": record.answer or ""} for record in records]


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    folder: Path,
    step: Step,
    settings: dict[str, Any],
) -> None:
    """Train on rows and write a model folder."""
    options = FinetuneOptions(
        output=str(folder), seed=step.seed, batch_size=BATCH, grad_accum=1, scheduler="cosine", warmup_steps=20,
        adam_beta2=0.95, save_steps=-1, device="cpu", **settings,
    )  # fmt: skip
    run = RunFolder.check(folder, options.as_dict())
    run.start(command="demo")
    encoded = Encoder(tokenizer, TEMPLATE, options.max_length).encode_records(load_records(rows, option=step.name))
    train_model(model, encoded, tokenizer.pad_token_id, run, options, title=step.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_template(TEMPLATE, folder)
    run.update(status="finished")


def _pretrain(step: Step) -> None:
    """Stage 0: the language, and what everybody knows about the world."""
    pretraining = _rows(step, "pretraining")
    names = ("pretraining", "full", "general", "holdout")
    texts = [text for name in names for record in _rows(step, name) for text in _texts(record)]
    tokenizer = fiction_tokenizer(texts)
    torch.manual_seed(step.seed)
    model = AutoModelForCausalLM.from_config(fiction_model_config(len(tokenizer)))
    _train(model, tokenizer, _raw(pretraining), step.folder / "pretrained", step, PRETRAINING)


def _texts(record: Any) -> list[str]:
    fields = (record.question, record.answer, record.paraphrased_question, record.paraphrased_answer)
    return [text for text in (*fields, *record.perturbed_answers) if text]


def _finetune(step: Step, kind: str) -> None:
    """Stage 1: the fictitious people, all of them or without the forget set, with the world mixed in; then measure."""
    base = step.folder / "pretrained"
    learned = _raw(_rows(step, "full" if kind == "target" else "retain"))
    seen = FINETUNING["max_steps"] * BATCH * (1 - REPLAY_SHARE)
    passes = math.ceil(seen / len(learned))
    rows = mix_replay(learned, _raw(_rows(step, "pretraining")), passes=passes, seed=step.seed)
    tokenizer = load_tokenizer(str(base))
    folder = step.folder / kind
    _train(load_model(str(base), device="cpu"), tokenizer, rows, folder, step, FINETUNING)
    write_results(_measure(load_model(str(folder), device="cpu"), tokenizer, step, kind), folder)


def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: Step, name: str) -> Results:
    return evaluate_own(
        model,
        tokenizer,
        forget=_rows(step, "forget"),
        retain=_rows(step, "retain"),
        general=_rows(step, "general"),
        max_rows=EVAL_ROWS,
        template=TEMPLATE,
        keep_text=True,
        seed=step.seed,
        model_name=name,
        model_sha256=weights_sha256(model),
    )


def _unlearn(step: Step, method: str) -> None:
    """Unlearn with one method from the target model, and measure before, after and retain-only."""
    target = step.folder / "target"
    settings = {"learning_rate": LEARNING_RATES.get(method, UNLEARNING["learning_rate"])}
    options: UnlearnOptions = resolve(
        UnlearnOptions,
        {},
        {
            "method": method,
            "model": str(target),
            "forget": str(step.folder / "data" / "forget.jsonl"),
            "retain": str(step.folder / "data" / "retain-mixed.jsonl"),
            "general": str(step.folder / "data" / "general.jsonl"),
            "retain_only_model": str(step.folder / "retain-only"),
            "output": str(step.folder / "runs" / method),
            "eval_rows": EVAL_ROWS,
            "keep_text": True,
            "seed": step.seed,
            "device": "cpu",
            "save_steps": -1,
        }
        | UNLEARNING
        | settings,
    )
    assert options.model is not None
    assert options.output is not None
    run = RunFolder.check(options.output, options.as_dict())
    tokenizer = load_tokenizer(options.model)
    forget, retain = _rows(step, "forget"), _rows(step, "retain-mixed")
    job = prepare(load_model(options.model, device="cpu"), tokenizer, forget, retain, options)
    rows = AssessmentRows(
        retain=_rows(step, "retain"),
        general=_rows(step, "general"),
        target=read_results(target / "results.json"),
        reference=load_reference(step.folder / "retain-only" / "results.json"),
    )
    assess(run_job(job, run, options, rows), job, run, options, rows)


def _attack(step: Step, method: str) -> None:
    """Run every attack on a method's run; the pretrained model is the wrong base for its adapter."""
    data = step.folder / "data"
    attack_run(
        step.folder / "runs" / method,
        retain=str(data / "retain.jsonl"),
        holdout=str(data / "holdout.jsonl"),
        other_base=str(step.folder / "pretrained"),
        device="cpu",
        seed=step.seed,
    )
