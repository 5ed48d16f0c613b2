"""`loku verify`: whole records pass, every kind of tampering is found, and what cannot be checked is said."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku import cli
from loku.record import digest_of


def write_rows(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def unlearn(folder, model, *more):
    """A short run with a retain-only model, in `folder`."""
    forget = write_rows(folder / "forget.jsonl", [perturbed(row) for row in rows(24)])
    retain = write_rows(folder / "retain.jsonl", [perturbed(row) for row in rows(8, start=40)])
    tiny_model("llama", seed=1).save_pretrained(folder / "retain-only")
    byte_level_tokenizer().save_pretrained(folder / "retain-only")
    status = cli.main([str(part) for part in (
        "unlearn", "--model", model, "--forget", forget, "--retain", retain, "--output", folder / "run",
        "--retain-only-model", folder / "retain-only", "--max-steps", 3, "--batch-size", 4, "--grad-accum", 1,
        "--warmup-steps", 1, "--learning-rate", "1e-2", "--threads", 1, *more,
    )])  # fmt: skip
    assert status == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    return unlearn(tmp_path_factory.mktemp("verified"), model_folder, "--rank", 4, "--init", "lora")


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def verify(capsys, *arguments):
    """The exit status, the checks by what they compared, and what stands on standard error."""
    status = cli.main(["verify", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    outcome = json.loads(captured.out) if captured.out else {"checks": []}
    return status, {check["what"]: check for check in outcome["checks"]}, captured.err


def found(checks, status="different"):
    return {what for what, check in checks.items() if check["status"] == status}


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_whole_record_passes_with_every_comparison_made(capsys, finished):
    status, checks, err = verify(capsys, finished / "record.json", "--share", 1)
    assert status == 0, err
    assert {check["status"] for check in checks.values()} == {"equal"}
    for what in (
        "form", "digest", "file results.json", "statements: method", "weights of the adapter",
        "settings of the adapter", "salt", "forget rows", "file of the forget rows", "hash of each forget row",
        "retain rows", "weights of the base model", "weights of the retain-only model", "figures of the target",
        "figures of the unlearned model", "figures of the retain-only model",
    ):  # fmt: skip
        assert what in checks
    assert checks["figures of the unlearned model"]["detail"].startswith("32 of 32 rows")


def test_a_share_of_the_rows_is_measured_within_the_whole_runs_limit_of_answers(capsys, finished):
    """A share lacks the longest answer, which the length of all generated answers follows from."""
    for seed in (1, 2):
        status, checks, err = verify(capsys, finished, "--share", 0.1, "--seed", seed)
        assert status == 0, err
        assert checks["figures of the unlearned model"]["detail"].startswith(f"4 of 32 rows (seed {seed})")


def test_without_a_set_what_is_generated_is_not_compared(capsys, tmp_path, model_folder):
    """How long answers may be follows from all sets: that of the one that is missing has the longest."""
    long = write_rows(tmp_path / "general.jsonl", [{"question": "What is it?", "answer": "a very long answer " * 9}])
    folder = unlearn(tmp_path, model_folder, "--rank", 2, "--init", "lora", "--general", long)
    long.unlink()
    capsys.readouterr()
    _, checks, err = verify(capsys, folder, "--share", 1)
    told = checks["figures of the unlearned model"]
    assert "what is generated was not compared" in told["detail"]
    assert told["status"] == "equal", err
    assert "figures of the unlearned model" not in found(checks)


def test_the_outcome_is_printed_for_people(capsys, finished):
    assert cli.main(["verify", str(finished / "record.json"), "--share", "0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^equal +weights of the adapter$", out, flags=re.MULTILINE)
    assert re.search(r"^not checked +figures of the target: --share is 0$", out, flags=re.MULTILINE)
    assert re.search(r"^\d+ equal, 0 different, 3 not checked$", out, flags=re.MULTILINE)
    assert "not a guarantee of deletion" in out


def claim_less(record):
    record["figures"]["unlearned"]["sets"]["forget"]["metrics"]["probability"]["mean"] = 0.001


def call_it_gone(record):
    record["verdict"]["level"] = "indistinguishable"


def call_it_other(record):
    record["method"]["name"] = "npo"


@pytest.mark.parametrize(
    ("change", "part"), [(claim_less, "figures"), (call_it_gone, "verdict"), (call_it_other, "method")]
)
@pytest.mark.parametrize("new_digest", [False, True])
def test_a_tampered_record_is_found_even_with_a_new_digest(capsys, run_folder, change, part, new_digest):
    def tamper(record):
        change(record)
        if new_digest:
            record["digest"] = digest_of(record)

    rewrite(run_folder / "record.json", tamper)
    status, checks, err = verify(capsys, run_folder, "--share", 0)
    assert status == 1
    assert found(checks) == {f"statements: {part}"} | (set() if new_digest else {"digest"})
    assert "differs from what is there in" in err
    assert "Ask its maker which of the two is right" in err


def test_a_record_that_drops_its_disclaimer_has_no_valid_form(capsys, run_folder):
    rewrite(run_folder / "record.json", lambda record: record["claim"].update(statement="The data were deleted."))
    status, checks, _ = verify(capsys, run_folder)
    assert status == 1
    assert found(checks) == {"form", "digest"}
    assert "$.claim.statement" in checks["form"]["detail"]


def test_a_tampered_adapter_is_found_by_its_hash_and_by_what_it_says(capsys, run_folder):
    file = run_folder / "adapter" / "adapter_model.safetensors"
    save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    status, checks, _ = verify(capsys, run_folder, "--share", 1)
    assert status == 1
    assert found(checks) == {"weights of the adapter", "figures of the unlearned model"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[2].pop("nll"), "forget row 2 has no nll"),
        (lambda rows: rows.clear(), "forget has no rows"),
    ],
)
def test_rows_that_lack_what_all_follows_from_are_a_difference(capsys, run_folder, change, told):
    rewrite(run_folder / "results.json", lambda value: change(value["sets"]["forget"]["per_example"]))
    status, checks, err = verify(capsys, run_folder, "--share", 0)
    assert status == 1
    assert any(told in str(check["detail"]) for check in checks.values()), err


def test_a_tampered_scale_of_the_adapter_is_found(capsys, run_folder):
    config = run_folder / "adapter" / "adapter_config.json"
    rewrite(config, lambda value: value.update(base_model_name_or_path="elsewhere"))
    assert verify(capsys, run_folder, "--share", 0)[0] == 0  # where the base lies may change
    rewrite(config, lambda value: value.update(lora_alpha=value["lora_alpha"] / 8))
    status, checks, _ = verify(capsys, run_folder, "--share", 1)
    assert status == 1
    assert found(checks) == {"settings of the adapter", "figures of the unlearned model"}


def test_a_tampered_number_of_a_row_is_found_by_file_by_mean_and_by_measuring(capsys, run_folder):
    def tamper(results):
        results["sets"]["forget"]["per_example"][3]["probability"] += 0.5

    rewrite(run_folder / "results.json", tamper)
    status, checks, _ = verify(capsys, run_folder, "--share", 1)
    assert status == 1
    assert found(checks) == {
        "file results.json", "figures of unlearned, from the numbers of its rows", "figures of the unlearned model",
    }  # fmt: skip
    assert "forget row 3: probability" in checks["figures of the unlearned model"]["detail"]


def test_figures_that_were_falsified_in_every_file_are_found_by_measuring_alone(capsys, run_folder):
    """Rows, means, record and hashes agree with each other; only the model contradicts them."""
    from loku.evaluation.results import SetResults
    from loku.files import sha256_file
    from loku.remeasure import summarise

    def falsify(results):
        entry = results["sets"]["forget"]
        for row in entry["per_example"]:
            row["probability"] /= 2
        made: SetResults = summarise(entry["per_example"], forget=True, seed=results["settings"]["seed"])
        entry["metrics"] = {name: value._asdict() for name, value in made.metrics.items()}

    def follow(record):
        entry = json.loads((run_folder / "results.json").read_text())["sets"]["forget"]
        record["figures"]["unlearned"]["sets"]["forget"]["metrics"] = entry["metrics"]
        record["files"]["results.json"] = sha256_file(run_folder / "results.json")
        record["digest"] = digest_of(record)

    rewrite(run_folder / "results.json", falsify)
    rewrite(run_folder / "record.json", follow)
    assert verify(capsys, run_folder, "--share", 0)[0] == 0
    for seed in range(3):
        status, checks, _ = verify(capsys, run_folder, "--share", 0.05, "--seed", seed, "--tolerance", "1e-4")
        assert status == 1
        assert found(checks) == {"figures of the unlearned model"}


def test_tampered_forget_rows_are_found_and_named(capsys, run_folder, finished, tmp_path):
    lines = (finished.parent / "forget.jsonl").read_text().splitlines(keepends=True)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(
        "".join(line.replace("Where", "When") if place == 5 else line for place, line in enumerate(lines))
    )
    status, checks, _ = verify(capsys, run_folder, "--forget", changed, "--share", 0.1)
    assert status == 1
    assert found(checks) == {"forget rows", "file of the forget rows", "hash of each forget row"}
    assert checks["hash of each forget row"]["detail"] == (
        "rows that are not in the record: 5; rows of the record that are gone: 5"
    )
    assert "without the sets forget" in checks["figures of the unlearned model"]["detail"]
    (tmp_path / "swapped.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    status, checks, _ = verify(capsys, run_folder, "--forget", tmp_path / "swapped.jsonl", "--share", 0)
    assert status == 1
    assert checks["hash of each forget row"]["detail"] == "the order or the number of rows differs"


def test_tampered_retain_rows_and_settings_and_missing_files_are_found(capsys, run_folder, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [perturbed(row) for row in rows(8, start=41)])
    status, checks, _ = verify(capsys, run_folder, "--retain", other, "--share", 0)
    assert (status, found(checks)) == (1, {"retain rows"})
    text = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(text.replace("max_steps: 3", "max_steps: 5"))
    status, checks, _ = verify(capsys, run_folder, "--share", 0)
    assert (status, found(checks)) == (1, {"file config.yaml", "statements: settings"})
    assert checks["statements: settings"]["detail"] == "settings.max_steps: 3 recorded, 5 there"
    (run_folder / "config.yaml").write_text(text)
    (run_folder / "metrics.jsonl").unlink()
    status, checks, _ = verify(capsys, run_folder, "--share", 0)
    assert (status, found(checks)) == (1, {"file metrics.jsonl"})


def test_another_base_model_is_found(capsys, run_folder, tmp_path):
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "other")
    byte_level_tokenizer().save_pretrained(tmp_path / "other")
    status, checks, _ = verify(capsys, run_folder, "--model", tmp_path / "other", "--share", 0)
    assert (status, found(checks)) == (1, {"weights of the base model"})


def test_a_record_without_its_salt_is_checked_but_for_the_row_hashes(capsys, run_folder, tmp_path):
    (run_folder / "record.salt").rename(tmp_path / "key")
    status, checks, _ = verify(capsys, run_folder, "--share", 0)
    assert status == 0
    assert {"salt", "hash of each forget row"} <= found(checks, "not checked")
    assert verify(capsys, run_folder, "--salt", tmp_path / "key", "--share", 0)[1]["salt"]["status"] == "equal"
    (tmp_path / "key").write_text("ab" * 32)
    status, checks, _ = verify(capsys, run_folder, "--salt", tmp_path / "key", "--share", 0)
    assert (status, found(checks)) == (1, {"salt"})


def test_a_record_alone_says_what_it_cannot_check(capsys, finished, tmp_path, model_folder):
    shutil.copy(finished / "record.json", tmp_path / "record.json")
    status, checks, _ = verify(capsys, tmp_path / "record.json")
    assert status == 0
    assert found(checks, "equal") == {"form", "digest"}
    assert found(checks) == set()
    status, checks, _ = verify(
        capsys, tmp_path / "record.json", "--model", model_folder, "--forget", finished.parent / "forget.jsonl",
        "--adapter", finished / "adapter", "--salt", finished / "record.salt",
    )  # fmt: skip
    assert status == 0
    assert found(checks, "equal") == {
        "form", "digest", "weights of the adapter", "settings of the adapter", "salt", "forget rows",
        "file of the forget rows", "hash of each forget row", "weights of the base model",
    }  # fmt: skip
    status, checks, _ = verify(capsys, tmp_path / "record.json", "--folder", finished, "--share", 0)
    assert status == 0
    assert "statements: figures" in found(checks, "equal")


@pytest.mark.parametrize("broken", ["run.json", "results.json", "adapter/adapter_config.json"])
def test_damaged_files_are_differences_and_no_tracebacks(capsys, run_folder, broken):
    (run_folder / broken).write_text("{")
    status, checks, err = verify(capsys, run_folder, "--share", 0)
    assert status == 1
    assert found(checks)
    assert "Traceback" not in err


def test_wrong_usage_is_answered_in_two_halves(capsys, run_folder, tmp_path):
    def refused(given, remedy, *arguments):
        status, checks, err = verify(capsys, *arguments)
        assert status == 2, err
        assert not checks
        assert given in err
        assert remedy in err

    refused("There is no record '", "Give the record.json of a run", tmp_path / "none.json")
    refused("is not an unlearning record.", "Give the record.json of a run", run_folder / "run.json")
    refused("--adapter 'none' is not a folder.", "Check the path", run_folder, "--adapter", "none")
    refused("--salt 'none' does not exist.", "Give the record.salt", run_folder, "--salt", "none")
    refused("--share 2.0 is too large.", "Give at most 1.", run_folder, "--share", 2)
    refused("--forget './none.jsonl' does not exist.", "", run_folder, "--forget", "./none.jsonl")
    refused("--model './none' does not exist as a folder.", "Check the path", run_folder, "--model", "./none")


def test_a_model_whose_weights_were_trained_is_verified_too(capsys, tmp_path, model_folder):
    run = unlearn(tmp_path, model_folder, "--tune", "full", "--method", "graddiff")
    capsys.readouterr()
    status, checks, err = verify(capsys, run, "--share", 0.3)
    assert status == 0, err
    assert found(checks, "not checked") == set()
    assert {"weights of the unlearned model", "figures of the unlearned model"} <= found(checks, "equal")
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})
    status, checks, _ = verify(capsys, run, "--share", 0.3)
    assert (status, found(checks)) == (1, {"weights of the unlearned model", "figures of the unlearned model"})
