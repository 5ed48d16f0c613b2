"""The LUME suite: probes, twelve values, aggregate, membership score, final score."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

from builders import byte_level_tokenizer, serve, tiny_model
from loku.data.sources import Rows, load_rows
from loku.errors import InputError
from loku.evaluation.lume import (
    COLUMNS,
    evaluate_lume,
    final_scores,
    kind_of,
    knowledge,
    lume_source,
    membership_source,
    mia_score,
    task_aggregate,
    task_values,
)
from loku.evaluation.metrics import rougeL_recall
from loku.evaluation.probing import continue_texts
from loku.evaluation.results import SetResults

TOKENIZER = byte_level_tokenizer()


def rows(*tasks):
    made = []
    for task in tasks:
        made.append({"id": f'"{task}"sc0', "input": "The quick brown", "output": "fox jumps", "task": task})
        made.append({"id": f"{task}qa1", "input": "Who wrote it?", "output": "She", "task": task})
    return Rows("made here", tuple(made), "ab" * 32)


ALL = rows("Task1", "Task2", "Task3")
DOCUMENTS = [
    Rows(name, tuple({"document": f"{name} {n} wrote it"} for n in range(3)), name) for name in ("She", "They")
]


def evaluate(**options):
    settings = {"forget": ALL, "retain": ALL, "max_new_tokens": 4} | options
    return evaluate_lume(tiny_model(), TOKENIZER, **settings)


def test_probes_are_told_by_the_end_of_their_id():
    assert kind_of('"8f24c511-a319"sc1') == "sc"
    assert kind_of("12762334qa0") == "qa"
    assert kind_of("61523514qa12") == "qa"
    with pytest.raises(InputError, match=r"ends in neither sc<k> nor qa<k>\."):
        kind_of("61523514")


def test_knowledge_is_exact_match_after_stripping_and_lower_casing():
    assert knowledge(" baku\n", "Baku ") == 1.0
    assert knowledge("Baku.", "Baku") == 0.0
    assert knowledge("", "Baku") == 0.0


def test_twelve_values_and_their_harmonic_mean():
    def made(start):
        per_example = [
            {"index": 2 * task + place, "task": task, kind: (start + task + place) / 10}
            for task in (1, 2, 3)
            for place, kind in enumerate(("regurgitation", "knowledge"))
        ]
        return SetResults(6, {}, per_example)

    values = task_values({"forget": made(0), "retain": made(3)})
    assert values["forget_task2_knowledge"] == 0.3
    assert values["retain_task3_regurgitation"] == 0.6
    expected = [1 - (task + place) / 10 for task in (1, 2, 3) for place in (0, 1)]
    expected += [(3 + task + place) / 10 for task in (1, 2, 3) for place in (0, 1)]
    assert task_aggregate(values) == pytest.approx(statistics.harmonic_mean(expected))
    assert task_aggregate({**values, "forget_task1_knowledge": 1.0}) == 0.0  # wholly kept
    assert task_aggregate({"forget_task1_knowledge": 0.2}) is None


def test_membership_and_final_scores():
    assert [mia_score(auc) for auc in (0.5, 1.0, 0.0, 0.75)] == [1.0, 0.0, 0.0, 0.5]
    assert final_scores(0.8, 0.6, 0.4) == {"final_score_without_mmlu": 0.7, "final_score": pytest.approx(0.6)}
    assert final_scores(0.8, 0.6, None) == {"final_score_without_mmlu": 0.7}
    assert final_scores(None, 0.6, 0.4) == final_scores(0.8, None, 0.4) == {}
    # The published parts of the first place: 0.827, 0.847, 0.443.
    assert final_scores(0.827, 0.847, 0.443)["final_score"] == pytest.approx(0.706, abs=5e-4)
    assert final_scores(0.0, 0.0, 0.269)["final_score"] > 0  # a task aggregate of 0 leaves the others


def test_a_model_by_hand():
    seen = []
    found = evaluate(
        members=DOCUMENTS[0], nonmembers=DOCUMENTS[1], mmlu=0.3, keep_text=True,
        progress=lambda *step: seen.append(step[:2]),
    )  # fmt: skip
    said = continue_texts(tiny_model(), TOKENIZER, [row["input"] for row in ALL.rows], max_new_tokens=4)
    assert found.summary["retain_task1_regurgitation"] == pytest.approx(rougeL_recall(said[0], "fox jumps"))
    assert found.summary["retain_task1_knowledge"] == knowledge(said[1], "She")
    losses = [[row["nll"] for row in found.sets[name].per_example] for name in ("members", "nonmembers")]
    auc = sum((m < o) + 0.5 * (m == o) for m in losses[0] for o in losses[1]) / 9
    assert found.summary["mia_auc"] == pytest.approx(auc)
    assert found.summary["mia_score"] == pytest.approx(1 - 2 * abs(auc - 0.5))
    assert found.summary["mmlu"] == 0.3
    assert "lies below 0.371" in found.warnings[0]
    assert len(found.texts) == 12
    assert seen[-1] == (12, 12)


def test_a_task_without_rows_leaves_no_aggregate():
    found = evaluate(forget=rows("Task1"))
    assert "task_aggregate" not in found.summary
    assert "no row gives forget_task2_regurgitation" in found.warnings[0]
    one = evaluate(max_rows=1)
    assert one.sets["forget"].rows == 1


def test_what_cannot_be_used_is_refused():
    with pytest.raises(InputError, match=r"Only one of --members and --nonmembers was given\.\nGive both"):
        evaluate(members=DOCUMENTS[0])
    with pytest.raises(InputError, match=r"--forget has the task 'Task9'\.\nTasks are Task1"):
        evaluate(forget=rows("Task9"))


def test_rows_are_local_where_there_is_a_folder_and_else_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    asked = serve(monkeypatch, lambda config, split: [dict(ALL.rows[0]) | {"split": split}])
    for name in ("forget", "retain"):
        found = load_rows(lume_source(name, tmp_path), COLUMNS)
        assert found.rows[0]["split"] == f"{name}_train+{name}_validation"
        assert found.rows[0]["id"] == ALL.rows[0]["id"]
    assert {dataset for dataset, *_ in asked} == {
        "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
    }
    (tmp_path / "lume").mkdir()
    with pytest.raises(InputError, match=r"--retain is missing\.\nGive a file of LUME's rows"):
        lume_source("retain", tmp_path)
    (tmp_path / "lume" / "retain.jsonl").touch()
    assert lume_source("retain", tmp_path) == str(tmp_path / "lume" / "retain.jsonl")


DATA = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "lume").is_dir(), reason="needs LUME: set LOKU_DATA_DIR to the folder with lume")
@pytest.mark.parametrize(
    ("folder", "names", "counts"),
    [
        ("lume", ("forget", "retain"), (2732, 2734)),
        ("semeval2025_task4", ("forget_validation", "retain_validation"), (254, 278)),
    ],
)
def test_the_real_files(folder, names, counts):
    data = [load_rows(DATA / folder / f"{name}.jsonl", COLUMNS) for name in names]
    assert tuple(map(len, data)) == counts
    probes = {(row["task"], kind_of(row["id"])) for found in data for row in found.rows}
    assert len(probes) == 6
    few = [Rows(found.name, found.rows[-6:], found.sha256) for found in data]
    model = tiny_model(max_position_embeddings=2048)
    found = evaluate_lume(model, TOKENIZER, forget=few[0], retain=few[1], max_new_tokens=2)
    assert found.sets["forget"].rows == 6


def test_membership_files_beside_the_rows_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    assert membership_source("members") is None
    assert membership_source("members", tmp_path) is None
    (tmp_path / "lume").mkdir()
    (tmp_path / "lume" / "members.jsonl").touch()
    assert membership_source("members", tmp_path) == str(tmp_path / "lume" / "members.jsonl")


def test_mmlu_without_membership_gives_no_final_score_and_says_why():
    assert any("There is no final score" in note for note in evaluate(mmlu=0.5).warnings)
