"""All attacks as one list: what each does to one model, what it costs, and why it cannot run where it cannot."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from loku.attacks import activations, prompting
from loku.attacks.compression import QUANTISERS, changed_weights, prune_smallest, quantiser
from loku.attacks.membership import member_numbers
from loku.attacks.relearning import FIGURES, relearn, split_forget
from loku.attacks.sampling import best_of
from loku.data.encoding import Encoder
from loku.data.records import Record
from loku.data.sources import RecordSet
from loku.errors import LokuError
from loku.evaluation.extras import add_extras
from loku.evaluation.measuring import Effort, measure
from loku.forward import text_config
from loku.models import context_length

FAMILIES = (
    "none", "relearn", "benign", "quantise", "prune", "adapter", "prompts", "sampling", "membership", "probe", "lens",
)  # fmt: skip
ROLES = ("target", "unlearned", "retain_only")
LORA_RATE, FULL_RATE, WIDTH = 2e-3, 5e-4, 96  # tuned on the demo's model, which is 96 wide
EFFORT = Effort(fit_answers=True, answers_only=True)  # all that FIGURES need

Result = dict[str, Any]


@dataclass
class Setting:
    """Everything that attacks share, whichever model they are on. `reference` judges fluency: the retain-only model."""

    tokenizer: Any
    encoder: Encoder
    forget: RecordSet
    retain: RecordSet | None = None
    holdout: RecordSet | None = None
    unrelated: RecordSet | None = None
    reference: nn.Module | None = None
    adapted: Callable[[float, str | None], nn.Module] | None = None  # the base with the adapter scaled, or another base
    other_base: str | None = None
    retain_rows: int = 32
    share: float = 0.25
    steps: int = 20
    every: int = 5
    learning_rate: float | None = None
    batch_size: int = 8
    rank: int = 8
    prune_rates: Sequence[float] = (0.1, 0.3, 0.5)
    adapter_scales: Sequence[float] = (0.75, 0.5, 0.25)
    samples: int = 8
    temperature: float = 1.0
    seed: int = 42

    @property
    def kept(self) -> list[Record]:
        """The retain rows that are measured beside each attack."""
        return [] if self.retain is None else list(self.retain)[: self.retain_rows]


@dataclass(frozen=True)
class Attack:
    """One attack. `run(setting, model)` returns its result on one model; `settings` are what the result depends on.

    `cost(rates, setting)` is in seconds on one model. `missing` says why it cannot run; then the rest is idle.
    `trains` is the kind of training step that it takes, "lora" or "full".
    """

    name: str
    family: str
    run: Callable[[Setting, nn.Module], Result]
    cost: Callable[[Rates, Setting], float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None
    roles: tuple[str, ...] = ROLES
    trains: str | None = None


@dataclass(frozen=True)
class Rates:
    """What was measured before: seconds to measure a row, and for a training step of a kind; nan is not known."""

    row: float
    steps: Mapping[str, float]


def measured_rates(setting: Setting, model: nn.Module, kinds: Collection[str] = (), rows: int = 8) -> Rates:
    """Time a measurement of a few rows and training steps of these kinds, on a model that is left as it was.

    The first time of everything is left out: it holds what happens only once. A training that fails here (no memory, a
    rate that is too high) is not known; the attacks that need it will say so.
    """
    few = list(setting.forget)[:rows]

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def look() -> Any:
        return measure(model, setting.tokenizer, setting.encoder, {"forget": few}, effort=EFFORT)

    look()
    row = seconds(look) / len(few)
    steps = dict.fromkeys(kinds, math.nan)
    for tune in kinds:
        tries = (partial(_relearn, setting, model, setting.forget, {}, tune, count) for count in (1, 3))
        with contextlib.suppress(LokuError, RuntimeError):
            one, three = (seconds(work) for work in tries)
            steps[tune] = max((three - one) / 2, three / 20)
    return Rates(row, steps)


def plan(setting: Setting) -> list[Attack]:
    """Return every attack in order, with the reason for those that lack something."""
    return [
        Attack("none", "none", _unattacked, _looking),
        *_relearning(setting),
        *_compression(setting),
        *_adapter(setting),
        *_prompts(setting),
        Attack(
            "sampling", "sampling", _sampled,
            lambda rates, given: given.samples * (len(given.forget) + len(given.kept)) * rates.row,
            {"samples": setting.samples, "temperature": setting.temperature},
            missing=_no_questions(setting),
        ),
        Attack(
            "membership", "membership", _membership,
            lambda rates, given: 4 * (len(given.forget) + len(given.holdout or ())) * rates.row,  # a backward pass each
            missing=None if setting.holdout else "it needs rows that were never trained on (--holdout)",
        ),
        Attack(
            "probe", "probe", _probed, lambda rates, given: 2 + 0.5 * len(given.forget) * rates.row,
            missing=None if len(setting.kept) > 1 else "it needs retain rows",
        ),
        Attack("lens", "lens", _lens, lambda rates, given: 0.5 * len(given.forget) * rates.row),
    ]  # fmt: skip


def _look(setting: Setting, model: nn.Module) -> Result:
    """Measure forget and retain rows: the forget rows' figures, and what stands beside them."""
    sets: dict[str, list[Record]] = {"forget": list(setting.forget)}
    if setting.kept:
        sets["retain"] = setting.kept
    measured = measure(model, setting.tokenizer, setting.encoder, sets, effort=EFFORT)
    if setting.reference is not None:
        add_extras(
            model, setting.tokenizer, setting.encoder.template, measured, reference_model=setting.reference,
            effort=EFFORT,
        )  # fmt: skip
    numbers = {name: [row.numbers() for row in rows] for name, rows in measured.items()}
    rows = [{k: row[k] for k in ("index", *FIGURES) if k in row} for row in numbers["forget"]]
    return {"rows": rows, "beside": _beside(numbers["forget"], numbers.get("retain", []))}


def _beside(forget: Sequence[Mapping[str, float]], retain: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means that say whether a model still works, of the rows that have them."""
    found = {
        "retain_exact_match": _mean(retain, "exact_match"),
        "retain_found": _mean(retain, "found"),
        "retain_rougeL_recall": _mean(retain, "rougeL_recall"),
        "repetition": _mean(forget, "repetition"),
        "output_nll": _mean(forget, "output_nll"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def _looking(rates: Rates, setting: Setting) -> float:
    return rates.row * (len(setting.forget) + len(setting.kept))


def _unattacked(setting: Setting, model: nn.Module) -> Result:
    return _look(setting, model)


def learning_rate(setting: Setting, model: nn.Module, tune: str) -> float:
    """Return the rate to relearn at: the given one, or the demo's carried over to a model's width d.

    2e-3 · √(96 / d) for LoRA and 5e-4 · 96 / d in full: 3e-4 and 1.2e-5 at width 4096, as is usual there.
    """
    if setting.learning_rate is not None:
        return setting.learning_rate
    ratio = WIDTH / int(text_config(model).hidden_size)
    return FULL_RATE * ratio if tune == "full" else LORA_RATE * ratio**0.5


def _relearn(
    setting: Setting, model: nn.Module, learn: RecordSet, probes: Mapping[str, RecordSet], tune: str, steps: int
) -> Any:
    return relearn(
        model, setting.tokenizer, learn=learn, probe=probes, template=setting.encoder.template, steps=steps,
        learning_rate=learning_rate(setting, model, tune), batch_size=setting.batch_size, every=setting.every,
        tune=tune, rank=setting.rank, max_length=setting.encoder.max_length, seed=setting.seed,
    )  # fmt: skip


def _relearning(setting: Setting) -> list[Attack]:
    """Fine-tuning on a share of the forget set, on retain rows and on unrelated ones; with LoRA and in full."""
    learn, rest = split_forget(setting.forget, setting.share, setting.seed)
    common = {
        name: getattr(setting, name) for name in ("steps", "every", "learning_rate", "batch_size", "rank")
    }  # fmt: skip
    found = []
    for tune in ("lora", "full"):
        found.append(
            Attack(
                f"relearn-{tune}", "relearn",
                partial(_curve, learn=learn, probes={"rest": rest, "learned": learn}, tune=tune),
                partial(_training_cost, tune=tune), common | {"share": setting.share}, trains=tune,
            )
        )  # fmt: skip
        for name, rows, lack in (
            ("retain", setting.retain, "it needs retain rows"),
            ("unrelated", setting.unrelated, "it needs unrelated rows (--unrelated, or general rows of the run)"),
        ):
            found.append(
                Attack(
                    f"benign-{name}-{tune}", "benign",
                    partial(_curve, learn=rows or learn, probes={"forget": setting.forget}, tune=tune),
                    partial(_training_cost, tune=tune),
                    common | {"rows": rows.sha256 if rows else None}, missing=None if rows else lack, trains=tune,
                )
            )  # fmt: skip
    return found


def _training_cost(rates: Rates, setting: Setting, *, tune: str) -> float:
    looks = 1 + -(-setting.steps // setting.every)
    return setting.steps * rates.steps[tune] + looks * _looking(rates, setting)


def _curve(
    setting: Setting, model: nn.Module, *, learn: RecordSet, probes: Mapping[str, RecordSet], tune: str
) -> Result:
    """Relearn; the rows are those of the first probe after the last step."""
    sets = dict(probes)
    if setting.retain is not None and setting.kept:
        sets["retain"] = RecordSet("retain", tuple(setting.kept), setting.retain.sha256, setting.retain.origin)
    curve = _relearn(setting, model, learn, sets, tune, setting.steps)
    ends = {name: _ends(curve, name) for name in sets}
    first = next(iter(probes))
    return {
        "rows": ends[first],
        "beside": _beside(ends[first], ends.get("retain", [])),
        "curve": {"steps": curve.steps, "means": curve.means, "losses": curve.losses},
        "learning_rate": curve.settings["learning_rate"],
    }


def _ends(curve: Any, name: str) -> list[dict[str, float]]:
    """Return the rows' figures after the last step."""
    values = curve.per_example.get(name, {})
    return [
        {"index": index} | {figure: steps[-1][place] for figure, steps in values.items()}
        for place, index in enumerate(curve.indices[name])
    ]


def _compression(setting: Setting) -> list[Attack]:
    found = [Attack(kind, "quantise", partial(_rounded, kind=kind), _looking) for kind in QUANTISERS]
    for rate in setting.prune_rates:
        found.append(Attack(f"prune-{rate:g}", "prune", partial(_pruned, rate=rate), _looking))
    return found


def _rounded(setting: Setting, model: nn.Module, *, kind: str) -> Result:
    change, who = quantiser(kind, next(model.parameters()).device)
    with changed_weights(model, change):
        return _look(setting, model) | {"by": who}


def _pruned(setting: Setting, model: nn.Module, *, rate: float) -> Result:
    with changed_weights(model, partial(prune_smallest, rate=rate)):
        return _look(setting, model)


def _adapter(setting: Setting) -> list[Attack]:
    """The adapter scaled down, dropped, and on another base: on the unlearned model alone, others have none."""
    lack = None if setting.adapted else "there is no adapter"
    found = [
        Attack(
            f"adapter-{scale:g}", "adapter", partial(_adapted, scale=scale), _looking, missing=lack, roles=ROLES[1:2]
        )
        for scale in (*setting.adapter_scales, 0.0)
    ]
    wrong = lack or (None if setting.other_base else "it needs a second base (--other-base)")
    found.append(
        Attack(
            "adapter-other-base", "adapter", partial(_adapted, scale=1.0, base=setting.other_base), _looking,
            {"other_base": setting.other_base}, missing=wrong, roles=ROLES[1:2],
        )
    )  # fmt: skip
    return found


def _adapted(setting: Setting, _: nn.Module, *, scale: float, base: str | None = None) -> Result:
    assert setting.adapted is not None
    return _look(setting, setting.adapted(scale, base))


def _asker(setting: Setting, model: Any) -> prompting.Asker:
    """Examples for few-shot prompts come from the far end of the retain set; they are not asked for."""
    rows = [record for record in setting.retain or () if not record.is_text]
    return prompting.Asker(setting.encoder, tuple(rows[-prompting.SHOTS :]), context_length(model))


def _no_questions(setting: Setting) -> str | None:
    return "running text has no questions" if all(record.is_text for record in setting.forget) else None


def _prompts(setting: Setting) -> list[Attack]:
    lacks = {form: _no_questions(setting) for form in prompting.FORMS if form != "plain"}
    if not any(record.paraphrased_question for record in setting.forget):
        lacks["paraphrase"] = lacks["paraphrase"] or "the forget rows have no paraphrased_question"
    if setting.retain is None:
        lacks["few-shot"] = lacks["few-shot"] or "it needs retain rows"
    return [
        Attack(f"prompt-{form}", "prompts", partial(_prompted, form=form), _looking, missing=lack)
        for form, lack in lacks.items()
    ]


def _prompted(setting: Setting, model: nn.Module, *, form: str) -> Result:
    asker = _asker(setting, model)
    kept = [record for record in setting.kept if form != "few-shot" or record not in asker.shots]
    forget, retain = (
        prompting.answer_all(model, setting.tokenizer, prompting.ask_all(form, asker, rows))
        for rows in (list(setting.forget), kept)
    )
    return {"rows": forget, "beside": _beside(forget, retain)}


def _sampled(setting: Setting, model: nn.Module) -> Result:
    asker = _asker(setting, model)
    forget, retain = (
        best_of(
            model, setting.tokenizer, prompting.ask_all("plain", asker, rows), count=setting.samples,
            temperature=setting.temperature, seed=setting.seed,
        )
        for rows in (list(setting.forget), setting.kept)
    )  # fmt: skip
    return {"rows": forget, "beside": _beside(forget, retain)}


def _membership(setting: Setting, model: nn.Module) -> Result:
    assert setting.holdout is not None
    members, others = (
        member_numbers(model, setting.tokenizer, setting.encoder, list(rows))
        for rows in (setting.forget, setting.holdout)
    )
    return {"rows": members, "others": others}


def _probed(setting: Setting, model: nn.Module) -> Result:
    known = list(setting.retain or ())[: 3 * len(setting.forget)]
    facts = [
        activations.facts(model, setting.tokenizer, setting.encoder, rows) for rows in (list(setting.forget), known)
    ]
    return {"rows": activations.probe(model, setting.tokenizer, *facts, seed=setting.seed)}


def _lens(setting: Setting, model: nn.Module) -> Result:
    rows = activations.facts(model, setting.tokenizer, setting.encoder, list(setting.forget))
    return {"rows": [row.numbers() for row in activations.lens(model, setting.tokenizer, rows)]}
