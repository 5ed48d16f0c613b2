"""What finished batches gave, on disk: an interrupted evaluation goes on, and another one need not score again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from loku.data.encoding import Example
from loku.evaluation.passes import Statistics
from loku.files import json_line, replace_file

VERSION = 1  # of the files' format and of what the numbers mean


@dataclass(frozen=True)
class BatchCache:
    """A folder with one safetensors file for each batch, named by a hash of model, token ids, labels and limits.

    `key` names the model: hashes of its weights and of its adapter, and its type. Of scored batches numbers are kept,
    no token ids and no texts. Continuations are texts, so they are kept only with `keep_text`; what was made of
    them, as numbers, always.
    """

    folder: Path
    key: str
    keep_text: bool = False

    def scores(self, examples: Sequence[Example]) -> list[Statistics] | None:
        """Return the statistics of a batch, or None when they are not there, or not readable."""
        columns = self._read(self._scored(examples), Statistics._fields, len(examples))
        return None if columns is None else [Statistics(*item) for item in zip(*columns, strict=True)]

    def put_scores(self, examples: Sequence[Example], found: Sequence[Statistics]) -> None:
        """Keep the statistics of a batch; the file is whole or absent."""
        self._write(self._scored(examples), {n: [getattr(item, n) for item in found] for n in Statistics._fields})

    def continuations(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stops: Sequence[int]
    ) -> list[list[int]] | None:
        """Return how a batch of prompts goes on, or None."""
        if not self.keep_text:
            return None
        columns = self._read(self._file("continuations", prompts, limits, stops), ("ids",), len(prompts))
        return None if columns is None else [ids.tolist() for ids in columns[0]]

    def put_continuations(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stops: Sequence[int], found: list[list[int]]
    ) -> None:
        """Keep how a batch of prompts goes on, where texts may be kept."""
        if self.keep_text:
            ids = [np.array(item, dtype=np.int64) for item in found]
            self._write(self._file("continuations", prompts, limits, stops), {"ids": ids})

    def numbers(self, kind: str, rows: int, names: Sequence[str], *content: Any) -> list[dict[str, float]] | None:
        """Return named numbers of a batch of rows, or None; `content` is all that decides them. NaN: there is none."""
        columns = self._read(self._file(kind, list(names), *content), ("values",), rows)
        if columns is None:
            return None
        pairs = [zip(names, values.tolist(), strict=True) for values in columns[0]]
        return [{name: value for name, value in row if not math.isnan(value)} for row in pairs]

    def put_numbers(self, kind: str, found: Sequence[Mapping[str, float]], names: Sequence[str], *content: Any) -> None:
        """Keep named numbers of a batch of rows; a row may lack some."""
        values = [np.array([row.get(name, np.nan) for name in names], dtype=np.float64) for row in found]
        self._write(self._file(kind, list(names), *content), {"values": values})

    def _scored(self, examples: Sequence[Example]) -> Path:
        return self._file("scores", [[example.input_ids, example.labels] for example in examples])

    def _file(self, kind: str, *content: Any) -> Path:
        digest = hashlib.sha256(json_line([VERSION, self.key, *content]).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:32]}.safetensors"

    @staticmethod
    def _write(file: Path, columns: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        parts = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        parts["counts"] = np.array([len(item) for item in next(iter(columns.values()))])
        replace_file(file, lambda temporary: save_file(parts, temporary))

    @staticmethod
    def _read(file: Path, names: Sequence[str], rows: int) -> list[list[NDArray[Any]]] | None:
        if not file.is_file():
            return None
        try:
            parts = load_file(file)
            columns = [np.split(parts[name], np.cumsum(parts["counts"])[:-1]) for name in names]
        except (OSError, SafetensorError, KeyError, ValueError):  # half of a copy, say: it is computed again
            return None
        return columns if len(columns[0]) == rows else None
