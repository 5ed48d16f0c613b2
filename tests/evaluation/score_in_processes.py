"""Run by test_sharing.py as one of two processes that share scoring and generation."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from builders import byte_level_tokenizer, tiny_model
from loku.cli import main
from loku.data.encoding import IGNORE, Example
from loku.evaluation.generation import generate
from loku.evaluation.scoring import score
from loku.evaluation.sharing import is_first


def work():
    """Score and continue rows; return what was found and how many passes this process made for scores."""
    tokenizer, model = byte_level_tokenizer(), tiny_model()
    rows = [torch.randint(2, 300, (6 + 3 * n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(9)]
    examples = [Example(n, ids, [IGNORE] * 3 + ids[3:], 3, 3) for n, ids in enumerate(rows)]
    told = {"scores": [], "answers": []}
    scores = score(model, examples, pad_id=tokenizer.pad_token_id, batch_tokens=40, progress=told["scores"].append)
    prompts = [ids[:4] for ids in rows]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=5, batch_rows=2, known=[[7]] + [[]] * 8,
        progress=told["answers"].append,
    )  # fmt: skip
    return {
        "nll": [found.nll for found in scores],
        "logprobs": [found.logprobs.tolist() for found in scores],
        "answers": [list(answer.ids) for answer in answers],
        "told": {name: [sum(counts), len(counts)] for name, counts in told.items()},
        "first": is_first(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(work()))
    arguments = ["--model", sys.argv[2], "--forget", sys.argv[3], "--output", str(folder / "eval")]
    assert main(["evaluate", *arguments]) == 0
    dist.destroy_process_group()
