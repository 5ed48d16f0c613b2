"""What the verbs check themselves before they call the library."""

from __future__ import annotations

import json
import shutil

from builders import byte_level_tokenizer
from loku import cli


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_importance_of_rows_that_the_model_cannot_read_is_refused(
    capsys, tmp_path, model_folder, forget_file, retain_file
):
    def refused(given, remedy, model, forget):
        status, _, err = run(
            capsys, "importance", "--model", model, "--forget", forget, "--retain", retain_file,
            "--output", tmp_path / "new" / "importance.safetensors",
        )  # fmt: skip
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert not (tmp_path / "new").exists()

    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 40}))
    refused("tokens, but the model reads 256 at most.", "Give --max-length 256 or less", model_folder, long)
    larger = shutil.copytree(model_folder, tmp_path / "larger")
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(larger)
    given = (
        f"The tokenizer has ids up to {len(tokenizer) - 1}, but the model's embedding has {len(tokenizer) - 1} rows."
    )
    refused(given, "Give the tokenizer that belongs to the model", larger, forget_file)
