"""Half-done importance passes on disk, so that a killed one goes on where it was; and sums over processes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loku.files import json_line, replace_file

SAVE_SECONDS = 60.0
SAVE_SHARE = 20  # saving takes at most 1/20 of the time


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes: 0 of 1 unless torch.distributed is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place."""
    if world()[1] > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def agreed(values: Any) -> bool:
    """Whether all processes hold the same plain values."""
    _, size = world()
    if size == 1:
        return True
    gathered: list[Any] = [None] * size
    torch.distributed.all_gather_object(gathered, values)
    return all(value == gathered[0] for value in gathered)


@dataclass(frozen=True)
class Position:
    """Where a pass stands: layer group, phase, batches and supervised tokens done in the phase."""

    group: int = 0
    phase: str = "retain"
    batches: int = 0
    tokens: int = 0


@dataclass
class Journal:
    """Saves a pass every so often into a folder, atomically, one set of files per process.

    `fingerprint` says what the pass depends on: files of another one are ignored. Accumulators are saved in float32 as
    they are and batches keep their order, so a resumed pass gives the same bits as one that was never killed. Without
    a folder nothing is saved.
    """

    folder: Path | None
    fingerprint: str = ""
    seconds: float = SAVE_SECONDS
    clock: Callable[[], float] = time.monotonic
    _last: float = field(default=0.0, init=False)
    _cost: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def start(self) -> tuple[Position, dict[str, Tensor], dict[str, Tensor]]:
        """Return where to go on: position, finished layers' tensors and the group's F_r, where there are any.

        Processes that were killed on two sides of a phase's end start again: their sums cannot be told apart.
        """
        position, finished, retain = Position(), {}, {}
        state = self._read("state")
        if state is not None:
            position = Position(**json.loads(state[1]["position"]))
            done, fixed = self._read("finished"), self._read("retain")
            if position.group and done is not None:
                finished = done[0]
            if position.phase == "forget" and fixed is not None and fixed[1]["group"] == str(position.group):
                retain = fixed[0]
            if (position.group and not finished) or (position.phase == "forget" and not retain):
                position, finished, retain = Position(), {}, {}
        if not agreed((position.group, position.phase)):
            self.clear()
            return Position(), {}, {}
        return position, finished, retain

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the accumulators of the current phase with what was saved."""
        state = self._read("state")
        for name, tensor in (state[0] if state is not None else {}).items():
            tensors[name].copy_(tensor)

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        waited = self.clock() - self._last
        return self.folder is not None and waited >= max(self.seconds, SAVE_SHARE * self._cost)

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Save accumulators and position."""
        self._write("state", tensors, position=json_line(position.__dict__))

    def save_retain(self, group: int, tensors: Mapping[str, Tensor]) -> None:
        """Save a group's finished F_r, which does not change while its forget pass runs."""
        self._write("retain", tensors, group=str(group))

    def save_finished(self, tensors: Mapping[str, Tensor]) -> None:
        """Save what all groups so far have come to."""
        self._write("finished", tensors)

    def clear(self) -> None:
        """Remove this process's files, and the folder with the last of them."""
        if self.folder is None or not self.folder.is_dir():
            return
        for kind in ("state", "retain", "finished"):
            self._path(kind).unlink(missing_ok=True)
        # Other processes' files may still be there, or have gone with the folder already.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}-{world()[0]}.safetensors"

    def _write(self, kind: str, tensors: Mapping[str, Tensor], **metadata: str) -> None:
        if self.folder is None:
            return
        start = self.clock()
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata["fingerprint"] = self.fingerprint
        replace_file(self._path(kind), lambda temporary: save_file(kept, temporary, metadata=metadata))
        self._last = self.clock()
        self._cost = self._last - start

    def _read(self, kind: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        if self.folder is None or not self._path(kind).is_file():
            return None
        try:
            with safe_open(self._path(kind), framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    return None
                return {key: handle.get_tensor(key) for key in handle.keys()}, metadata  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError):
            return None
