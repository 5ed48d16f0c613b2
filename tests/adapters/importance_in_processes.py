"""Run by test_importance.py under torch.distributed.run: importance on one or several processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from test_importance import PAD, examples

from builders import tiny_model
from loku.adapters.importance import estimate_importance
from loku.adapters.layers import target_layers
from loku.adapters.variance import estimate_variance

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = tiny_model()
    layers = target_layers(model)
    folder = Path(sys.argv[1])
    rank = torch.distributed.get_rank()
    for mode in ("default", "official"):
        common = {"pad_id": PAD, "mode": mode, "batch_size": 2}
        importance = estimate_importance(
            model, layers, examples(7), examples(9, 1), partial=folder / "partial", save_seconds=0, **common
        )
        importance.save(folder / f"{mode}-{rank}.safetensors")
        variance = estimate_variance(model, layers, examples(7), examples(9, 1), rank=4, scaling=2.0, **common)
        variance.save(folder / f"variance-{mode}-{rank}.safetensors")
    torch.distributed.destroy_process_group()
