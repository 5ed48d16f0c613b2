"""What every corpus shares: rows as JSON lines, and where the files of a benchmark lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.errors import InputError
from loku.files import write_text


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def data_file(name: str) -> str:
    """Return the path of a file such as `tdec/lm_extraction_32_0.csv` under $LOKU_DATA_DIR.

    Raises InputError when it is not there: these texts belong to others, and loku brings none of them.
    """
    base = os.environ.get("LOKU_DATA_DIR")
    path = Path(base or ".") / name
    if not base or not path.is_file():
        raise InputError(
            f"The corpus needs the file '{name}', and {f'{base!r} has none' if base else 'LOKU_DATA_DIR is not set'}.",
            "Set LOKU_DATA_DIR to a folder that holds it; docs/bench.md says where these texts are from.",
        )
    return str(path)
