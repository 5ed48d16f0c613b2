"""Files are whole or absent."""

from __future__ import annotations

import pytest

from loku.errors import InputError
from loku.files import (
    check_output_file,
    check_output_folder,
    read_json,
    read_object,
    replace_file,
    sha256_file,
    sha256_json,
    sha256_text,
    write_json,
    write_text,
)


def test_writing_and_hashing(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"b": 1, "ä": [1, 2]})
    assert read_json(tmp_path / "a" / "x.json") == {"b": 1, "ä": [1, 2]}
    write_text(tmp_path / "t", "abc")
    assert sha256_file(tmp_path / "t") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    write_text(tmp_path / "u", "ä\n")
    assert sha256_file(tmp_path / "u") == sha256_text("ä\n")
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


def test_what_must_be_one_object(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"a": 1}')
    assert read_object(file, "Mend it.") == {"a": 1}
    for content, said in (
        (b"{", "is not readable JSON ("),
        (b"[1]", "holds a list, not a JSON object."),
        (b"\xff", "JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_object(file, "Mend it.")
        assert caught.value.given.startswith(f"The file '{file}' ")
        assert said in caught.value.given
        assert caught.value.remedy == "Mend it."


def test_outputs_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    assert check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_output_folder(tmp_path) == tmp_path
    assert check_output_file(tmp_path / "file") == tmp_path / "file"
    assert check_output_file("new.html").name == "new.html"
    under = rf"--output '.*' lies under '{tmp_path / 'file'}', which is a file\.\nGive a path under a folder\."
    for check in (check_output_folder, check_output_file):
        for place in ("sub", "sub/sub"):
            with pytest.raises(InputError, match=under):
                check(tmp_path / "file" / place)
    with pytest.raises(InputError, match=r"file' is a file\.\nGive a folder\."):
        check_output_folder(tmp_path / "file")
    with pytest.raises(InputError, match=r"' is a folder\.\nGive a file name\."):
        check_output_file(tmp_path)


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()
