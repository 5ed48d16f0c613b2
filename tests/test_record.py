"""The unlearning record: everything it should say, nothing it must not, and a form that a schema fixes."""

from __future__ import annotations

import hashlib
import hmac
import json
import shlex
import shutil
import stat

import jsonschema
import pytest

from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku import cli
from loku.data.sources import load_records
from loku.errors import InputError
from loku.record import attacks_of, check_form, digest_of, read_record, refresh_record, schema, write_record

FORGET = 24  # more rows than the fewest whose hash is not keyed


def write_rows(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def call(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """A short run with a retain-only model; it lies in <somewhere>/secret-place/run."""
    folder = tmp_path_factory.mktemp("records") / "secret-place"
    folder.mkdir()
    forget = write_rows(folder / "forget.jsonl", [perturbed(row) for row in rows(FORGET)])
    retain = write_rows(folder / "retain.jsonl", [perturbed(row) for row in rows(8, start=40)])
    tiny_model("llama", seed=1).save_pretrained(folder / "retain-only")
    byte_level_tokenizer().save_pretrained(folder / "retain-only")
    status = cli.main([str(part) for part in (
        "unlearn", "--model", model_folder, "--forget", forget, "--retain", retain, "--output", folder / "run",
        "--retain-only-model", folder / "retain-only", "--rank", 4, "--max-steps", 3, "--batch-size", 4,
        "--grad-accum", 1, "--warmup-steps", 1, "--learning-rate", "1e-2", "--threads", 1, "--max-new-tokens", 4,
        "--eval-rows", 24, "--init", "lora",
    )])  # fmt: skip
    assert status == 0
    return folder / "run"


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def strings(value):
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (str(key), *strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_a_finished_run_has_a_record_of_the_schemas_form(finished):
    record = json.loads((finished / "record.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(record, schema(), cls=jsonschema.Draft202012Validator)
    assert record["claim"]["statement"] == "This record is empirical evidence, not a guarantee of deletion."
    assert set(record["figures"]) == {"target", "unlearned", "retain_only"}
    for role, name in (("unlearned", "results.json"), ("retain_only", "results.retain_only.json")):
        results = json.loads((finished / name).read_text())
        told = record["figures"][role]["sets"]["forget"]["metrics"]["probability"]
        assert told == results["sets"]["forget"]["metrics"]["probability"]
        assert set(told) == {"mean", "low", "high"}
    adapter = finished / "adapter" / "adapter_model.safetensors"
    assert record["result"]["sha256"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert record["files"]["results.json"] == hashlib.sha256((finished / "results.json").read_bytes()).hexdigest()
    assert record["attacks"]["run"] is False
    assert record["versions"]["loku"]
    assert record["hardware"]["cpu"]


def test_a_record_holds_no_text_of_a_row_and_no_place(finished):
    text = (finished / "record.json").read_text()
    record = json.loads(text)
    for row in load_records(finished.parent / "forget.jsonl"):
        assert row.question not in text
        assert row.answer not in text
        assert hashlib.sha256(row.answer.encode()).hexdigest() not in text
    assert not [found for found in strings(record) if "secret-place" in found or str(finished.parent) in found]
    assert (finished / "record.salt").read_text().strip() not in text


def test_row_hashes_are_keyed_by_the_salt_as_the_scheme_says(finished):
    record = json.loads((finished / "record.json").read_text())
    salt = bytes.fromhex((finished / "record.salt").read_text())
    assert len(salt) == 32
    assert stat.S_IMODE((finished / "record.salt").stat().st_mode) == 0o600
    row = perturbed(rows(1)[0])
    fields = {"perturbed_answers" if name == "perturbed_answer" else name: value for name, value in row.items()}
    line = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    told = record["data"]["trained"]["forget"]["row_hashes"]
    assert len(told) == len(set(told)) == FORGET
    assert told[0] == hmac.new(salt, line.encode(), hashlib.sha256).hexdigest()
    assert told[0] != hashlib.sha256(line.encode()).hexdigest()
    assert record["salt"]["sha256"] == hashlib.sha256(salt.hex().encode()).hexdigest()


def test_the_hash_of_a_set_is_keyed_only_where_it_could_be_guessed(finished):
    data = json.loads((finished / "record.json").read_text())["data"]
    salt = bytes.fromhex((finished / "record.salt").read_text())
    plain = {name: load_records(finished.parent / f"{name}.jsonl").sha256 for name in ("forget", "retain")}
    assert (data["trained"]["forget"]["keyed"], data["trained"]["forget"]["sha256"]) == (False, plain["forget"])
    file = hashlib.sha256((finished.parent / "forget.jsonl").read_bytes()).hexdigest()
    assert data["trained"]["forget"]["file_sha256"] == file
    keyed = hmac.new(salt, plain["retain"].encode(), hashlib.sha256).hexdigest()
    assert (data["trained"]["retain"]["keyed"], data["trained"]["retain"]["sha256"]) == (True, keyed)
    assert "row_hashes" not in data["trained"]["retain"]


def test_two_records_of_the_same_rows_have_other_salts_and_other_hashes(run_folder, finished):
    forget = load_records(finished.parent / "forget.jsonl")
    first = read_record(run_folder / "record.json")["data"]["trained"]["forget"]["row_hashes"]
    write_record(run_folder, forget)  # the salt is there: the hashes stay what they were
    assert read_record(run_folder / "record.json")["data"]["trained"]["forget"]["row_hashes"] == first
    (run_folder / "record.salt").unlink()
    write_record(run_folder, forget)
    assert not set(read_record(run_folder / "record.json")["data"]["trained"]["forget"]["row_hashes"]) & set(first)


def test_texts_enter_a_record_only_when_asked_for(capsys, run_folder):
    status, out, _ = call(capsys, "record", run_folder, "--keep-text")
    assert status == 0
    assert "record written to" in out
    record = read_record(run_folder / "record.json")
    check_form(record)
    assert record["data"]["trained"]["forget"]["text"][0]["answer"] == rows(1)[0]["answer"]
    assert call(capsys, "record", run_folder)[0] == 0
    assert rows(1)[0]["answer"] not in (run_folder / "record.json").read_text()


def test_the_command_repeats_the_run_to_the_bit(capsys, finished, tmp_path, monkeypatch, model_folder):
    """The names in the command are the last parts of the paths: whoever repeats it has them at hand."""
    record = read_record(finished / "record.json")
    parts = shlex.split(record["reproduce"]["command"])
    assert parts[:2] == ["loku", "unlearn"]
    for name in ("forget.jsonl", "retain.jsonl", "retain-only"):
        (tmp_path / name).symlink_to(finished.parent / name)
    (tmp_path / model_folder.name).symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    assert call(capsys, *parts[1:])[0] == 0
    again = read_record(tmp_path / "again" / "record.json")
    assert again["result"] == record["result"]
    assert again["figures"]["unlearned"]["sets"] == record["figures"]["unlearned"]["sets"]


def test_a_run_on_a_model_in_memory_is_repeated_from_python(tmp_path):
    from loku import unlearn

    settings = {"rank": 2, "max_steps": 1, "init": "lora", "evaluate": False, "threads": 1}
    result = unlearn(tiny_model(), byte_level_tokenizer(), rows(3), rows(3, start=9), tmp_path / "run", **settings)
    record = read_record(result.folder / "record.json")
    check_form(record)
    assert record["reproduce"]["command"].startswith("loku.unlearn(model, tokenizer, forget, retain, output, ")
    assert "rank=2" in record["reproduce"]["command"]
    assert record["figures"] == {}
    assert record["verdict"] is None
    assert record["data"]["trained"]["forget"]["keyed"] is True


def scored(value, low, high):
    return {"score": value, "low": low, "high": high, "raw": value, "gap": 0.9, "reason": None}


ATTACKS = {
    "schema_version": 1,
    "kind": "attacks",
    "attacks": {"gone": {"family": "quantise", "settings": {"prompt": "the text of a row"}, "roles": {}}},
    "missing": {"holdout": "no holdout set"},
    "failed": {"lens": "/home/mira broke"},
    "summary": {
        "headline": {"level": "hidden", "sentence": "What was unlearned comes back.", "worst": "back"},
        "attacks": {
            "gone": {
                "family": "quantise",
                "score": scored(0.02, 0.0, 0.1),
                "figures": {"target": {"a": 1.0, "b": "Ulm"}},
            },
            "back": {"family": "relearn", "score": scored(0.6, 0.11, 0.9), "beside": {"unlearned": {"retain": 0.5}}},
            "open": {
                "family": "prompts",
                "score": scored(0.2, 0.1, 0.3),
                "damaged": "it keeps 10 %",
                "metric": "found",
                "figures": {"target": {"found": {"mean": 1, "low": 1, "high": 1}, "exact_match": {"mean": 0}}},
            },
            "dropped": {"family": "adapter", "score": scored(1.0, 1.0, 1.0)},
            "blind": {"family": "probe", "score": scored(None, None, None)},
            "member": {
                "family": "membership",
                "membership": {"loss": {"auc": [0.9, 0.5, 0.5], "score": scored(0, 0, 0)}},
            },
        },
    },
}
PLAIN = {"attacks": {"a": {"robustness": {"value": 0.6, "low": 0.3, "high": 0.9}}, "b": {"robustness": 0.7}, "c": {}}}


def test_attacks_are_survived_by_their_whole_interval_or_not_at_all(tmp_path):
    (tmp_path / "attacks.json").write_text(json.dumps(ATTACKS))
    found = attacks_of(tmp_path / "attacks.json")
    outcomes = {name: entry["outcome"] for name, entry in found["attacks"].items()}
    assert outcomes == {
        "gone": "survived", "back": "not survived", "open": "undecided", "dropped": "not survived",
        "blind": "undecided", "member: loss": "survived",
    }  # fmt: skip
    assert found["worst"] == "back"  # what an adapter's removal brings back says nothing of the merged model
    assert found["headline"] == {"level": "hidden", "sentence": "What was unlearned comes back."}
    assert found["not_run"] == ["holdout", "lens"]
    assert found["attacks"]["open"]["figures"] == {"target": {"found": {"mean": 1.0, "low": 1.0, "high": 1.0}}}
    assert found["attacks"]["gone"]["figures"] == {"target": {"a": 1.0}}
    assert found["attacks"]["back"]["beside"] == {"unlearned": {"retain": 0.5}}
    assert [name for name, entry in found["attacks"].items() if entry["damaged"]] == ["open"]
    assert found["attacks"]["member: loss"]["figures"] == {"auc": [0.9, 0.5, 0.5]}
    for text in ("the text of a row", "/home/mira", "Ulm"):
        assert text not in json.dumps(found)


def test_attacks_without_a_summary_are_read_by_what_they_hold(tmp_path):
    (tmp_path / "attacks.json").write_text(json.dumps(PLAIN))
    found = attacks_of(tmp_path / "attacks.json")
    assert {name: entry["outcome"] for name, entry in found["attacks"].items()} == {
        "a": "not survived", "b": "undecided", "c": "undecided",
    }  # fmt: skip
    assert (found["worst"], found["headline"]) == ("b", None)


def test_attacks_added_later_refresh_the_record_and_nothing_else(run_folder):
    before = read_record(run_folder / "record.json")
    (run_folder / "attacks.json").write_text(json.dumps(ATTACKS))
    (run_folder / "results.json").write_text("{}")  # changed behind the record's back: its hash must not follow
    assert refresh_record(run_folder) == run_folder / "record.json"
    after = read_record(run_folder / "record.json")
    assert after["attacks"]["headline"]["level"] == "hidden"
    assert after["files"]["results.json"] == before["files"]["results.json"]
    assert after["files"]["attacks.json"]
    assert after["digest"] == digest_of(after) != before["digest"]
    same = set(before) - {"attacks", "files", "digest"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    (run_folder / "record.json").unlink()
    assert refresh_record(run_folder) is None


@pytest.mark.parametrize(
    "break_it",
    [
        lambda record: record["claim"].update(statement="The data were deleted."),
        lambda record: record.update(extra=1),
        lambda record: record["data"]["trained"]["forget"].pop("row_hashes"),
        lambda record: record["data"]["trained"]["forget"]["row_hashes"].append("Mira Voss"),
        lambda record: record["figures"]["target"]["sets"]["forget"]["metrics"].update(probability={"mean": 1}),
        lambda record: record.pop("hardware"),
        lambda record: record["model"].update(sha256="abc"),
    ],
)
def test_the_schema_refuses_what_is_no_record(finished, break_it):
    record = json.loads((finished / "record.json").read_text())
    check_form(record)
    break_it(record)
    with pytest.raises(ValueError, match="breaks its schema"):
        check_form(record)


def test_what_has_no_record_is_refused(capsys, tmp_path, run_folder, forget_file):
    def refused(given, remedy, *arguments):
        status, _, err = call(capsys, "record", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err

    refused("is not a run folder: it has no run.json.", "Give one of `loku unlearn`.", tmp_path)
    refused("are not those of the run.", "Give the run's own rows.", run_folder, "--forget", forget_file)
    run = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps(run | {"status": "running"}))
    refused("is not finished.", "Repeat its command", run_folder)
    (run_folder / "run.json").write_text(json.dumps(run))
    settings = (run_folder / "config.yaml").read_text().replace(f"forget: {run_folder.parent}", "forget: nowhere")
    (run_folder / "config.yaml").write_text(settings.replace("forget.jsonl", "moved.jsonl"))
    refused("moved.jsonl' does not exist", "", run_folder)

    for content, given in (
        ("{", "is not readable JSON"),
        ("{}", "is not an unlearning record."),
        ('{"kind": "unlearning record", "schema_version": 9}', "has schema_version 9; this version of loku reads 1."),
    ):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(InputError, match=given):
            read_record(tmp_path / "other.json")


def test_cards_and_exports_carry_the_record_and_never_the_salt(capsys, finished, tmp_path):
    assert "[`record.json`](../record.json)" in (finished / "adapter" / "README.md").read_text()
    assert call(capsys, "export", finished, "--output", tmp_path / "merged", "--no-rescore")[0] == 0
    assert (tmp_path / "merged" / "record.json").read_bytes() == (finished / "record.json").read_bytes()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "[`record.json`](record.json)" in card
    assert "not a guarantee of deletion" in card
    assert not list(tmp_path.rglob("*.salt"))
