"""What the evaluation engine saves: the TOFU suite against one pass per metric, padded to the batch, with full logits.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation.json        about 3 minutes on one core

A 30M Llama on rows of TOFU's four sets (from $LOKU_DATA_DIR; without it random rows of TOFU's lengths), measured as the
suite does: the answer, its paraphrase and its perturbed answers are scored, the answer is generated. Like a target
model it was trained, here, until it knew the answers of the forget and retain rows by heart. All ways of a part run in
every round, one after the other; ratios are taken within a round. The clock is the process's CPU time on one thread.

    scores       log-probabilities of all candidate answers
    generation   greedy answers, from what the scores tell against from scratch: rows known by heart, and other rows
    suite        everything `loku evaluate --suite tofu` reports: of the target model, and of one that knows nothing

The other ways, written from their descriptions:

    once         every candidate once; file order, batches padded to their longest row, logits at every position
    per metric   the same, with one pass for each metric: `ANSWER_METRICS` read the answer, the truth ratio the other
                 candidates, and the normalised probability of two sets these once more. The engine's one pass has
                 what all of them need
    official     the released TOFU scripts: every candidate once, padded to 200 tokens, the model's own loss and then
                 the loss by row from all logits
    generate     `model.generate` on batches in file order, padded to their longest prompt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import environment, peak_megabytes, seconds, summary
from meeting import VOCAB, model_30m
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loku.answer_trainer import AnswerCollator
from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Encoder, Example
from loku.data.prompts import TagTemplate
from loku.data.records import Record
from loku.data.sources import load_records
from loku.evaluation.decoding import decodes_plainly
from loku.evaluation.generation import generate, known_start
from loku.evaluation.logs import NORMALISED_SETS
from loku.evaluation.modes import end_ids
from loku.evaluation.passes import reading_of
from loku.evaluation.scoring import predicting_ids, score
from loku.evaluation.tofu import MAX_LENGTH, evaluate_tofu, tofu_sources
from loku.evaluation.token_tree import grow_trees
from loku.forward import Forward
from loku.losses.retain import nll

ROWS = {"forget": 5, "retain": 5, "real_authors": 2, "world_facts": 2}  # about in the proportion of the whole sets
LEARNT = ROWS["forget"] + ROWS["retain"]
BATCH = 8  # rows in a batch of the usual way
TOKENIZER_VOCAB = 4_000  # learnt from all rows: 4.3 characters a token, about as many as Llama's or Phi's have
NEW_TOKENS = 60
ANSWER_METRICS = (
    "probability", "exact_memorisation", "extraction_strength", "predictive_entropy", "mia_loss", "mia_zlib",
    "mia_min_k", "mia_min_k_plus_plus",
)  # fmt: skip


def rows_of_tofu(counts: dict[str, int]) -> tuple[dict[str, list[dict[str, Any]]], list[str], str]:
    """Return so many rows of each set, the texts of all rows, and where they are from."""
    if os.environ.get("LOKU_DATA_DIR"):
        sets = {name: [_row(record) for record in load_records(source)] for name, source in tofu_sources().items()}
        return {name: rows[: counts.get(name, 0)] for name, rows in sets.items()}, _texts(sets), "TOFU"
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 8))) for _ in range(2000)]
    lengths = {"forget": (16, 34), "retain": (16, 34), "real_authors": (9, 3), "world_facts": (9, 3)}

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(max(2, round(count * draw.uniform(0.6, 1.4)))))

    made = {}
    for name, (question, answer) in lengths.items():
        made[name] = []
        for _ in range(counts.get(name, 0)):
            row: dict[str, Any] = {"question": text(question), "answer": text(answer)}
            row["perturbed_answer"] = [f"{row['answer'][:12]} {text(answer)}" for _ in range(5 if answer > 9 else 3)]
            made[name].append(row | ({"paraphrased_answer": text(answer)} if answer > 9 else {}))
    return made, _texts(made), "random rows of TOFU's lengths"


def _texts(sets: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = [row for rows in sets.values() for row in rows]
    return [text for row in rows for text in (row["question"], row["answer"], *row["perturbed_answer"])]


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"question": record.question, "answer": record.answer}
    row["perturbed_answer"] = list(record.perturbed_answers)
    return row | ({"paraphrased_answer": record.paraphrased_answer} if record.paraphrased_answer else {})


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def memorise(model: Any, examples: Sequence[Example], pad_id: int) -> int:
    """Train until every supervised token of the examples is the model's first choice; return the steps taken."""
    forward = Forward(model)
    batch = AnswerCollator(pad_id, forward.layout)(examples)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, 100):
        scores = forward.scores(model, batch)
        loss = nll(scores)
        if float((scores.target - scores.runner_up).detach().min()) > 0 and float(loss.detach()) < 0.02:
            return step
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    raise RuntimeError("the rows were not memorised in 100 steps")


class Bench:
    """The model, the rows as examples, and both ways of measuring them."""

    def __init__(self, counts: dict[str, int] = ROWS) -> None:
        rows, texts, self.source = rows_of_tofu(counts)
        self.rows = {name: found for name, found in rows.items() if found}
        self.tokenizer = tokenizer_of(texts)
        self.pad_id = self.tokenizer.pad_token_id
        self.model = model_30m()
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        self.model.generation_config.pad_token_id = self.pad_id
        self.encoder = Encoder(self.tokenizer, TagTemplate(), max_length=MAX_LENGTH)
        self.answers: list[Example] = []
        self.others: list[list[Example]] = []  # by kind of candidate: paraphrase, first perturbed answer, ...
        self.normalised: list[list[Example]] = []  # what the normalised probability reads beside the answer
        for name, rows in self.rows.items():
            records = list(load_records(rows))
            self.answers += [self.encoder.encode_answer(record, record.answer) for record in records]
            columns = [[record.paraphrased_answer for record in records if record.paraphrased_answer]]
            columns += [list(column) for column in zip(*(record.perturbed_answers for record in records), strict=True)]
            encoded = [
                [self.encoder.encode_answer(r, text) for r, text in zip(records, column, strict=True)]
                for column in columns
                if column
            ]
            self.others += encoded
            self.normalised += encoded if name in NORMALISED_SETS else []
        self.examples = [*self.answers, *(example for column in self.others for example in column)]
        self.steps = memorise(self.model, self.answers[: counts["forget"] + counts["retain"]], self.pad_id)
        self.model.eval()
        self.reading = reading_of(self.model)  # once per model

    def padded(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """Make a usual pass: full logits of padded batches in file order; return each token's log-probability."""
        found = []
        for start in range(0, len(examples), BATCH):
            batch = pad_batch(examples[start : start + BATCH], self.pad_id)
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = self.model(**batch, use_cache=False).logits[:, :-1].float()
                logprobs = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            found += [row[mask] for row, mask in zip(logprobs.view_as(labels), labels != IGNORE, strict=True)]
        return found

    def engine_scores(self) -> list[Any]:
        """Score every candidate by the engine."""
        eos_ids = end_ids(self.model, self.tokenizer)
        return score(self.model, self.examples, pad_id=self.pad_id, eos_ids=eos_ids, reading=self.reading)

    def once(self) -> list[torch.Tensor]:
        """Score every candidate once, column by column."""
        return [row for column in (self.answers, *self.others) for row in self.padded(column)]

    def per_metric(self) -> None:
        """Score what each metric reads, for each metric."""
        for column in (*[self.answers] * len(ANSWER_METRICS), *self.others, *self.normalised):
            self.padded(column)

    def official(self) -> list[torch.Tensor]:
        """Return the loss of every candidate, as the released scripts compute it."""
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORE}
        found = []
        for column in (self.answers, *self.others):
            for start in range(0, len(column), BATCH):
                batch = pad_batch(column[start : start + BATCH], self.pad_id)
                more = MAX_LENGTH - batch["input_ids"].shape[1]
                batch = {name: F.pad(value, (0, more), value=fill[name]) for name, value in batch.items()}
                with torch.no_grad():
                    logits = self.model(**batch).logits[:, :-1].contiguous()
                    labels = batch["labels"][:, 1:].contiguous()
                    losses = F.cross_entropy(logits.transpose(-1, -2), labels, ignore_index=IGNORE, reduction="none")
                found += list(losses.sum(dim=-1))
        return found

    def generate(self, rows: Sequence[int]) -> list[list[int]]:
        """Let `model.generate` continue padded batches in file order."""
        answers = []
        for start in range(0, len(rows), BATCH):
            prompts = [self.prompt(row) for row in rows[start : start + BATCH]]
            batch = pad_batch([Example(0, ids, ids, 0, 0) for ids in prompts], self.pad_id, side="left")
            output = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )  # fmt: skip
            answers += [
                _until(ids, self.tokenizer.eos_token_id) for ids in output[:, batch["input_ids"].shape[1] :].tolist()
            ]
        return answers

    def engine_generation(self, rows: Sequence[int], scores: Sequence[Any]) -> list[list[int]]:
        """Continue from what the scores, made before anyway, tell of the answers."""
        prompts = [self.prompt(row) for row in rows]
        known = [known_start(self.answers[row], scores[row].hits, len(self.prompt(row))) for row in rows]
        found = generate(self.model, self.tokenizer, prompts, max_new_tokens=NEW_TOKENS, known=known)
        return [list(answer.ids) for answer in found]

    def prompt(self, row: int) -> list[int]:
        """Return what is asked."""
        return self.answers[row].input_ids[: self.answers[row].generation_length]

    def engine_suite(self) -> None:
        """Do what `loku evaluate --suite tofu` does, metrics and intervals included."""
        sources = {name: load_records(rows) for name, rows in self.rows.items()}
        evaluate_tofu(
            self.model, self.tokenizer, sources=sources, template=TagTemplate(), max_new_tokens=NEW_TOKENS,
            model_sha256="-",
        )  # fmt: skip


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


Times = dict[str, list[float]]


def timed(times: Times, name: str, run: Callable[[], Any]) -> Any:
    """Run something, note its time, and return what it returned."""
    kept: list[Any] = []
    times.setdefault(name, []).append(seconds(lambda: kept.append(run()), torch.device("cpu"), time.process_time))
    return kept[0]


def measure(bench: Bench, rounds: int) -> tuple[Times, dict[str, Any]]:
    """Run every way in every round; return their times, and what they agree on."""
    learnt, others = range(LEARNT), range(LEARNT, len(bench.answers))
    target, stranger = bench.model, model_30m().eval()
    stranger.generation_config = target.generation_config
    times: Times = {}
    for _ in range(rounds):
        bench.model = target
        timed(times, "checks", lambda: (reading_of(target), decodes_plainly(target)))
        scores = timed(times, "scores, engine", bench.engine_scores)
        once = timed(times, "scores, once", bench.once)
        timed(times, "scores, per metric", bench.per_metric)
        official = timed(times, "scores, official", bench.official)
        said = []
        for name, rows in (("learnt", learnt), ("other", others)):
            ours = timed(times, f"{name}, engine", partial(bench.engine_generation, rows, scores))
            said.append(ours == timed(times, f"{name}, generate", partial(bench.generate, rows)))
        timed(times, "target, engine", bench.engine_suite)
        bench.model = stranger
        timed(times, "stranger, engine", bench.engine_suite)
        timed(times, "stranger, generate", partial(bench.generate, range(len(bench.answers))))
    bench.model = target
    return times, {"differences": differences(scores, once, official), "same_answers": all(said)}


def differences(engine: Sequence[Any], once: Sequence[Any], official: Sequence[Any]) -> dict[str, float]:
    """Return how far the engine's log-probabilities and losses are from the other ways'."""
    by_token = [abs(torch.from_numpy(a.logprobs) - b).max() for a, b in zip(engine, once, strict=True)]
    by_row = [abs(a.nll - float(b)) / a.nll for a, b in zip(engine, official, strict=True) if a.nll > 1]
    return {"log-probability, nats": float(max(by_token)), "loss of a row, relative": float(max(by_row))}


def parts(times: Times) -> dict[str, Any]:
    """Return times and ratios within rounds, part by part; the usual suite is made of the passes of its round."""

    def total(*names: str) -> list[float]:
        return [sum(together) for together in zip(*(times[name] for name in names), strict=True)]

    usual = total("scores, per metric", "learnt, generate", "other, generate")
    compared = {
        "scores": ("scores, engine", {way: times[f"scores, {way}"] for way in ("once", "per metric", "official")}),
        "generation, rows known by heart": ("learnt, engine", {"generate": times["learnt, generate"]}),
        "generation, other rows": ("other, engine", {"generate": times["other, generate"]}),
        "suite, target model": ("target, engine", {"per metric": usual}),
        "suite, model that knows nothing": (
            "stranger, engine",
            {"per metric": total("scores, per metric", "stranger, generate")},
        ),
    }
    return {
        name: {
            "seconds": {"engine": summary(times[engine])} | {way: summary(values) for way, values in ways.items()},
            "times_faster_than": {
                way: summary([a / b for a, b in zip(values, times[engine], strict=True)])
                for way, values in ways.items()
            },
        }
        for name, (engine, ways) in compared.items()
    }


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, bench = environment(threads=1), Bench()
    lengths = [len(example.input_ids) for example in bench.examples]
    trees = grow_trees([predicting_ids(example) for example in bench.examples], bench.reading.trees)
    about |= {
        "rows": bench.source, "questions": len(bench.answers), "sequences": len(lengths), "vocabulary": VOCAB,
        "steps_to_learn": bench.steps, "mean_sequence_tokens": statistics.mean(lengths),
        "tokens": {"official": MAX_LENGTH * len(lengths), "sequences": sum(lengths), "trees": sum(map(len, trees))},
    }  # fmt: skip
    device = torch.device("cpu")
    ways = {"engine": bench.engine_scores, "once": bench.once}
    peaks = {name: peak_megabytes(run, device)[0] for name, run in ways.items()}  # the warm-up, too
    times, agreement = measure(bench, args.rounds)
    results = parts(times)
    for name, part in results.items():
        for way, found in part["times_faster_than"].items():
            print(f"{name:34} {found['median']:6.1f} times faster than {way}")
    if args.output:
        checks = {"seconds_of_the_checks_made_once_per_model": summary(times["checks"])}  # part of the suites' time
        about |= {"peak_megabytes_of_scores": peaks} | checks | agreement
        args.output.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
