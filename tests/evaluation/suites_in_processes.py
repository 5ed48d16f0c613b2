"""Run by test_suite_cache.py as one of two processes that share every suite's work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.distributed as dist

from builders import byte_level_tokenizer, tiny_model
from loku.config import EvaluateOptions
from loku.data.prompts import TagTemplate
from loku.evaluation.cache import BatchCache
from loku.suites import Loaded
from suite_cases import cases, measure, small_batches

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    small_batches(pytest.MonkeyPatch())
    found = {"figures": {}, "batches": {}}
    for name, values in cases(sys.argv[2], sys.argv[3]).items():
        cache = folder / f"cache-{name}-{rank}"  # each its own, so that its files tell what this process did
        loaded = Loaded(tiny_model(), byte_level_tokenizer(), TagTemplate(), "a", BatchCache(cache, "a"))
        found["figures"][name] = measure(EvaluateOptions(**values), loaded)
        found["batches"][name] = len(list(cache.iterdir()))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
