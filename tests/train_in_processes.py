"""Run by test_trainer.py and test_answer_trainer.py under torch.distributed.run: one process of a training."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from test_answer_trainer import answers
from test_trainer import trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, combine = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    if combine == "answers":
        answers(folder, batch_size=3)
    else:
        options = {"batch_size": 2, "epochs": 3.0, "learning_rate": 3e-3, "save_steps": -1}
        bound = 5.5 if combine == "primal-dual" else None
        trainer(folder, options=options, forget_loss="grad_ascent", combine=combine, retain_bound=bound).train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
