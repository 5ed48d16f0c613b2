"""lm-eval's tasks on our engine: its prompts, choices and metrics, our batches, cache and processes.

Needs the package lm_eval; imported by `loku.evaluation.utility` when a task asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.errors import InputError, suggestion
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS, generate
from loku.evaluation.metrics import Interval
from loku.evaluation.results import SetResults
from loku.evaluation.scoring import BATCH_TOKENS, score
from loku.evaluation.task_figures import figure_of, is_number, pooled_error
from loku.models import context_length

MAX_LENGTH = 2048  # tokens, where a model does not say what it reads; lm-eval's own
NEW_TOKENS = 256  # where a task sets no limit; lm-eval's own
FEWSHOT_SEED = 1234  # lm-eval's own

# The tasks that read local rows; prompts and metrics are those of lm-eval's tasks lambada_openai, pubmedqa, wikitext.
LOCAL: dict[str, dict[str, Any]] = {
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "pubmedqa": {
        "output_type": "multiple_choice",
        "doc_to_text": "Abstract: {{context}}\nQuestion: {{question}}\nAnswer:",
        "doc_to_target": "final_decision",
        "doc_to_choice": ["yes", "no", "maybe"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
}


class EngineLM(TemplateLM):
    """A loaded model for lm-eval: log-likelihoods and greedy answers come from `score` and `generate`.

    What lm-eval's own wrapper gives, but for rounding: texts are tokenised whole and cut from the left to what the
    model reads. Neither model nor tokenizer is changed. With several processes every one of them runs the tasks and
    gets all results, and they share the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_tokens: int = BATCH_TOKENS,
        batch_rows: int = BATCH_ROWS,
        cache: BatchCache | None = None,
        progress: Callable[[int, str], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.batch_rows, self.cache, self.progress = batch_tokens, batch_rows, cache, progress
        self.max_length = context_length(model) or MAX_LENGTH

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id before a text that has nothing before it: the beginning of sequence, else its end."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's ids; special tokens as the tokenizer likes, but not twice."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log p of each continuation after its context, and whether greedy decoding gives it."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return log p of each text, in windows as long as the model reads, each token predicted once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in map(make_disjoint_window, parts):
                windows.append((("", ""), *part))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        examples, places = [], []
        for place, (_text, context, continuation) in enumerate(requests):
            ids = [*context, *continuation][-(self.max_length + 1) :]  # the last id is predicted, never read
            start = max(1, len(ids) - len(continuation))
            if len(ids) > start:
                examples.append(Example(place, ids, [IGNORE] * start + ids[start:], start, start))
                places.append(place)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id
        scores = score(
            self.model,
            examples,
            pad_id=pad_id,
            batch_tokens=self.batch_tokens,
            progress=self._told("scoring"),
            cache=self.cache,
        )
        found = [(0.0, True)] * len(requests)  # of an empty continuation
        for place, one in zip(places, scores, strict=True):
            found[place] = -one.nll, bool(one.hits.all())
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return greedy answers, cut at the task's stop texts. Raises InputError for a task that samples."""
        prompts, limits, stops = [], [], []
        eos = self.tokenizer.decode([self.eot_token_id])
        for request in requests:
            context, wanted = request.args
            wanted = normalize_gen_kwargs(wanted, NEW_TOKENS)
            if wanted.get("do_sample") or wanted.get("num_beams", 1) > 1:
                raise InputError(
                    f"--utility '{request.task_name}' samples its answers, or searches with beams.",
                    "Name tasks with greedy answers, or run that one with lm-eval itself.",
                )
            limit = min(wanted["max_gen_toks"], self.max_length - 1)
            limits.append(limit)
            prompts.append(self.tok_encode(context)[-(self.max_length - limit) :] or [self.prefix_token_id])
            stops.append(handle_stop_sequences(wanted.get("until"), eos=eos))
        answers = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=limits,
            batch_rows=self.batch_rows,
            progress=self._told("generating"),
            cache=self.cache,
        )
        texts = [self.tokenizer.decode(list(answer.ids), skip_special_tokens=True) for answer in answers]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _told(self, note: str) -> Callable[[int], None] | None:
        progress = self.progress
        return None if progress is None else lambda count: progress(count, note)


def task_specs(names: Sequence[str], local: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> Any:
    """Return lm-eval's tasks, groups and tags of these names, from the hub, and local ones: name to (kind, rows).

    Raises InputError for unknown names and for data that cannot be loaded.
    """
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"--utility '{name}' is no task of lm-eval.", suggestion(name, manager.all_tasks))
    specs: list[Any] = []
    for name in names:
        try:
            specs.append(manager.load([name]))
        except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
            raise InputError(
                f"--utility '{name}' cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}",
                "Check the connection, or give local rows: lambada=, pubmedqa= or perplexity=FILE.",
            ) from error
    for name, (kind, rows) in local.items():
        split = datasets.Dataset.from_list([dict(row) for row in rows])
        config = LOCAL[kind] | {
            "task": name,
            "test_split": "test",
            "custom_dataset": lambda split=split, **_: datasets.DatasetDict(test=split),
        }
        specs.append(manager.load([config]))
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for found in specs:
        for part, known in loaded.items():
            known.update(found[part])
    return loaded


def run_tasks(
    model: EngineLM, loaded: Any, *, limit: int | None = None, seed: int = 42
) -> tuple[dict[str, SetResults], dict[str, float], dict[str, Any]]:
    """Run loaded tasks; return their rows with metrics as sets, figures for the summary, and versions and shots.

    A figure `<task>_<metric>` comes with `<task>_<metric>_stderr` wherever the rows tell: for a mean s / √n (s the
    sample deviation over rows, as lm-eval), for a perplexity the delta method. One row has none.
    """
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        found = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except (AssertionError, KeyError) as error:
        raise InputError(
            f"--utility could not be measured: lm-eval stopped with {error!r}.", "Leave that task out."
        ) from error
    sets: dict[str, SetResults] = {}
    summary: dict[str, float] = {}
    for name, samples in found["samples"].items():
        rows, metrics, more = _task(name, found["results"][name], samples, seed)
        sets[name] = SetResults(len(rows), metrics, rows)
        summary |= more
    for name, figures in found.get("groups", {}).items():
        members = [member for member in found["group_subtasks"].get(name, ()) if member in sets]
        summary |= _group(name, figures, {member: sets[member].rows for member in members}, summary)
    told = {name: {"version": found["versions"].get(name), "shots": found["n-shot"].get(name, 0)} for name in sets}
    return sets, summary, told


def _task(
    name: str, figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], seed: int
) -> tuple[list[dict[str, float]], dict[str, Interval], dict[str, float]]:
    """Return a task's rows, metrics with intervals, and figures with standard errors."""
    rows: dict[int, dict[str, float]] = {}
    metrics, summary = {}, {}
    for key, value in figures.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not is_number(value):
            continue
        label = _metric(key)
        summary[f"{name}_{label}"] = float(value)
        pairs = [(row["doc_id"], row[metric]) for row in samples if row["filter"] == chosen and metric in row]
        found = figure_of(float(value), [item for _, item in pairs], seed)
        for place, (index, _) in enumerate(pairs):
            row = rows.setdefault(int(index), {"index": int(index)})
            if found is not None:
                row[label] = found.rows[place]
        if found is not None:
            metrics[label] = found.interval
            if found.error is not None:
                summary[f"{name}_{label}_stderr"] = found.error
    return [rows[index] for index in sorted(rows)], metrics, summary


def _group(
    name: str, figures: Mapping[str, Any], rows: Mapping[str, int], known: Mapping[str, float]
) -> dict[str, float]:
    """Return a group's figures, with their standard errors where they are means over all rows of its tasks."""
    found = {}
    for key, value in figures.items():
        if "," not in key or key.split(",")[0].endswith("_stderr") or not is_number(value):
            continue
        label = _metric(key)
        found[f"{name}_{label}"] = float(value)
        values = [known[f"{member}_{label}"] for member in rows if f"{member}_{label}" in known]
        errors = [known[f"{m}_{label}_stderr"] for m in rows if f"{m}_{label}_stderr" in known]
        if len(values) == len(errors) == len(rows):
            error = pooled_error(float(value), values, errors, list(rows.values()))
            found |= {} if error is None else {f"{name}_{label}_stderr": error}
    return found


def _metric(key: str) -> str:
    """Return "acc" for "acc,none", and "exact_match_strict_match" for "exact_match,strict-match"."""
    metric, _, chosen = key.partition(",")
    return metric if chosen == "none" else f"{metric}_{chosen.replace('-', '_')}"
