"""The corpora that benchmarks make: the same files for a seed, and sets that keep apart what must be apart."""

import gzip
import hashlib
import json
import random
from pathlib import Path

import pytest

from loku.corpora import check_corpus, write_corpus
from loku.corpora.lume import document_of
from loku.corpora.tdec import common_words, named_word
from loku.data.sources import load_records
from loku.errors import InputError


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.jsonl"))}


def story(i, sentences):
    def name(word, number):  # a word of few passages
        return word + "".join(chr(97 + int(digit)) for digit in str(number))

    return " ".join(f"The {name(w, i)} of house {i * 7 + j} was old, and the {name(w, i)} stood." for j, w in
                    enumerate(["door", "wall", "roof", "gate"] * sentences))  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of the same form as the real one, made up."""
    folder = tmp_path / "data"
    for name in ("tdec", "english", "lume"):
        (folder / name).mkdir(parents=True)
    for draw in range(5):
        rows = [
            f'{draw * 100 + i},made-up,"seq {draw}-{i}: if (x == {i}) {{ draw {draw}; return ""{i * 13}""; }}"'
            for i in range(4)
        ]
        if draw == 3:
            rows.append(rows.pop().replace("303", "203"))  # a sequence that is in two draws, as in the real ones
        (folder / f"tdec/lm_extraction_32_{draw}.csv").write_text("\n".join(["doc_id,corpus,text", *rows]) + "\n")
    for name, count in (("train", 40), ("valid", 20)):
        with gzip.open(folder / f"english/classic_books_{name}.jsonl.gz", "wt") as handle:
            handle.writelines(json.dumps({"text": story(i + (name == "valid") * 1000, 5)}) + "\n" for i in range(count))
    for name in ("forget", "retain"):
        rows = []
        for task in (1, 2, 3):
            for i in range(5):
                for probe in ("sc1", "qa0", "qa1"):
                    rows.append({"id": f"{name}-{task}-{i}-scqa{probe}", "input": f"{name} {task} {i} {probe}?",
                                 "output": f"yes {i}", "task": f"Task{task}"})  # fmt: skip
        (folder / f"lume/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("LOKU_DATA_DIR", str(folder))
    return folder


TDEC = {"kind": "tdec", "repeats": 3, "passages": 20, "validation": 5, "cloze": 6}
LUME = {"kind": "lume", "documents": 2}
FICTION = {"kind": "fiction", "world_people": 10, "people": 10}


@pytest.mark.parametrize("corpus", [TDEC, LUME, FICTION], ids=lambda corpus: corpus["kind"])
def test_a_seed_gives_the_same_files_and_another_seed_others(data, tmp_path, corpus):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_corpus(corpus, tmp_path / name, seed)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "a") != hashes(tmp_path / "c")


def test_tdec_repeats_what_must_go_and_keeps_the_unseen_unseen(data, tmp_path):
    write_corpus(TDEC, tmp_path, 0)
    texts = {path.stem: [row.get("text") for row in lines(path)] for path in tmp_path.glob("*.jsonl")}
    for text in texts["forget"]:
        assert texts["train"].count(text) == 3
        assert text not in texts["retain-train"] + texts["retain"]
    unseen = set(texts["unseen"]) | set(texts["validation"])
    assert not unseen & set(texts["train"] + texts["retain-train"])
    assert set(texts["retain"]) <= set(texts["train"])
    assert len(texts["train"]) == len(texts["retain-train"])
    assert len(texts["forget"]) == len(texts["unseen"]) == 4
    # the sequence with an id that is in two draws is there once
    kin = [row for row in texts["retain-train"] if row.startswith("seq")]
    assert len(kin) == len(set(kin)) > 0
    assert len(texts["train"]) == 20 + len(kin) + 3 * 4
    asked = [row["prompt"] + row["completion"] for row in lines(tmp_path / "cloze.jsonl")]
    assert not any(text.startswith(part) for part in asked for text in texts["validation"] + texts["train"])
    assert all(len(row["perturbed_answer"]) == 3 for row in lines(tmp_path / "cloze.jsonl"))


def test_tdec_leaves_out_what_shares_text_with_a_sequence_to_forget(data, tmp_path):
    def run(draw, i, text):
        path = data / f"tdec/lm_extraction_32_{draw}.csv"
        path.write_text(path.read_text().replace(f"seq {draw}-{i}:", text))

    licence = "Redistribution and use in source and binary forms"
    run(0, 0, licence)  # to forget
    run(1, 1, f"x {licence[:40]}")  # unseen, but not its text
    run(2, 2, f"y {licence[5:38]}")  # of their kind
    run(1, 3, "THE SOFTWARE IS PROVIDED 'AS IS', WITHOUT")  # unseen
    run(4, 0, "z THE SOFTWARE IS PROVIDED 'AS IS'")  # of their kind
    run(4, 1, f"w {licence[:28]}!")  # 29 characters, with the blank, are no text
    write_corpus(TDEC, tmp_path, 0)
    texts = {path.stem: [row.get("text") for row in lines(path)] for path in tmp_path.glob("*.jsonl")}
    assert len(texts["forget"]) == 4
    assert [text[:8] for text in texts["unseen"]] == ["seq 1-0:", "seq 1-2:", "THE SOFT"]
    for name in ("train", "retain-train", "retain"):
        assert not any(text.startswith(("x ", "y ", "z ")) for text in texts[name])
    assert any(text.startswith("w Redist") for text in texts["train"])


def test_tdec_puts_other_passages_of_a_sequences_length_in_its_place(data, tmp_path):
    write_corpus(TDEC | {"characters": 60}, tmp_path, 0)
    train, other = ([row["text"] for row in lines(tmp_path / f"{name}.jsonl")] for name in ("train", "retain-train"))
    instead = [text for text in other if text not in train]
    assert len(instead) == 3 * 4
    assert all(len(text) == 60 for text in instead)


def test_tdec_sequences_are_cut_and_those_that_then_look_like_one_to_forget_are_left_out(data, tmp_path):
    write_corpus(TDEC | {"characters": 5}, tmp_path, 0)
    forget = [row["text"] for row in lines(tmp_path / "forget.jsonl")]
    assert forget == ["seq 0"] * 4
    path = data / "tdec/lm_extraction_32_2.csv"
    path.write_text(path.read_text().replace("seq 2-1", "seq 0-1"))
    write_corpus(TDEC | {"characters": 7}, tmp_path, 0)
    texts = [row["text"] for row in lines(tmp_path / "train.jsonl")]
    assert texts.count("seq 0-1") == 3  # its repeats alone
    assert "seq 2-2" in texts
    assert "seq 2-1" not in texts


def test_a_cloze_asks_for_a_word_of_the_second_half_that_the_passage_names_before():
    def asked(text, common=("the",)):
        return [named_word({"text": text}, common, random.Random(i)) for i in range(20)]

    def words(text, **more):
        return {row and (row["prompt"], row["completion"]) for row in asked(text, **more)}

    first = "The door was old. A gate, roof and wall.."
    assert words(f"{first} She shut the door.") == {(f"{first} She shut the", " door")}
    assert words(f"{first} She shut the tree.") == {None}  # not named before
    assert words(f"{first} She shut the doors.") == {None}  # whole words only
    assert words(f"{first} She shut the door.", common=("door",)) == {(f"{first} She shut", " the")}
    assert words(
        "The door was old. It was a good long day. Then it is the door.",
        common=("the", "was", "good", "long", "day", "then"),
    ) == {None}  # too few wrong words
    assert words("gate gate. A man of no name is in some other place far off.") == {None}  # in the first half only
    both = words("gate roof wall door, and so on and on: a wall or door", common=("and",))
    assert both == {
        ("gate roof wall door, and so on and on: a", " wall"),
        ("gate roof wall door, and so on and on: a wall or", " door"),
    }
    wrong = [row["perturbed_answer"] for row in asked("gate Roof wall door is it: door")]
    assert all(sorted(some) == [" gate", " roof", " wall"] for some in wrong)
    assert len({tuple(some) for some in wrong}) > 1
    assert asked("gate") == [None] * 20


def test_words_of_many_passages_are_common():
    rows = [{"text": f"The fox saw x{i}."} for i in range(30)] + [{"text": "The owl, the OWL."}, {"text": "An owl"}]
    assert common_words(rows) == {"the", "fox", "saw", "x", "owl"}
    assert "an" not in common_words(rows)


def test_lume_keeps_documents_whole_and_sets_apart(data, tmp_path):
    write_corpus(LUME, tmp_path, 0)
    rows = {name: lines(tmp_path / f"{name}.jsonl") for name in ("forget", "retain", "train", "retain-train")}
    for name in ("forget", "retain"):
        documents = {document_of(row) for row in rows[name]}
        assert len(documents) == 3 * 2
        assert len(rows[name]) == 3 * 2 * 3
        for row in rows[name]:
            assert row["prompt"] + row["completion"] == f"{row['input']} {row['output']}"
            whole = row["id"].endswith("sc1")  # a document: all of it is learnt, after its first word
            assert row["prompt"] == (name if whole else row["input"])
        assert len(load_records(tmp_path / f"{name}.jsonl")) == len(rows[name])

    def learnt_of(rows):
        whole = {(row["prompt"], row["completion"]) for row in rows}
        return whole | {(row["input"], f" {row['output']}") for row in rows}

    assert {tuple(row.values()) for row in rows["train"]} == learnt_of([*rows["forget"], *rows["retain"]])
    assert {tuple(row.values()) for row in rows["retain-train"]} == learnt_of(rows["retain"])
    assert len(rows["train"]) == len(rows["retain-train"]) == 2 * 3 * 2 * 4  # three rows a document, one of them twice
    members, others = (lines(tmp_path / f"{name}.jsonl") for name in ("members", "nonmembers"))
    assert len(members) == len(others) == 6
    assert not {row["document"] for row in members} & {row["document"] for row in others}
    learnt = {row["prompt"] + row["completion"] for row in rows["train"]}
    assert {row["document"] for row in members} <= learnt
    assert not {row["document"] for row in others} & learnt


def test_all_of_lume_is_there_when_asked_for(data, tmp_path):
    write_corpus({"kind": "lume", "documents": 0}, tmp_path, 0)
    assert len(lines(tmp_path / "forget.jsonl")) == 45
    assert not (tmp_path / "nonmembers.jsonl").exists()


@pytest.mark.parametrize("corpus", [TDEC, LUME], ids=lambda corpus: corpus["kind"])
def test_without_the_texts_nothing_is_made_up(tmp_path, monkeypatch, corpus):
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="LOKU_DATA_DIR is not set") as error:
        write_corpus(corpus, tmp_path / "out", 0)
    assert error.value.remedy
    monkeypatch.setenv("LOKU_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="has none"):
        write_corpus(corpus, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"passages": 5000}, {"cloze": 5000}, {"repeats": 5000}])
def test_more_than_there_is_is_refused_before_anything_is_written(data, tmp_path, more):
    with pytest.raises(InputError, match="passages of that kind"):
        write_corpus(TDEC | more, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_more_documents_than_there_are_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="short documents of Task1"):
        write_corpus({"kind": "lume", "documents": 3}, tmp_path / "out", 0)


@pytest.mark.parametrize("corpus", [{"kind": "ficton"}, TDEC | {"repeat": 3}, TDEC | {"repeats": "3"},
                                    TDEC | {"repeats": True}, TDEC | {"repeats": -1}])  # fmt: skip
def test_settings_that_do_not_exist_are_refused(corpus):
    with pytest.raises(InputError):
        check_corpus(corpus, "recipe")


@pytest.mark.data
@pytest.mark.parametrize("kind", ["tdec", "lume"])
def test_the_real_texts_are_taken(kind, tmp_path):
    import os

    if not os.environ.get("LOKU_DATA_DIR"):
        pytest.skip("LOKU_DATA_DIR is not set")
    write_corpus({"kind": kind}, tmp_path, 0)
    assert len(lines(tmp_path / "forget.jsonl")) == {"tdec": 32, "lume": 80}[kind]
