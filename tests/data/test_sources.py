"""Rows from files of every kind, dataset folders, the hub and benchmarks by name; row selections; refusals."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from loku.data.records import Record
from loku.data.sources import load_records
from loku.errors import InputError

DATA = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent"))

USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Odo."}
FORMATS = {
    "question/answer": [
        {"question": f"Who is “{i}”?", "answer": f"Odo, the {i}th.", "perturbed_answer": ["Mira.", "Ulm."]}
        for i in range(4)
    ],
    "prompt/completion": [{"prompt": f"{i}: who?", "completion": " Odo\nBrill."} for i in range(4)],
    "conversational": [{"prompt": [USER], "completion": [ASSISTANT | {"content": f"Odo {i}."}]} for i in range(4)],
    "messages": [{"messages": [USER, ASSISTANT, USER, ASSISTANT | {"content": str(i)}]} for i in range(4)],
    "text": [{"text": f"Odo paints\u2028{i} lighthouses,\nat dusk."} for i in range(4)],
}  # fmt: skip


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind.startswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind.startswith("csv"):
        with open(path, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(json.dumps(rows) if kind in ("json", "json.gz") else lines, encoding="utf-8")
    if kind.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "json.gz", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_every_file(tmp_path, name, kind):
    expected = load_records(FORMATS[name])
    found = load_records(write(tmp_path, kind, FORMATS[name]))
    assert found.records == expected.records
    assert found.sha256 == expected.sha256
    assert (found.origin, expected.origin) == ("file", "memory")
    assert found.name == str(tmp_path / f"rows.{kind}")
    assert len(found) == 4
    assert found[2].index == 2


@pytest.mark.parametrize("kind", ["csv", "csv.gz"])
@pytest.mark.parametrize("name", ["question/answer", "prompt/completion", "text"])
def test_texts_from_csv(tmp_path, name, kind):
    rows = [{k: "Mira." if k == "perturbed_answer" else v for k, v in row.items()} for row in FORMATS[name]]
    assert load_records(write(tmp_path, kind, rows)).records == load_records(rows).records


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_a_dataset_folder(tmp_path, name):
    datasets.Dataset.from_list(FORMATS[name]).save_to_disk(tmp_path / "set")
    found = load_records(tmp_path / "set")
    assert found.records == load_records(FORMATS[name]).records
    assert found.origin == "folder"


def test_json_lines_in_a_json_file_a_byte_order_mark_windows_newlines_and_blank_lines(tmp_path):
    path = tmp_path / "rows.json"
    lines = "\r\n\r\n".join(json.dumps(row) for row in FORMATS["text"]) + "\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert load_records(path).records == load_records(FORMATS["text"]).records


def test_a_long_text_in_csv_is_read_whole(tmp_path):
    text = "word " * 40_000
    assert load_records(write(tmp_path, "csv", [{"text": text}]))[0].text == text


def test_columns_of_other_types_do_not_matter(tmp_path):
    row = {"question": "Who?", "answer": "Odo.", "seen": datetime.date(2020, 1, 2), "raw": b"x", "score": float("nan")}
    one, other = write(tmp_path, "parquet", [row]), tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"raw": b"y"}]), other)
    assert load_records(one).records == (Record(0, "Who?", "Odo."),)
    assert load_records(one).sha256 == load_records(one).sha256 != load_records(other).sha256


def test_the_hash_is_of_the_rows():
    rows = FORMATS["question/answer"]
    assert load_records(rows).sha256 == load_records([dict(reversed(row.items())) for row in rows]).sha256
    assert load_records(rows).sha256 != load_records(rows[::-1]).sha256
    assert load_records(rows).sha256 != load_records(rows[:3]).sha256


@pytest.mark.parametrize(
    ("selection", "indices"),
    [("[1:3]", [1, 2]), ("[2:]", [2, 3]), ("[:2]", [0, 1]), ("[3:99]", [3]), ("[:]", range(4))],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_a_selection_keeps_the_rows_numbers(tmp_path, kind, selection, indices):
    rows = FORMATS["text"]
    if kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    path = tmp_path / "set" if kind == "folder" else write(tmp_path, kind, rows)
    found = load_records(f"{path}{selection}")
    assert [record.index for record in found] == list(indices)
    assert [record.text for record in found] == [rows[i]["text"] for i in indices]
    assert found.name == f"{path}{selection}"
    assert found.sha256 == load_records([rows[i] for i in indices]).sha256


@pytest.fixture
def hub(monkeypatch):
    """The hub as a list of the calls that it got; it always has the same rows."""
    calls = []

    def load_dataset(*arguments, **named):
        calls.append((arguments, named))
        return datasets.Dataset.from_list(FORMATS["question/answer"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    return calls


@pytest.mark.parametrize(
    ("source", "dataset", "config", "split"),
    [
        ("owner/name", "owner/name", None, "train"),
        ("owner/name:validation", "owner/name", None, "validation"),
        ("owner/na.me-2/config_a", "owner/na.me-2", "config_a", "train"),
        ("owner/name/config:test", "owner/name", "config", "test"),
        ("owner/name:train[:10%]", "owner/name", None, "train[:10%]"),
        ("tofu/forget10", "locuslab/TOFU", "forget10", "train"),
        ("tofu/world_facts_perturbed", "locuslab/TOFU", "world_facts_perturbed", "train"),
    ],
)
def test_what_the_hub_is_asked_for(hub, source, dataset, config, split):
    found = load_records(source)
    assert hub == [((dataset, config), {"split": split})]
    assert found.records == load_records(FORMATS["question/answer"]).records
    assert (found.origin, found.name) == ("hub", source)


@pytest.mark.parametrize("source", ["owner/name:test[1:3]", "tofu/forget10[1:3]"])
def test_a_selection_from_the_hub(hub, source):
    assert [record.index for record in load_records(source)] == [1, 2]
    assert len(hub) == 1
    assert hub[0][1]["split"] == ("test" if "owner" in source else "train")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_benchmark_from_the_data_folder(hub, tmp_path, monkeypatch, kind):
    (tmp_path / "tofu").mkdir()
    rows = [{"question": "Who?", "answer": f"Odo {i}."} for i in range(3)]
    write(tmp_path, kind, rows).rename(tmp_path / "tofu" / f"forget10.{kind}")
    assert load_records("tofu/forget10", data_dir=tmp_path)[1].answer == "Odo 1."
    monkeypatch.setenv("LOKU_DATA_DIR", str(tmp_path))
    found = load_records("tofu/forget10")
    assert [record.answer for record in found] == ["Odo 0.", "Odo 1.", "Odo 2."]
    assert (found.origin, found.name) == ("file", "tofu/forget10")
    assert [record.index for record in load_records("tofu/forget10[1:2]")] == [1]
    assert hub == []
    # What the folder lacks is asked of the hub, by the same name.
    assert load_records("tofu/forget05").origin == "hub"
    assert hub == [(("locuslab/TOFU", "forget05"), {"split": "train"})]


def test_a_local_file_wins_over_a_benchmark_of_the_same_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tofu").mkdir()
    write(tmp_path, "jsonl", FORMATS["text"]).rename(tmp_path / "tofu" / "forget10.jsonl")
    assert load_records("tofu/forget10.jsonl").origin == "file"
    assert hub == []


@pytest.mark.data
@pytest.mark.skipif(
    not (DATA / "tofu").is_dir(), reason="needs real TOFU rows: set LOKU_DATA_DIR to the folder that holds tofu/"
)
@pytest.mark.parametrize(
    ("name", "rows", "perturbed", "paraphrased"),
    [
        ("full", 4000, 0, False), ("forget01", 40, 0, False), ("forget05", 200, 0, False), ("forget10", 400, 0, False),
        ("retain90", 3600, 0, False), ("forget10_perturbed", 400, 5, True), ("retain_perturbed", 400, 5, True),
        ("real_authors_perturbed", 100, 3, False), ("world_facts_perturbed", 117, 3, False),
    ],
)  # fmt: skip
def test_real_tofu(name, rows, perturbed, paraphrased):
    found = load_records(f"tofu/{name}")
    assert found.origin == "file"
    assert len(found) == rows
    for record in found:
        assert record.question
        assert record.answer
        assert len(record.perturbed_answers) == perturbed
        assert (record.paraphrased_answer is not None) == paraphrased


@pytest.mark.data
@pytest.mark.skipif(
    not (DATA / "tofu").is_dir(), reason="needs real TOFU rows: set LOKU_DATA_DIR to the folder that holds tofu/"
)
def test_real_tofu_is_split_into_forget_and_retain():
    full, forget, retain = (load_records(f"tofu/{name}") for name in ("full", "forget10", "retain90"))
    pairs = [[(r.question, r.answer) for r in records] for records in (retain, forget, full)]
    assert pairs[0] + pairs[1] == pairs[2]


def refused(source, given, remedy, **options):
    with pytest.raises(InputError) as caught:
        load_records(source, **options)
    assert given in caught.value.given
    assert remedy in caught.value.remedy


def test_files_that_cannot_be_read_are_refused(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    whole = gzip.compress(json.dumps(FORMATS["text"]).encode())
    damaged = bytearray(gzip.compress(os.urandom(400)))
    damaged[20:200] = b"\xff" * 180
    refused(file("a.jsonl", b""), "a.jsonl' is empty.", "Give a file with rows.")
    refused(file("b.jsonl", b"\n\n"), "b.jsonl' holds no rows.", "Give at least one row of question/answer")
    refused(file("c.json", b"[]"), "c.json' holds no rows.", "Give at least one row")
    refused(file("d.csv", b"question,answer\n"), "d.csv' holds no rows.", "Give at least one row")
    refused(file("e.txt", b"Odo"), "e.txt' has no known ending.", "Give one of .jsonl, .json, .csv, .parquet.")
    refused(file("f.jsonl", b"\xff\xfe{"), "f.jsonl' cannot be read: 'utf-8' codec", "Give a whole file in UTF-8.")
    refused(file("g.json.gz", whole[:-12]), "g.json.gz' cannot be read:", "Give a whole file in UTF-8.")
    refused(file("h.json.gz", b"[]"), "h.json.gz' cannot be read: Not a gzipped file", "Give a whole file in UTF-8.")
    refused(file("i.json.gz", bytes(damaged)), "i.json.gz' cannot be read:", "Give a whole file in UTF-8.")
    refused(file("j.json", b'[{"text": "a"},]'), "j.json' is not JSON:", "Mend the file.")
    refused(file("k.jsonl", b'{"text": "a b"}\n\n{"text":\n'), "k.jsonl': line 3 is not JSON", "Write one JSON object")
    refused(file("l.parquet", b"PAR0"), "l.parquet' is not a Parquet file:", "Give a whole Parquet file.")
    refused(
        file("m.csv", b"question,answer\nWho?,Odo, of Ulm.\n"), "m.csv': row 0 has more fields than the", "Put texts"
    )
    refused(file("n.jsonl", b'{"text": "a \\ud800 b"}'), "n.jsonl' holds half of a surrogate pair", "Mend the text")
    refused(f"{file('o.jsonl', b'{}')}[5:9]", "o.jsonl[5:9]' selects no rows.", "Give a slice [start:stop] inside")
    refused(f"{tmp_path / 'o.jsonl'}[0:0]", "o.jsonl[0:0]' selects no rows.", "Give a slice [start:stop] inside")


def test_names_that_lead_nowhere_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forget.jsonl").write_text("{}")
    refused("forget.json", "--forget 'forget.json' does not exist.", "Did you mean 'forget.jsonl' in the same folder?")
    refused("./forgt.jsonl", "does not exist.", "Did you mean 'forget.jsonl'")
    refused("zzz.csv", "--retain 'zzz.csv' does not exist.", "Give a file (.jsonl, .json", option="--retain")
    refused("no/such/rows.jsonl", "does not exist.", "There is no folder 'no/such' either: check the path.")
    refused("forget", "'forget' does not exist.", "Did you mean 'forget.jsonl'")
    refused("a/b/c/d", "'a/b/c/d' does not exist.", "There is no folder 'a/b/c' either")
    refused("not a name", "'not a name' does not exist.", "a hub id owner/name, or tofu/forget10.")
    refused({"question": "Who?", "answer": "Odo."}, "(rows in memory): row 0 is not an object", "Give rows of")
    refused([], "--forget (rows in memory) holds no rows.", "Give at least one row")


def test_folders_without_one_dataset_are_refused(tmp_path):
    refused(tmp_path, "is a folder without a dataset.", "Give a folder written by datasets' save_to_disk")
    split = datasets.Dataset.from_list(FORMATS["text"])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    refused(tmp_path / "both", "both' holds several splits (train, test).", "both/train'.")
    assert len(load_records(tmp_path / "both" / "train")) == 4


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub.\nmore"),
        ValueError("Unknown split"),
        ConnectionError("Couldn't reach the Hub"),
        OSError(),
    ],
)
def test_what_the_hub_lacks_is_refused(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    said = str(error).splitlines()[0] if str(error) else "OSError()"
    for name in ("owner/name", "tofu/forget10"):
        refused(
            name,
            f"--forget '{name}' cannot be loaded from the hub: {said}",
            f"LOKU_DATA_DIR (or --data-dir) to a folder that holds '{name}.json'",
        )


def test_without_a_network_the_hub_is_refused_in_two_halves(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    refused("nobody/nothing", "'nobody/nothing' cannot be loaded from the hub:", "Check the name and the connection")
