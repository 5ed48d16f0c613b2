"""`loku attack`: attacks on target, unlearned and retain-only models side by side, from options to attacks.json."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from loku.adapters.export import PortableLora, load_lora
from loku.attack_models import adapter_maker, choose, load, merged_model, run_attacks
from loku.attack_sources import Sources, find_sources, load_setting
from loku.attack_store import AttackStore
from loku.attacks.suite import ROLES, Attack, Rates, Setting, measured_rates, plan
from loku.attacks.summary import summarise
from loku.config import AttackOptions
from loku.errors import InputError
from loku.progress import console, progress, say
from loku.record import refresh_record
from loku.report.html import write_report

ORDER = ("retain_only", "target", "unlearned")  # the reference's own figures first
NAMES = {"target": "target", "unlearned": "unlearned", "retain_only": "retain-only"}


def attack_run(folder: str | Path, **settings: Any) -> dict[str, Any]:
    """Run all attacks on a finished run of `loku unlearn`, and return what attacks.json then holds.

    `settings` are fields of `AttackOptions`, such as attacks="relearn,quantise" or holdout="holdout.jsonl". Attacks
    that attacks.json already holds are not run again. Raises InputError before any work for what cannot be used.
    """
    options = AttackOptions(run=str(folder), **settings)
    options.check()
    return attack(options)


def attack(options: AttackOptions) -> dict[str, Any]:
    """Run `loku attack`: print what it will cost, run what is not done yet, write attacks.json after each attack.

    Models are loaded one after the other, beside a second copy of the retain-only model that judges fluency. An attack
    that fails on a model is said and left out; the others go on. Raises InputError before any work.
    """
    sources = find_sources(options)
    if not (options.output or options.run or options.json):
        raise InputError("--output is missing.", "Give a folder for attacks.json, or --json to print it.")
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = load_setting(sources, options)
    planned = plan(setting)
    chosen = choose(options.attacks, planned)
    folder = options.output or options.run
    store = AttackStore(Path(folder) / "attacks.json" if folder else None, sources.request(setting, options))
    store.check(chosen)
    roles = [role for role in ORDER if sources.models.get(role)]
    kept = len(setting.kept)
    jobs = {
        role: [item for item in chosen if role in item.roles and not store.has(item.name, role, kept)] for role in roles
    }
    if "retain_only" not in roles:
        print("warning: there is no retain-only model (--retain-only-model): no robustness score", file=sys.stderr)
    if any(jobs.values()):
        _work(setting, sources, options, jobs, store)
    store.conclude(
        {item.name: item.missing for item in planned if item.missing}, summarise(store.results, seed=options.seed)
    )
    if not options.json:
        print_summary(store.document)
    if options.run and not options.output and (Path(options.run) / "results.json").is_file():
        refresh_record(options.run)
        console.print(f"report: {write_report([options.run], Path(options.run) / 'report.html')}")
    return store.document


def _work(
    setting: Setting, sources: Sources, options: AttackOptions, jobs: dict[str, list[Attack]], store: AttackStore
) -> None:
    """Load one model after the other and run what is left to do on it."""
    lora = load_lora(sources.adapter) if sources.adapter else None
    setting.adapted = adapter_maker(lora, str(sources.models["target"]), options) if lora is not None else None
    if sources.models.get("retain_only"):
        setting.reference = load(str(sources.models["retain_only"]), options)
    rates = None
    for role, attacks in jobs.items():
        if not attacks:
            continue
        model = _role_model(role, sources, lora, options)
        if rates is None:
            kinds = {item.trains for attacks in jobs.values() for item in attacks if item.trains}
            rates = measured_rates(setting, model, sorted(kinds))
            print_costs(jobs, rates, setting)
        said = functools.partial(_failed, NAMES[role])
        with progress(f"attacking the {NAMES[role]} model") as update:
            run_attacks(setting, model, role, attacks, store, update=update, failed=said)
        del model


def _failed(model: str, attack: str, reason: str) -> None:
    print(f"warning: {attack} failed on the {model} model: {reason}", file=sys.stderr)


def _role_model(role: str, sources: Sources, lora: PortableLora | None, options: AttackOptions) -> PreTrainedModel:
    """Load one of the three models; an adapter is merged in, in the base's type, as it would be released."""
    if role == "unlearned" and lora is not None:
        return merged_model(str(sources.models["target"]), lora, 1.0, options)
    return load(str(sources.models[role]), options)


def print_costs(jobs: dict[str, list[Attack]], rates: Rates, setting: Setting) -> None:
    """Print what is to be run, on how many models, and about how long each attack takes."""
    rows = list(_costs(jobs, rates, setting))
    table = Table("attack", "models", "seconds, about", box=None, pad_edge=False)
    for name, models, seconds in rows:
        table.add_row(name, str(models), "?" if math.isnan(seconds) else f"{seconds:.0f}" if seconds >= 1 else "< 1")
    console.print(table)
    known = [seconds for *_, seconds in rows if not math.isnan(seconds)]
    more = " and what is not known" if len(known) < len(rows) else ""
    console.print(f"{sum(models for _, models, _ in rows)} measurements, about {sum(known):.0f} s{more} in all")


def _costs(jobs: dict[str, list[Attack]], rates: Rates, setting: Setting) -> Iterator[tuple[str, int, float]]:
    order = dict.fromkeys(item.name for attacks in jobs.values() for item in attacks)
    for name in order:
        same = [item for attacks in jobs.values() for item in attacks if item.name == name]
        yield name, len(same), len(same) * same[0].cost(rates, setting)


def print_summary(document: dict[str, Any]) -> None:
    """Print figures of the three models under each attack, the score, and the headline."""
    headings = ("\nattack", "\ntarget", "\nunlearned", "retain-\nonly", "\nscore", "retain\nset", "repe-\ntition")
    table = Table(*headings, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, found in document["summary"]["attacks"].items():
        beside = found["beside"].get("unlearned", {})
        for label, figures, score in _lines(name, found):
            table.add_row(
                label,
                *(_two(figures.get(role)) for role in ROLES),
                "-" if score["score"] is None else f"{score['score']:.2f} ({score['low']:.2f}-{score['high']:.2f})",
                _kept(beside) + ("!" if found.get("damaged") else ""),
                _two(beside.get("repetition")),
            )
    console.print(table)
    for name, reason in (document["missing"] | document["failed"]).items():
        console.print(f"not run: {name}: {reason}")
    found = document["summary"]["headline"]
    say(str(found["level"]), f": {found['sentence']}")
    console.print("score 0: as forgotten as in the retain-only model; 1: as known as in the target; !: damaged")


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _kept(beside: dict[str, float]) -> str:
    names = ("retain_exact_match", "retain_found", "retain_rougeL_recall")
    return next((f"{beside[name]:.2f}" for name in names if name in beside), "-")


def _lines(name: str, found: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], dict[str, Any]]]:
    """Yield a row of the table for an attack; for membership one for each attack of the family."""
    for label, each in found.get("membership", {}).items():
        yield label, each["auc"], each["score"]
    if "score" in found:
        means = {role: own[found["metric"]]["mean"] for role, own in found["figures"].items() if found["metric"] in own}
        yield name, means, found["score"]
