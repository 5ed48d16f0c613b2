"""Run by test_trainer.py under torch.distributed.run: the same training on one or several processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from test_trainer import trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, combine, batch_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    options = {"batch_size": batch_size, "epochs": 3.0, "learning_rate": 3e-3, "save_steps": -1}
    trainer(folder, options=options, forget_loss="grad_ascent", combine=combine).train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
