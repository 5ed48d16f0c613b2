"""Fixtures shared by all tests: models and rows on disk, made by the project itself."""

from __future__ import annotations

import json
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from builders import byte_level_tokenizer, tiny_model

# The same examples in every run: a suite that guards main is red for a change, not for a draw.
# `pytest --hypothesis-profile default` draws new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_seed():
    """A test that draws without a generator draws the same whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def rows(count, start=0):
    """Question and answer rows about people who do not exist."""
    return [
        {"question": f"Where was person {i} born?", "answer": f"In the town of {chr(65 + i % 26)}{i * 7}."}
        for i in range(start, start + count)
    ]


def perturbed(row):
    """A row with the columns that truth ratios and paraphrased questions need."""
    return row | {
        "paraphrased_answer": row["answer"].replace("In the town of", "It was the town of"),
        "paraphrased_question": row["question"].replace("Where", "In which place"),
        "perturbed_answer": [f"In the town of {other}." for other in ("Ulm", "Oos", "Ahn")],
    }


@pytest.fixture
def forget_file(tmp_path):
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    return path


@pytest.fixture
def retain_file(tmp_path):
    path = tmp_path / "retain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(8, start=20)))
    return path
