"""`--eval-steps` and what hangs on it, by the command line: the level, refusals, resuming, what is written and said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku import cli
from loku.assessment_rows import AssessmentRows
from loku.config import UnlearnOptions, resolve
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.evaluation.tdec import evaluate_tdec
from loku.job import prepare
from loku.models import load_model, load_tokenizer
from loku.watch_plan import plan_watch
from loku.watching import measure_sets

FAST = (
    "--rank", 4, "--batch-size", 5, "--grad-accum", 1, "--learning-rate", "1e-2", "--warmup-steps", 0, "--threads", 1,
    "--max-steps", 8, "--method", "graddiff", "--init", "lora",
)  # fmt: skip


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def written(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture
def common(model_folder, forget_file, retain_file):
    return ("unlearn", "--model", model_folder, "--forget", forget_file, "--retain", retain_file, *FAST)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_curve_ends_in_the_results_and_changes_nothing(capsys, tmp_path, common, forget_file, tune):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    general = written(tmp_path / "general.jsonl", rows(4, start=40))
    more = ("--general", general, "--tune", tune, "--max-new-tokens", 4, "--save-steps", -1)
    more += ("--learning-rate", "1e-3") if tune == "full" else ()
    assert run(capsys, *common, *more, "--output", plain, "--no-evaluate")[0] == 0
    assert run(capsys, *common, *more, "--output", watched, "--eval-steps", 3)[0] == 0
    name = "adapter/adapter_model.safetensors" if tune == "lora" else "model/model.safetensors"
    one, two = load_file(plain / name), load_file(watched / name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    lines = curve(watched)
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    for file, line in (("results.target.json", lines[0]), ("results.json", lines[-1])):
        results = json.loads((watched / file).read_text())
        for name in ("forget", "retain", "general"):
            for metric, value in line[name].items():
                assert results["sets"][name]["metrics"][metric]["mean"] == pytest.approx(value, abs=1e-6)
    assert not (plain / "curve.jsonl").exists()
    assert record(watched)["stopped"] is record(watched)["best"] is record(watched)["level"] is None
    assert record(watched)["seconds"]["watching"] > 0


def test_the_level_is_the_retain_only_models_before_that_of_holdout_rows(capsys, tmp_path, common, forget_file):
    other = tmp_path / "other"
    tiny_model(seed=5).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    holdout = written(tmp_path / "holdout.jsonl", rows(6, start=60))
    watch = ("--eval-steps", 4, "--no-evaluate", "--holdout", holdout)
    status, out, _ = run(capsys, *common, *watch, "--retain-only-model", other, "--output", tmp_path / "one")
    assert status == 0
    level = record(tmp_path / "one")["level"]
    assert level["source"] == "the retain-only model on the forget rows"
    assert f"level: probability <= {level['figures']['probability']:.4g} and exact_memorisation <= " in out
    assert run(capsys, *common, *watch, "--output", tmp_path / "two")[0] == 0
    assert record(tmp_path / "two")["level"]["source"] == "the target on the holdout rows"
    # The same as results.json of these models on these rows.
    for model, file, found in ((other, forget_file, level), (common[2], holdout, record(tmp_path / "two")["level"])):
        folder = tmp_path / f"eval-{found['source'].split()[1]}"
        assert run(capsys, "evaluate", "--model", model, "--forget", file, "--output", folder)[0] == 0
        metrics = json.loads((folder / "results.json").read_text())["sets"]["forget"]["metrics"]
        for name, value in found["figures"].items():
            assert metrics[name]["mean"] == pytest.approx(value, abs=1e-6)
    # A results.json serves as well as the model that it is of, and needs no model.
    results = tmp_path / "eval-retain-only" / "results.json"
    shutil.rmtree(other)
    arguments = ("--retain-only-model", results, "--output", tmp_path / "three")
    assert run(capsys, *common, *watch, *arguments)[0] == 0
    found = record(tmp_path / "three")["level"]
    assert found["figures"] == pytest.approx(level["figures"], abs=1e-6)


def test_a_run_stops_at_the_level_and_once_stopped_does_not_go_on(capsys, tmp_path, common):
    assert run(capsys, *common, "--no-evaluate", "--eval-steps", 1, "--output", tmp_path / "whole")[0] == 0
    values = [line["forget"]["probability"] for line in curve(tmp_path / "whole")]
    aim = values[4]
    first = next(step for step, value in enumerate(values) if value <= aim)
    assert 0 < first < 8
    stop = ("--eval-steps", 1, "--stop-at", "level", "--level", f"probability={aim!r}", "--save-steps", 1)
    folder = tmp_path / "stopped"
    status, out, _ = run(capsys, *common, "--no-evaluate", *stop, "--output", folder)
    assert status == 0
    assert f"stopped at step {first}, at the forget level: probability <= " in out
    stopped = record(folder)["stopped"]
    assert (stopped["step"], stopped["level"]) == (first, {"probability": aim})
    assert "(given)" in stopped["rule"]
    assert [line["step"] for line in curve(folder)] == list(range(first + 1))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == first
    adapter = folder / "adapter" / "adapter_model.safetensors"
    before, lines = load_file(adapter), curve(folder)
    # Killed between the last step and the export: the checkpoint is that of the stop, and nothing is trained on.
    shutil.rmtree(folder / "adapter")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished"', '"running"'))
    assert run(capsys, *common, "--no-evaluate", *stop, "--output", folder)[0] == 0
    after = load_file(adapter)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert curve(folder) == lines
    assert record(folder)["stopped"]["step"] == first
    # Killed two steps earlier: they are made again, with the same figures.
    for step in (first, first - 1):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}", ignore_errors=True)
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished"', '"running"'))
    assert run(capsys, *common, "--no-evaluate", *stop, "--output", folder)[0] == 0
    assert [line["forget"] for line in curve(folder)] == [line["forget"] for line in lines]
    assert all(torch.equal(value, before[key]) for key, value in load_file(adapter).items())


def test_a_target_that_knows_nothing_is_left_as_it_is(capsys, tmp_path, common):
    more = ("--eval-steps", 4, "--stop-at", "level", "--level", "probability=1", "--no-evaluate")
    status, out, _ = run(capsys, *common, *more, "--output", tmp_path / "run")
    assert status == 0
    assert "stopped at step 0" in out
    assert "there was nothing to unlearn" in out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not any(value.any() for name, value in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_best_measurement_is_what_is_handed_over(capsys, tmp_path, common, forget_file, retain_file, tune):
    more = ("--eval-steps", 1, "--tune", tune, "--no-evaluate", "--learning-rate", "3e-3")
    assert run(capsys, *common, *more, "--output", tmp_path / "whole")[0] == 0
    values = [line["forget"]["probability"] for line in curve(tmp_path / "whole")]
    keep = (*more, "--keep", "best", "--keep-utility", 0, "--level", f"probability={values[3]!r}")
    status, out, _ = run(capsys, *common, *keep, "--output", tmp_path / "best")
    assert status == 0
    best = record(tmp_path / "best")["best"]
    assert (best["step"], best["meets_rule"], best["distance"]) == (3, True, pytest.approx(0, abs=1e-9))
    assert "kept step 3: forget probability" in out
    if tune == "full":
        model = load_model(str(tmp_path / "best" / "model"))
        tokenizer = load_tokenizer(str(tmp_path / "best" / "model"))
        encoder = Encoder(tokenizer, TagTemplate())
        sets = {"forget": [encoder.encode(row) for row in load_records(forget_file)]}
        found, _ = measure_sets(model, tokenizer, sets)
        assert found["forget"]["probability"] == pytest.approx(values[3], rel=1e-5)
    else:
        whole = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
        kept = load_file(tmp_path / "best" / "adapter" / "adapter_model.safetensors")
        saved = load_file(tmp_path / "best" / "best" / "step-3.safetensors")
        assert any(not torch.equal(whole[key], kept[key]) for key in whole)
        assert all(torch.equal(saved[key.replace(".weight", ".default.weight")], kept[key]) for key in kept)


def test_when_nothing_keeps_utility_the_last_step_is_kept_and_said(capsys, tmp_path, common):
    more = ("--eval-steps", 4, "--no-evaluate", "--keep", "best", "--level", "probability=0", "--keep-utility", 1)
    more += ("--retain-weight", 0, "--method", "ga", "--learning-rate", "3e-2")
    status, out, _ = run(capsys, *common, *more, "--output", tmp_path / "run")
    assert status == 0
    assert "No measurement kept 100% of the target's utility: the last step is kept." in out
    best = record(tmp_path / "run")["best"]
    assert (best["step"], best["meets_rule"]) == (8, False)
    assert not (tmp_path / "run" / "best").exists()


TEXTS = [
    {"text": f"The quick brown fox {i} jumps over the lazy dog, {i * 7} times; then rests on {chr(65 + i)}."}
    for i in range(6)
]


def test_texts_stop_by_the_tdec_rule(capsys, tmp_path, model_folder):
    forget = written(tmp_path / "forget.jsonl", TEXTS[:3])
    holdout = written(tmp_path / "holdout.jsonl", [{"text": "They did not, or so he says: perhaps she wrote it."}] * 2)
    retain = written(tmp_path / "retain.jsonl", TEXTS[3:])
    # A model that has memorised the forget rows, so that there is something to forget.
    target = tmp_path / "target"
    tuned = ("--data", forget, "--epochs", 60, "--batch-size", 3, "--grad-accum", 1, "--learning-rate", "1e-2")
    arguments = ("finetune", "--model", model_folder, *tuned, "--warmup-steps", 0, "--save-steps", -1, "--threads", 1)
    assert run(capsys, *arguments, "--output", target)[0] == 0
    common = ("unlearn", "--model", target, "--forget", forget, "--retain", retain, *FAST, "--max-steps", 40)
    status, out, _ = run(
        capsys, *common, "--holdout", holdout, "--eval-steps", 2, "--stop-at", "level", "--no-evaluate",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert status == 0
    found = record(tmp_path / "run")
    assert found["level"]["rule"] == ["ma", "el_10"]
    assert "level: ma < " in out
    lines = curve(tmp_path / "run")
    assert lines[0]["forget"]["ma"] > 0.9
    level = found["level"]["figures"]
    assert all(("el_10" in line["forget"]) == (line["forget"]["ma"] < level["ma"]) for line in lines[:-1])
    assert found["stopped"]["step"] == lines[-1]["step"] < 40
    # The suite says the same of the model that was stopped at the level.
    data, unseen = load_records(forget), load_records(holdout)
    tokenizer = load_tokenizer(str(target))
    before = evaluate_tdec(load_model(str(target)), tokenizer, data=data, holdout=unseen, max_length=500)
    assert before.summary["level_ma"] == pytest.approx(level["ma"])
    assert before.summary["level_el_10"] == pytest.approx(level["el_10"])
    model = PeftModel.from_pretrained(load_model(str(target)), tmp_path / "run" / "adapter")
    after = evaluate_tdec(model, tokenizer, data=data, holdout=unseen, max_length=500, target=before)
    assert after.summary["forgotten"] == 1
    assert after.mean("forget", "ma") == pytest.approx(lines[-1]["forget"]["ma"], abs=1e-6)
    assert after.mean("forget", "el_10") == pytest.approx(lines[-1]["forget"]["el_10"], abs=1e-6)
    # Results of the target that have these rows spare the measurement; others do not.
    given = {"model": str(target), "forget": str(forget), "retain": str(retain), "eval_steps": 2, "stop_at": "level"}
    options = resolve(UnlearnOptions, given, {}, where="")
    job = prepare(load_model(str(target)), tokenizer, data, load_records(retain), options)
    plan = plan_watch(job, options, AssessmentRows(holdout=unseen, target=before))
    assert plan.holdout is None
    assert plan.level.rule == ("ma", "el_10")
    assert plan.level.source == found["level"]["source"]
    assert plan.level.figures == pytest.approx(level)
    one = evaluate_tdec(load_model(str(target)), tokenizer, data=data, holdout=unseen, max_rows=1, max_length=500)
    plan = plan_watch(job, options, AssessmentRows(holdout=unseen, target=one))
    assert plan.level is None
    assert len(plan.holdout) == 2


def test_what_cannot_be_measured_is_refused_before_any_work(capsys, tmp_path, common, model_folder, forget_file):
    output = tmp_path / "run"

    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, *common, "--output", output, "--no-evaluate", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert not output.exists()

    watch = ("--eval-steps", 2)
    refused("--stop-at level needs measurements while training.", "Add --eval-steps", "--stop-at", "level")
    refused("--keep best needs measurements while training.", "Add --eval-steps", "--keep", "best")
    refused("--level needs measurements while training.", "Add --eval-steps", "--level", "probability=0.1")
    refused("--stop-at 'levl' is not known.", "Did you mean 'level'", *watch, "--stop-at", "levl")
    for goal in (("--stop-at", "level"), ("--keep", "best")):
        refused(f"{' '.join(goal)} has no level of unseen text", "Give --retain-only-model", *watch, *goal)
    refused("--level names 'probabilty', which is not", "Did you mean 'probability'", *watch, "--level", "probabilty=1")
    refused("--level names 'ma', which is not", "", *watch, "--level", "ma=0.3")
    refused("--level probability=2 is no level.", "from 0 to 1", *watch, "--level", "probability=2")
    texts = written(tmp_path / "texts.jsonl", TEXTS)
    refused("are not of the same kind", "Give holdout rows like the forget rows", *watch, "--holdout", texts)
    dear = ("--forget", texts, "--keep", "best", "--level", "el_10=0.1")
    refused("a level of el_10 alone, which is measured for --stop-at level only.", "Add another figure", *watch, *dear)
    long = written(tmp_path / "long.jsonl", [{"question": "Where was she born? " * 90, "answer": "In Ulm."}])
    refused("--holdout row 0 has no answer token left", "Raise --max-length", *watch, "--holdout", long)
    short = written(tmp_path / "short.jsonl", [{"text": "So ?"}])
    stop = (*watch, "--stop-at", "level", "--holdout", short)
    refused("--holdout holds no text of more than 10 tokens", "Give longer texts", "--forget", texts, *stop)
    alone = ("--keep", "best", "--level", "probability=0.1", "--retain-weight", 0)
    status, _, err = run(
        capsys, "unlearn", "--model", model_folder, "--forget", forget_file, *FAST, *watch, *alone, "--output", output
    )
    assert status == 2
    assert "--keep best has no rows to see utility on." in err
    assert not output.exists()
