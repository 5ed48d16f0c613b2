"""Several processes share work: each does every n-th part, and all of them get everything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

Part = TypeVar("Part")
Place = TypeVar("Place")
Found = TypeVar("Found")


@contextmanager
def several_processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, and part at the end. Alone this does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_share(parts: Sequence[Part]) -> Sequence[Part]:
    """Return the parts that fall to this process: every n-th of n processes, all without torch.distributed."""
    if not _several():
        return parts
    return parts[dist.get_rank() :: dist.get_world_size()]


def gathered(found: dict[Place, Found]) -> dict[Place, Found]:
    """Return what all processes found, on each of them. All of them have to call it."""
    if not _several():
        return found
    everything: list[dict[Place, Found]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    return {place: item for part in everything for place, item in part.items()}


def is_first() -> bool:
    """Return whether this process writes files and speaks: the only one, or the first of several."""
    return not _several() or dist.get_rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
