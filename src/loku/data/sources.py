"""Rows from wherever they are: files, dataset folders, the hub, benchmarks by name, or memory."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loku.data.records import Record, parse_rows
from loku.errors import InputError
from loku.files import sha256_json

BENCHMARKS = {"tofu": "locuslab/TOFU"}
LOCAL_BENCHMARKS = ("tdec", "lume", "muse")  # by name under the data folder alone: no data set of the hub holds them so
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SLICE = re.compile(r"^(?P<name>.+)\[(?P<start>\d*):(?P<stop>\d*)\]$")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.:\[\]%+-]+)?$")


@dataclass(frozen=True)
class RecordSet:
    """Records with their name, where they came from, and a hash of the rows they were made of."""

    name: str
    records: tuple[Record, ...]
    sha256: str
    origin: str  # "file", "folder", "hub" or "memory"

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, item: int) -> Record:
        return self.records[item]


def load_records(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    option: str = "--forget",
    data_dir: str | Path | None = None,
) -> RecordSet:
    """Load rows as records.

    `source` is one of: a file (.jsonl, .json, .csv, .parquet; .gz on any but the last), a folder written by
    `datasets.save_to_disk`, a hub id `owner/name[/config][:split]`, a benchmark such as `tofu/forget10` (a file of
    that name under `data_dir`, by default $LOKU_DATA_DIR, else from the hub; `tdec/...`, `lume/...` and `muse/...` only
    from there), or rows in memory. A trailing `[start:stop]` selects
    rows; records keep their index in the whole source.

    Raises InputError when nothing usable is found; `option` names the source in errors.
    """
    if not isinstance(source, str | Path):
        return _record_set(list(source), "rows in memory", option, "memory", 0)
    name, start, stop = _slice(str(source), option)
    rows, origin = _rows(name, option, data_dir or os.environ.get("LOKU_DATA_DIR"))
    if start or stop is not None:
        rows = rows[start:stop]
        if not rows:
            raise InputError(f"{option} '{source}' selects no rows.", "Give a slice [start:stop] inside the source.")
    return _record_set(rows, str(source), option, origin, start)


@dataclass(frozen=True)
class Rows:
    """Rows as they are, for benchmarks whose columns are their own; `sha256` is that of the rows."""

    name: str
    rows: tuple[dict[str, Any], ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.rows)


def load_rows(
    source: str | Path, columns: Sequence[str], *, option: str = "--data", data_dir: str | Path | None = None
) -> Rows:
    """Load rows that have certain columns of text, from anywhere that `load_records` takes.

    Other columns are kept. Raises InputError when nothing usable is found, and for a column that is absent or no text.
    """
    name, start, stop = _slice(str(source), option)
    rows = _rows(name, option, data_dir or os.environ.get("LOKU_DATA_DIR"))[0][start:stop]
    if not rows:
        raise InputError(f"{option} '{source}' has no rows.", f"Give rows with the columns {', '.join(columns)}.")
    for index, row in enumerate(rows):
        for column in columns:
            if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
                raise InputError(
                    f"{option} '{source}': row {index} has no text in the column '{column}'.",
                    f"Give rows with the columns {', '.join(columns)}.",
                )
    return Rows(str(source), tuple(dict(row) for row in rows), sha256_json([dict(row) for row in rows]))


def _record_set(rows: list[Any], name: str, option: str, origin: str, offset: int) -> RecordSet:
    records = parse_rows(rows, f"{option} '{name}'" if origin != "memory" else f"{option} ({name})")
    if offset:
        import dataclasses

        records = [dataclasses.replace(record, index=record.index + offset) for record in records]
    try:
        digest = sha256_json([dict(row) for row in rows])
    except UnicodeEncodeError as error:
        raise InputError(
            f"{option} '{name}' holds half of a surrogate pair, which is no character.", "Mend the text that has it."
        ) from error
    return RecordSet(name, tuple(records), digest, origin)


def _slice(source: str, option: str) -> tuple[str, int, int | None]:
    match = SLICE.match(source)
    if match is None:
        return source, 0, None
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _rows(name: str, option: str, data_dir: str | Path | None) -> tuple[list[Any], str]:
    path = Path(name)
    if path.is_file():
        return _read_file(path, option), "file"
    if path.is_dir():
        return _read_folder(path, option), "folder"
    benchmark, _, config = name.partition("/")
    local = _benchmark_file(name, data_dir) if config and not _names_a_file(name) else None
    if local is not None:
        return _read_file(local, option), "file"
    if benchmark in BENCHMARKS and config:
        return _read_hub(BENCHMARKS[benchmark], config, "train", option, name), "hub"
    if benchmark in LOCAL_BENCHMARKS and config and not _names_a_file(name):
        raise InputError(
            f"{option} '{name}' is not there.",
            f"Set LOKU_DATA_DIR (or --data-dir) to a folder that holds '{name}.csv' or '{name}.jsonl'.",
        )
    if _names_a_file(name) or not HUB_ID.match(name):
        raise InputError(f"{option} '{name}' does not exist.", _near_files(path))
    dataset, _, split = name.partition(":")
    owner, repository, *rest = dataset.split("/")
    return _read_hub(f"{owner}/{repository}", rest[0] if rest else None, split or "train", option, name), "hub"


def _benchmark_file(name: str, data_dir: str | Path | None) -> Path | None:
    """Return the file of a benchmark by name in the folder of benchmark files, packed or not."""
    if data_dir is None:
        return None
    places = (Path(data_dir) / f"{name}{suffix}{packed}" for packed in ("", ".gz") for suffix in SUFFIXES)
    return next((place for place in places if place.is_file()), None)


def _names_a_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.removesuffix(".gz").endswith(SUFFIXES) or "\\" in name


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder '{path.parent}' either: check the path."
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(name) for name in near)} in the same folder?"
    return "Give a file (.jsonl, .json, .csv, .parquet), a dataset folder, a hub id owner/name, or tofu/forget10."


def _read_file(path: Path, option: str) -> list[Any]:
    if path.stat().st_size == 0:
        raise InputError(f"{option} '{path}' is empty.", "Give a file with rows.")
    name = path.name.removesuffix(".gz").lower()
    if name.endswith(".parquet"):
        return _read_parquet(path, option)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{option} '{path}' cannot be read: {error}.", "Give a whole file in UTF-8.") from error
    if name.endswith(".csv"):
        return _parse_csv(text, path, option)
    if name.endswith((".jsonl", ".json")):
        return _parse_json(text, path, option)
    raise InputError(f"{option} '{path}' has no known ending.", f"Give one of {', '.join(SUFFIXES)}.")


def _parse_csv(text: str, path: Path, option: str) -> list[Any]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for index, row in enumerate(rows):
        if None in row:
            raise InputError(
                f"{option} '{path}': row {index} has more fields than the header.",
                "Put texts that hold commas into double quotes.",
            )
    return rows


def _parse_json(text: str, path: Path, option: str) -> list[Any]:
    """Parse a JSON array, or JSON lines split on newlines only (other separators may stand inside texts)."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise InputError(f"{option} '{path}' is not JSON: {error}.", "Mend the file.") from error
        return list(rows)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{option} '{path}': line {number} is not JSON ({error}).",
                "Write one JSON object a line, or one array.",
            ) from error
    return rows


def _read_parquet(path: Path, option: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"{option} '{path}' is not a Parquet file: {error}", "Give a whole Parquet file.") from error
    return rows


def _read_folder(path: Path, option: str) -> list[Any]:
    import datasets

    if not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        raise InputError(
            f"{option} '{path}' is a folder without a dataset.",
            "Give a folder written by datasets' save_to_disk, or a file inside it.",
        )
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        raise InputError(
            f"{option} '{path}' holds several splits ({', '.join(loaded)}).",
            f"Give one of them: '{path}/{next(iter(loaded))}'.",
        )
    return list(loaded)


def _read_hub(dataset: str, config: str | None, split: str, option: str, name: str) -> list[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # datasets and huggingface_hub raise subclasses of these for a missing dataset, config, split or network
        why = (str(error) or repr(error)).splitlines()[0].rstrip(". ")
        raise InputError(
            f"{option} '{name}' cannot be loaded from the hub: {why}.",
            "Check the name and the connection; or set LOKU_DATA_DIR (or --data-dir) to a folder that holds "
            f"'{name}.json', or give a local file.",
        ) from error
    return list(loaded)
