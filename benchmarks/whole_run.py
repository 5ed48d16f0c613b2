"""A LoKU run from start to report against the released way, part by part.

    python benchmarks/whole_run.py --output benchmarks/results/whole_run.json        about 15 minutes on an idle core
    python benchmarks/whole_run.py --quick        does it run? 3 + 3 rows, one round, one compared step; for no figures

A 30M Llama that knows its rows by heart, rows of TOFU (from $LOKU_DATA_DIR; without it random rows of TOFU's lengths),
a LoRA of rank 32 started by FILA, one epoch in steps of 8 + 8 rows. The released way (released.py) uses micro-batches
of 2 + 2 rows, as its scripts do; loku its default, 8 + 8 in one pass.

    importance       of forget and retain rows
    initialisation   of every layer's factors
    training         one epoch: the optimiser, data and logging included
    npo and kl       gradients of a step whose losses compare with the target model
    scores           log-probabilities of all candidate answers of the rows, padded to 200 against token trees
    generation       greedy answers: of the target model, which knows them by heart, of the unlearned one, and of a new
                     one that knows nothing
    run              all of it, scores and generation before and after, and of loku also checks, hashes, checkpoints,
                     export, every other metric, intervals, model card and report

16 + 16 rows are fewer than a user has (forget01: 40 and as many retain rows, five epochs), since the released way takes
over a minute for them: fixed costs, which do not grow with the rows, weigh more here than there, against loku.

Both ways run in every round, one after the other; ratios are taken within a round. The clock is the process's CPU time
on one thread, memory the peak of torch's allocations above the start of a part. Before that three steps are compared,
with IHL and with NPO and KL: at each of them losses and gradients of both ways must agree in float64, and those of loku
in float32 must be no more than twice as far from that as those of the released way (tokens known by heart make both
ill-conditioned: the gradient is proportional to 1 - p), or the benchmark fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import released
import torch
from measure import environment, peak_megabytes, seconds, summary
from meeting import model_30m
from torch import Tensor

from evaluation import NEW_TOKENS, Bench
from loku.adapters.anchor import TRAINED, attach, lora_layers
from loku.adapters.importance import estimate_importance
from loku.adapters.initialisers import Factors, initial_factors
from loku.adapters.layers import target_layers, weight
from loku.config import UnlearnOptions
from loku.evaluation.modes import end_ids
from loku.evaluation.passes import reading_of
from loku.evaluation.scoring import score
from loku.guarded_trainer import training_arguments
from loku.trainer import UnlearnTrainer
from loku.unlearning import unlearn

RANK, ALPHA, RATE, BATCH = 32, 64.0, 1e-3, 8
COMPARED = 2  # forget rows, and as many retain rows, of a step that is compared in float64
CPU = torch.device("cpu")
EXACT, ROUNDING = 1e-7, 5e-6  # relative: in float64 (norms are float32 even there), and least in float32
ALIKE = 2.0  # where float32 leaves errors above that, loku's may be this much larger than the released way's


class Compared:
    """The model and rows, and each part in both ways."""

    def __init__(self, rows: int) -> None:
        self.bench = Bench({"forget": rows, "retain": rows})
        self.model, self.pad_id = self.bench.model, self.bench.pad_id
        self.forget, self.retain = self.bench.answers[:rows], self.bench.answers[rows:]
        self.official_rows = released.importance(self.model, self.forget[:4], self.retain[:4])
        self.importance = estimate_importance(self.model, self.layers(), self.forget, self.retain, pad_id=self.pad_id)
        self.after: Any = None

    def layers(self) -> dict[str, Any]:
        """Return the model's adapted layers."""
        return target_layers(self.model)

    def factors(self) -> dict[str, Factors]:
        """Return the factors that training starts from."""
        return initial_factors(self.layers(), "fila", rank=RANK, scaling=ALPHA / RANK, importance=self.importance)

    def adapted(self, factors: dict[str, Factors]) -> Any:
        """Return a copy of the model with our two adapters."""
        model = copy.deepcopy(self.model)
        return attach(model, target_layers(model), factors, rank=RANK, alpha=ALPHA)

    def trainer(self, model: Any, folder: str, **settings: Any) -> UnlearnTrainer:
        """Return loku's trainer for one epoch."""
        options = UnlearnOptions(
            batch_size=BATCH, epochs=1.0, learning_rate=RATE, save_steps=-1, warmup_steps=0, device="cpu"
        ).as_dict()
        return UnlearnTrainer(
            model, training_arguments(folder, 1, **options), forget=self.forget, retain=self.retain,
            pad_id=self.pad_id, **settings,
        )  # fmt: skip

    def pairs(self) -> list[list[released.Pair]]:
        """Return the pairs of each step of an epoch."""
        both = list(zip(self.forget, self.retain, strict=True))
        return [both[start : start + BATCH] for start in range(0, len(both), BATCH)]

    # The parts, released and ours.

    def released_importance(self) -> None:
        """Measure all rows as released."""
        released.importance(self.model, self.forget, self.retain)

    def loku_importance(self) -> None:
        """Measure all rows as loku does."""
        estimate_importance(self.model, self.layers(), self.forget, self.retain, pad_id=self.pad_id)

    def released_initialisation(self) -> None:
        """Factorise every layer as released."""
        released.initial_factors(self.model, self.official_rows, RANK, ALPHA / RANK)

    def trained(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return an epoch of training in both ways, on models made anew."""
        factors = self.factors()
        theirs, ours = released.attached(self.model, factors, RANK, ALPHA), self.adapted(factors)
        folder = tempfile.mkdtemp()
        return (
            lambda: released.train(theirs, self.pairs(), self.pad_id, RATE),
            lambda: self.trainer(ours, folder).train(),
        )

    def released_scores(self, model: Any) -> list[Tensor]:
        """Score every candidate as released."""
        return released.scored(model, [self.bench.answers, *self.bench.others], self.pad_id)

    def loku_scores(self) -> list[Any]:
        """Score every candidate by the engine."""
        bench = self.bench
        eos_ids = end_ids(self.model, bench.tokenizer)
        return score(self.model, bench.examples, pad_id=self.pad_id, eos_ids=eos_ids, reading=bench.reading)

    def generated(self, model: Any) -> list[list[int]]:
        """Generate every answer from scratch."""
        self.bench.model = model
        try:
            return self.bench.generate(range(len(self.bench.answers)))
        finally:
            self.bench.model = self.model

    def loku_generated(self, model: Any, scores: Sequence[Any]) -> list[list[int]]:
        """Generate every answer from what its scores tell."""
        self.bench.model = model
        try:
            return self.bench.engine_generation(range(len(self.bench.answers)), scores)
        finally:
            self.bench.model = self.model

    def loku_run(self) -> None:
        """Do what `loku unlearn` does once the model is loaded, from checking the rows to the report."""
        rows = self.bench.rows
        with tempfile.TemporaryDirectory() as folder:
            result = unlearn(
                copy.deepcopy(self.model), self.bench.tokenizer, rows["forget"], rows["retain"], Path(folder) / "run",
                rank=RANK, alpha=ALPHA, learning_rate=RATE, batch_size=BATCH, epochs=1.0,
                max_new_tokens=NEW_TOKENS, warmup_steps=0, device="cpu", threads=1,
            )  # fmt: skip
            assert (result.folder / "report.html").is_file()
        if self.after is None:
            self.after = merged(self.model, result.model)


def merged(model: Any, adapted: Any) -> Any:
    """Return a copy of the model with an adapted model's function in ordinary weights."""
    found = copy.deepcopy(model)
    layers = target_layers(found)
    with torch.no_grad():
        for name, layer in lora_layers(adapted).items():
            for adapter in layer.active_adapters:
                A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                weight(layers[name]).add_(layer.scaling[adapter] * B @ A)
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the relative error of one set of gradients, by the names of the other."""
    error = sum(float((one[name].double() - value).square().sum()) for name, value in other.items())
    return float((error / sum(float(value.square().sum()) for value in other.values())) ** 0.5)


def agreement(c: Compared, kind: str, steps: int = 3) -> list[dict[str, float]]:
    """Compare losses and gradients of both ways from the same weights, at several steps; fail where it is no rounding.

    Both run in float64, where they must agree to `EXACT`, and in float32, where loku must be no more than `ALIKE` times
    as far from that as the released way is itself. Weights move by an optimiser of ours; the other models are given
    them before each step.
    """
    factors, wide = c.factors(), copy.deepcopy(c.model).double()
    names = {"forget_loss": "npo", "retain_loss": "kl"} if kind == "npo and kl" else {}
    theirs = {
        "float32": (released.attached(c.model, factors, RANK, ALPHA), c.model),
        "float64": (released.attached(wide, factors, RANK, ALPHA).double(), wide),
    }
    ours = {"float32": c.adapted(factors), "float64": c.adapted(factors).double()}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {dtype: c.trainer(model, folder, **names) for dtype, model in ours.items()}
        parameters = [p for p in ours["float32"].parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for step in range(steps):
            places = [(step * COMPARED + i) % len(c.forget) for i in range(COMPARED)]
            pairs = [(c.forget[place], c.retain[(place + step) % len(c.retain)]) for place in places]
            results = {}
            for dtype in ("float64", "float32"):
                for other in (*(model for model, _ in theirs.values()), ours["float64"]):
                    share_weights(ours["float32"], other)
                results["loku", dtype] = loku_step(trainers[dtype], pairs, places)
                results["released", dtype] = released_step(*theirs[dtype], pairs, c.pad_id, npo=bool(names))
            right, gradients = results["released", "float64"]
            found.append({})
            for (way, dtype), (loss, other) in results.items():
                if (way, dtype) != ("released", "float64"):
                    found[-1][f"{way} {dtype}, loss"] = abs(loss - right) / max(abs(right), 1e-3)  # the first KL is 0
                    found[-1][f"{way} {dtype}, gradient"] = difference(other, gradients)
            optimiser.step()
            optimiser.zero_grad()
            check(found[-1], f"{kind}, step {step + 1}")
    return found


def check(found: dict[str, float], where: str) -> None:
    """Stop where losses or gradients differ by more than rounding."""
    for part in ("loss", "gradient"):
        allowed = max(ROUNDING, ALIKE * found[f"released float32, {part}"])
        if not (found[f"loku float64, {part}"] <= EXACT and found[f"loku float32, {part}"] <= allowed):
            raise SystemExit(f"{where}: the two ways disagree: {found}.")


def loku_step(
    trainer: UnlearnTrainer, pairs: Sequence[released.Pair], places: Sequence[int]
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of a step; the gradients stay where the optimiser finds them."""
    rows = zip(places, pairs, strict=True)
    batch = trainer.data_collator([{"forget": f, "retain": r, "position": place} for place, (f, r) in rows])
    trainer.model.zero_grad()
    loss = float(trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], CPU)))
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def released_step(
    model: Any, oracle: Any, pairs: Sequence[released.Pair], pad_id: int, *, npo: bool
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of a step of the released way."""
    if npo:
        return released.gradients(model, lambda: released.npo_kl_step(model, oracle, pairs, pad_id))
    return released.gradients(model, lambda: released.ihl_step(model, pairs, pad_id))


def share_weights(ours: Any, theirs: Any) -> None:
    """Give the released model the trained factors of ours."""
    others = lora_layers(theirs)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            for part in ("lora_A", "lora_B"):
                getattr(others[name], part)["default"].weight.copy_(getattr(layer, part)[TRAINED].weight)


def npo_kl(c: Compared) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a step's gradients in both ways; the log-probabilities of the forget rows were cached before training."""
    factors = c.factors()
    theirs, ours = released.attached(c.model, factors, RANK, ALPHA), c.adapted(factors)
    trainer = c.trainer(ours, tempfile.mkdtemp(), forget_loss="npo", retain_loss="kl")
    (pairs, *_), items = c.pairs(), [trainer.train_dataset[i] for i in range(min(BATCH, len(c.forget)))]

    def step() -> None:
        batch = trainer.data_collator(items)
        trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], CPU))
        trainer.model.zero_grad()

    return (
        lambda: released.gradients(theirs, lambda: released.npo_kl_step(theirs, c.model, pairs, c.pad_id)),
        step,
    )


def start_up() -> dict[str, float]:
    """Return the CPU seconds of a fresh process that shows the help, and of one that imports the package."""
    found = {}
    for name, code in (("loku --help", "-m loku --help"), ("import loku", "-c import_loku")):
        arguments = [sys.executable, *code.replace("import_loku", "import|loku").split()]
        times = []
        for _ in range(5):
            before = os.times()
            subprocess.run([a.replace("|", " ") for a in arguments], check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            times.append(sum(after[2:4]) - sum(before[2:4]))  # of children, user and system
        found[name] = min(times)
    return found


def measure(c: Compared, rounds: int) -> dict[str, Any]:
    """Time every part in both ways, and take the peak of their memory once, as the warm-up."""
    bench, scores = c.bench, c.loku_scores()
    c.loku_run()
    new = model_30m().eval()
    new.generation_config = bench.model.generation_config
    others = {
        model: score(
            model, bench.examples, pad_id=c.pad_id, eos_ids=end_ids(model, bench.tokenizer), reading=reading_of(model)
        )
        for model in (c.after, new)
    }
    steps = npo_kl(c)
    ways: dict[str, Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]] = {
        "importance": lambda: (c.released_importance, c.loku_importance),
        "initialisation": lambda: (c.released_initialisation, c.factors),
        "training": c.trained,
        "npo and kl": lambda: steps,
        "scores": lambda: (lambda: c.released_scores(c.model), c.loku_scores),
        "generation, before": lambda: (lambda: c.generated(c.model), lambda: c.loku_generated(c.model, scores)),
        "generation, after": lambda: (
            lambda: c.generated(c.after),
            lambda: c.loku_generated(c.after, others[c.after]),
        ),
        "generation, new model": lambda: (lambda: c.generated(new), lambda: c.loku_generated(new, others[new])),
        "run": lambda: (lambda: None, c.loku_run),
    }
    peaks = {name: [peak_megabytes(way, CPU)[0] for way in make()] for name, make in ways.items() if name != "run"}
    same = {
        "before": c.generated(c.model) == c.loku_generated(c.model, scores),
        **{
            name: c.generated(model) == c.loku_generated(model, others[model])
            for name, model in (("after", c.after), ("new model", new))
        },
    }
    times: dict[str, dict[str, list[float]]] = {name: {"released": [], "loku": []} for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            for way, run in zip(("released", "loku"), make(), strict=True):
                times[name][way].append(seconds(run, CPU, time.process_time))
        once, twice = ("importance", "initialisation", "training", "generation, before", "generation, after"), "scores"
        whole = sum(times[name]["released"][-1] for name in once) + 2 * times[twice]["released"][-1]
        times["run"]["released"][-1] = whole
    parts = {
        name: {
            "seconds": {way: summary(values) for way, values in found.items()},
            "times_faster": summary([a / b for a, b in zip(found["released"], found["loku"], strict=True)]),
        }
        for name, found in times.items()
    }
    for name, (theirs, ours) in peaks.items():
        parts[name]["peak_megabytes"] = {"released": theirs, "loku": ours}
    difference = max(
        abs(a.nll - float(-b)) / a.nll for a, b in zip(scores, c.released_scores(c.model), strict=True) if a.nll > 1
    )
    return {"parts": parts, "same_answers": same, "largest_score_difference": difference}


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was to be reached, and what was."""
    parts = found["parts"]
    memory = parts["training"]["peak_megabytes"]
    wanted = [
        ("one epoch of two training steps, times faster", parts["training"]["times_faster"]["median"], 8.0, True),
        ("one epoch, share of the memory", memory["loku"] / memory["released"], 1 / 3, False),
        ("importance, times faster", parts["importance"]["times_faster"]["median"], 6.5, True),
        ("scores, times faster", parts["scores"]["times_faster"]["median"], 8.0, True),
        ("generation of memorised rows", parts["generation, before"]["times_faster"]["median"], 2.0, True),
        ("generation, nothing known", parts["generation, new model"]["times_faster"]["median"], 1.0, True),
        ("run from start to report", parts["run"]["times_faster"]["median"], 8.0, True),
        ("loku --help, seconds", found["start_up"]["loku --help"], 0.3, False),
        ("import loku, seconds", found["start_up"]["import loku"], 0.5, False),
    ]
    return [
        {"target": text, "value": value, "wanted": goal, "reached": value >= goal if at_least else value <= goal}
        for text, value, goal, at_least in wanted
    ]


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rows", type=int, default=16, help="forget rows, and as many retain rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="3 rows of each, one round, one compared step")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = 3, 1
    torch.set_num_threads(1)
    about, start = environment(threads=1), time.perf_counter()
    c = Compared(args.rows)
    lengths = [len(example.input_ids) for example in c.forget + c.retain]
    about |= {
        "rows": c.bench.source, "forget_and_retain_rows": len(lengths), "tokens": sum(lengths),
        "released_tokens": released.LENGTH * len(lengths), "sequences_scored": len(c.bench.examples),
        "parameters": sum(p.numel() for p in c.model.parameters()), "rank": RANK,
    }  # fmt: skip
    found: dict[str, Any] = {
        "agreement": {kind: agreement(c, kind, 1 if args.quick else 3) for kind in ("ihl and nll", "npo and kl")}
    }
    found |= {"start_up": start_up()}
    found |= measure(c, args.rounds)
    found["targets"] = targets(found)
    about["minutes"] = round((time.perf_counter() - start) / 60, 1)
    for name, part in found["parts"].items():
        peak = part.get("peak_megabytes", {"released": 0, "loku": 0})
        print(
            f"{name:20} {part['times_faster']['median']:6.2f} times faster, {part['seconds']['loku']['median']:.2f} s, "
            f"{peak['released']:.0f} -> {peak['loku']:.0f} MB"
        )
    for line in found["targets"]:
        print(
            f"{'' if line['reached'] else 'NOT REACHED: '}{line['target']}: {line['value']:.3g} ({line['wanted']:.3g})"
        )
    print(found["agreement"], found["same_answers"], f"{about['minutes']} minutes")
    if args.output:
        args.output.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
