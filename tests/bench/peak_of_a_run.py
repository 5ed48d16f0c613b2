"""Run in a process of its own: train for two steps, print how much the peak of resident memory grew, in bytes.

    python peak_of_a_run.py unlearn|finetune <model folder> <tiny model folder> <rows> <output> [option=value ...]

A tiny run goes first: what the libraries themselves take is in the peak before the run that counts.
"""

import sys
from pathlib import Path

import torch
import yaml

from loku.config import FinetuneOptions, UnlearnOptions, resolve
from loku.runs import peak_memory_bytes
from loku.verbs import finetune, unlearn


def main(verb: str, model: str, tiny: str, rows: str, output: str, *more: str) -> None:
    torch.set_num_threads(1)
    given = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in more)}
    for name, folder in (("tiny", tiny), ("real", model)):
        before = peak_memory_bytes()
        options = given | {"model": folder, "output": str(Path(output) / name)}
        if verb == "finetune":
            finetune(resolve(FinetuneOptions, options | {"data": rows}, {}))
        else:
            unlearn(resolve(UnlearnOptions, options | {"forget": rows}, {}))
    sys.stdout.write(f"\ngrown {peak_memory_bytes() - before}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
