"""`loku export`: what others load, an ordinary LoRA, a truncated one or a merged model, with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loku.adapters.export import PortableLora, check_fits_base, load_lora, save_merged, truncate
from loku.config import ExportOptions
from loku.data.prompts import FILE_NAME as TEMPLATE
from loku.data.prompts import Template, resolve_template, save_template
from loku.errors import InputError
from loku.files import check_output_folder, read_object, replace_file
from loku.models import load_model, load_tokenizer
from loku.progress import console
from loku.record import FILE as RECORD
from loku.report.artefacts import RESULT_FILES
from loku.report.card import write_model_card
from loku.report.words import release_note

RESTORE = "Restore it from a copy, or export another run."
SERVING_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as max_lora_rank


def export(options: ExportOptions) -> Path:
    """Write an adapter or merged model from a run folder (or an adapter folder) into a new folder.

    A merged model is scored again in the type it is stored in; a warning says when its forget scores moved, because
    half precision can swallow small updates. Raises InputError before any work when something cannot be used.
    """
    folder, run = _source(options)
    base_name = (
        options.model
        or run.get("model", {}).get("name")
        or read_object(folder / "adapter_config.json", RESTORE).get("base_model_name_or_path")
    )
    output = _output(options)
    measured = {role: _results(options, name) for role, name in RESULT_FILES.items()}
    lora = load_lora(folder)
    if options.form == "truncated" and options.rank is None:
        raise InputError("--rank is missing.", f"Give the rank to keep, below {lora.rank}.")
    if options.form != "truncated" and options.rank is not None:
        raise InputError(f"--rank {options.rank} is of no use with --form {options.form}.", "Add --form truncated.")
    if options.form == "merged":
        if not base_name or base_name == "in memory":
            raise InputError("The base model is not known.", "Give it with --model.")
        _merge(lora, base_name, output, options)
    else:
        if options.form == "truncated":
            assert options.rank is not None
            truncated = truncate(lora, options.rank)
            lora = truncated.lora
            console.print(
                f"truncated to rank {lora.rank}: relative error {truncated.error:.4f} "
                f"(worst layer {truncated.worst:.4f}) of the weight change"
            )
        lora.save(output, base_model=None if base_name == "in memory" else base_name)
        serving = next((rank for rank in SERVING_RANKS if rank >= lora.rank), None)
        console.print(f"ordinary LoRA of rank {lora.rank} written to {output} (vLLM: --max-lora-rank {serving})")
        console.print(release_note(run))
    record = copy_record(Path(options.run or ""), output)
    write_model_card(
        output,
        run=run,
        results=measured["unlearned"],
        target=measured["target"],
        retain_only=measured["retain_only"],
        kind="merged" if options.form == "merged" else "adapter",
        base_model=str(base_name or "unknown"),
        record=record,
    )
    return output


def copy_record(run: Path, output: Path) -> str | None:
    """Put a run's record beside what is handed over, never its salt. Returns its name, or None where there is none."""
    if not (run / RECORD).is_file():
        return None
    replace_file(output / RECORD, lambda temporary: Path(temporary).write_bytes((run / RECORD).read_bytes()))
    return RECORD


def _source(options: ExportOptions) -> tuple[Path, dict[str, Any]]:
    given = Path(options.run or "")
    if not given.is_dir():
        raise InputError(
            f"'{options.run}' is not a folder.", "Give a run folder of `loku unlearn`, or an adapter folder."
        )
    if (given / "adapter" / "adapter_config.json").is_file():
        return given / "adapter", _record(given)
    if (given / "model").is_dir():
        raise InputError(
            f"'{options.run}' was run with --tune full.",
            "Its `model` folder is the result: there is no adapter to export.",
        )
    if (given / "adapter_config.json").is_file():
        return given, _record(given.parent)
    raise InputError(f"'{options.run}' holds no adapter.", "Give a run folder that finished, or an adapter folder.")


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    return read_object(file, RESTORE) if file.is_file() else {}


def _output(options: ExportOptions) -> Path:
    if not options.output:
        raise InputError("--output is missing.", "Give a new folder to write.")
    output = check_output_folder(options.output, "Give a new folder to write.")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(
            f"--output '{options.output}' is not empty.", "Choose a new folder: nothing there is overwritten."
        )
    return output


def _results(options: ExportOptions, name: str) -> dict[str, Any] | None:
    file = Path(options.run or "") / name
    return read_object(file, RESTORE) if file.is_file() else None


def _template(options: ExportOptions, base_name: str, tokenizer: Any) -> Template:
    """Return the template that the run trained with, else that of the base."""
    own = Path(options.run or "")
    return resolve_template(tokenizer, own if (own / TEMPLATE).is_file() else base_name)


def _merge(lora: PortableLora, base_name: str, output: Path, options: ExportOptions) -> None:
    base = load_model(base_name, dtype=options.dtype, device="cpu", trust_remote_code=options.trust_remote_code)
    check_fits_base(base, lora, base_name)
    tokenizer = load_tokenizer(base_name, trust_remote_code=options.trust_remote_code)
    save_merged(base, lora, output)
    tokenizer.save_pretrained(output)
    save_template(_template(options, base_name, tokenizer), output)
    stored = str(base.dtype).removeprefix("torch.")
    del base
    console.print(f"merged model written to {output} in {stored}")
    if options.rescore:
        from loku.assessment import rescore_merged

        rescore_merged(output, options)
