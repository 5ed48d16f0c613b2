"""Files are whole or absent."""

from __future__ import annotations

import pytest

from loku.files import read_json, replace_file, sha256_file, sha256_json, write_json, write_text


def test_writing_and_hashing(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"b": 1, "ä": [1, 2]})
    assert read_json(tmp_path / "a" / "x.json") == {"b": 1, "ä": [1, 2]}
    write_text(tmp_path / "t", "abc")
    assert sha256_file(tmp_path / "t") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    write_text(tmp_path / "x", "old")

    def fail(temporary):
        with open(temporary, "w") as handle:
            handle.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(tmp_path / "x", fail)
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()
