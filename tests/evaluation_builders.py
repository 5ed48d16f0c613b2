"""Hand-made results, and official logs with made-up numbers, for the tests of evaluation."""

from __future__ import annotations

import copy

from loku.evaluation.logs import LOG_KEYS
from loku.evaluation.metrics import Interval
from loku.evaluation.results import Results, SetResults


def small_log(rows=4, tag="Question: {}\n", topic="a"):
    """A log in the official shape."""

    def column(make):
        return {str(row): make(row) for row in range(rows)}

    part = {
        "avg_gt_loss": column(lambda row: 0.1 + row / 10),
        "avg_paraphrased_loss": column(lambda row: 0.5 + row / 10),
        "average_perturb_loss": column(lambda row: [1.0, 2.0 + row / 10]),
        "rougeL_recall": column(lambda row: 0.5 + row / 40),
        "generated_text": column(lambda row: [tag.format(f"Who is {topic}{row}?"), "so", f"{topic}{row} is a poet"]),
    }
    return {key: copy.deepcopy(part) for key in LOG_KEYS.values()}


def near(mean):
    """A mean with a narrow interval around it."""
    return Interval(mean, max(0.0, mean - 0.02), mean + 0.02)


def made_results(name="unlearned", *, utility=0.7, p=None, rows=40, ratios=(), **forget):
    """Results of a forget set with the given means, and a summary."""
    per_example = [{"index": place, "truth_ratio": ratio} for place, ratio in enumerate(ratios)]
    summary = {} if utility is None else {"model_utility": utility}
    if p is not None:
        summary |= {"forget_quality": p, "ks_statistic": 0.2, "forget_quality_rows": rows}
    return Results(
        suite="own",
        model={"name": name, "sha256": None, "dtype": "float32", "parameters": 1},
        data={"forget": {"name": "f.jsonl", "sha256": "ab" * 32, "rows": rows}},
        settings={"seed": 42},
        sets={"forget": SetResults(rows, {metric: near(mean) for metric, mean in forget.items()}, per_example)},
        summary=summary,
    )
