"""Run by test_watching.py under torch.distributed.run: one of several processes of a watched training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from loku.levels import Level
from test_watching import trained, watched

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, aim = Path(sys.argv[1]), float(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    options = {"batch_size": 2, "epochs": 3.0, "learning_rate": 3e-3, "save_steps": -1}
    level = Level({"probability": aim}, ("probability",), "test")
    run, watch = watched(folder, every=1, options=options, level=level, stop=True, share=0.0)
    run.train()
    run.accelerator.wait_for_everyone()
    watch.restore(run.model)
    best = watch.best()
    total = sum(float(weights.double().sum()) for weights in trained(run.model).values())
    found = {"best": best.step if best else None, "weights": total, "steps": [row["step"] for row in watch.curve]}
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
