"""What `loku attack` works on: three models and their rows, from a run folder or options, checked before loading."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loku.adapters.export import load_lora
from loku.attacks.suite import Attack, Setting, plan
from loku.config import AttackOptions
from loku.data.encoding import Encoder
from loku.data.prompts import resolve_template
from loku.data.records import Record, check_disjoint
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.files import read_object, sha256_file, sha256_json
from loku.models import check_model_source, load_config, load_tokenizer

ROWS = ("forget", "retain", "holdout", "unrelated")


@dataclass(frozen=True)
class Sources:
    """Models by role (a folder or hub id; with an adapter the unlearned model is the target with it) and rows by set.

    `rows` are what `load_records` takes; `forget_sha256` is that of the rows the run unlearned, when it is known.
    """

    models: dict[str, str | None]
    rows: dict[str, str | None]
    adapter: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    forget_sha256: str | None = None

    def request(self, setting: Setting, options: AttackOptions) -> dict[str, dict[str, Any]]:
        """Return what decides all attacks: models and rows with their hashes, and the settings they share."""
        models: dict[str, Any] = {
            role: {"name": name, "sha256": weights_id(name)} for role, name in self.models.items() if name
        }
        if self.adapter:
            models["unlearned"] = {"name": self.adapter, "sha256": weights_id(self.adapter)}
        data: dict[str, RecordSet | None] = {name: getattr(setting, name) for name in ROWS}
        return {
            "models": models,
            "data": {
                name: {"name": found.name, "sha256": found.sha256, "rows": len(found)}
                for name, found in data.items()
                if found is not None and name != "unrelated"  # its attacks know the rows they are on
            },
            "common": {
                "max_rows": options.max_rows, "retain_rows": options.retain_rows, "seed": options.seed,
                "max_length": setting.encoder.max_length, "template": setting.encoder.template.describe(),
                "dtype": options.dtype,
            },
        }  # fmt: skip


def weights_id(name: str) -> str:
    """Return a hash of a folder's weight files and adapter settings; of a hub id, of the id itself."""
    folder = Path(name)
    files = [
        file
        for pattern in ("*.safetensors", "*.bin", "adapter_config.json", "config.json")
        for file in sorted(folder.glob(pattern))
    ]
    return sha256_json([[file.name, sha256_file(file)] for file in files] if folder.is_dir() else name)


def find_sources(options: AttackOptions) -> Sources:
    """Return models and rows: from the run folder, where options do not say otherwise.

    Raises InputError when something is missing, does not exist, or contradicts something else.
    """
    sources = _of_run(options) if options.run else _of_options(options)
    given = {name: getattr(options, name) for name in ROWS}
    rows = {name: given.get(name) or sources.rows.get(name) for name in ROWS}
    models = sources.models | {"retain_only": options.retain_only_model or sources.models.get("retain_only")}
    if not rows["forget"]:
        raise InputError("--forget is missing.", "Give the rows that had to go.")
    for option, name in (
        ("--model", models["target"]),
        ("--retain-only-model", models["retain_only"]),
        ("--other-base", options.other_base),
    ):
        if name:
            check_model_source(name, option=option)
            load_config(name, trust_remote_code=options.trust_remote_code, option=option)
    if options.other_base and not sources.adapter:
        raise InputError("--other-base was given, but there is no adapter.", "Leave it out.")
    if sources.adapter:
        load_lora(sources.adapter)
    return dataclasses.replace(sources, models=models, rows=rows)


def _of_options(options: AttackOptions) -> Sources:
    name = check_model_source(options.model)
    if options.adapter and options.target_model:
        raise InputError("--adapter and --target-model were both given.", "Give one: with an adapter --model is it.")
    if options.adapter:
        return Sources({"target": name, "unlearned": name}, {}, options.adapter)
    if not options.target_model:
        raise InputError(
            "--target-model is missing.", "Give the model before unlearning, or --adapter when --model is that."
        )
    return Sources({"target": check_model_source(options.target_model, option="--target-model"), "unlearned": name}, {})


def _of_run(options: AttackOptions) -> Sources:
    folder = Path(str(options.run))
    for name in ("model", "adapter", "target_model"):
        if getattr(options, name):
            raise InputError(
                f"A run folder and --{name.replace('_', '-')} were both given.", "Give one: a run names its own models."
            )
    if not (folder / "run.json").is_file() or not (folder / "config.yaml").is_file():
        raise InputError(f"'{options.run}' is not a run folder.", "Give one written by `loku unlearn`, or --model.")
    record = read_object(folder / "run.json", "Restore it from a copy.")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if record.get("status") != "finished":
        raise InputError(f"The run '{options.run}' is not finished.", "Finish it: give its command again.")
    if not settings.get("model"):
        raise InputError(
            "The run's model was given in memory.", "Save it, and give --model, --adapter and the rows instead."
        )
    full = settings.get("tune") == "full"
    retain_only = settings.get("retain_only_model")
    is_model = retain_only and (Path(retain_only) / "config.json").is_file()
    rows = {name: settings.get(name) for name in ("forget", "retain", "holdout")} | {"unrelated": settings["general"]}
    if rows["retain"] == "self":
        rows["retain"] = None
    target = str(settings["model"])
    return Sources(
        {
            "target": target,
            "unlearned": str(folder / "model") if full else target,
            "retain_only": retain_only if is_model else None,
        },
        rows,
        None if full else str(folder / "adapter"),
        settings,
        record.get("data", {}).get("forget", {}).get("sha256"),
    )


def load_setting(sources: Sources, options: AttackOptions) -> Setting:
    """Read rows and tokenizer, and put together what the attacks share.

    Raises InputError for rows that cannot be used, for other forget rows than the run's, for a forget row among the
    retain rows, and for models whose vocabularies differ.
    """
    of_run = sources.settings
    rows = read_rows(sources, options)
    target = str(sources.models["target"])
    tokenizer = load_tokenizer(target, trust_remote_code=options.trust_remote_code)
    others = {"--retain-only-model": sources.models.get("retain_only"), "--other-base": options.other_base}
    if sources.adapter is None:
        others["--model"] = sources.models["unlearned"]
    for option, other in others.items():
        if other and load_tokenizer(other, trust_remote_code=options.trust_remote_code).get_vocab() != (
            tokenizer.get_vocab()
        ):
            raise InputError(f"{option} '{other}' has another vocabulary than the target model.", "Give one that fits.")
    template = resolve_template(tokenizer, target, options.prompt_template or of_run.get("prompt_template"))
    length = options.max_length
    if of_run and options.max_length == AttackOptions.max_length:
        length = of_run.get("max_length", length)
    setting = new_setting(tokenizer, Encoder(tokenizer, template, length), rows, options)
    if sources.adapter:
        setting.adapted = not_yet
    return setting


def read_rows(sources: Sources, options: AttackOptions) -> dict[str, RecordSet]:
    """Read every set that there is, cut to `max_rows`. Raises InputError as `load_setting` does for rows."""
    data_dir = options.data_dir or sources.settings.get("data_dir")
    rows = {
        name: _cut(load_records(source, option=f"--{name}", data_dir=data_dir), options.max_rows, sources, name)
        for name, source in sources.rows.items()
        if source
    }
    for name in ("retain", "holdout", "unrelated"):
        if name in rows:
            check_disjoint(rows["forget"], rows[name])
    return rows


def new_setting(tokenizer: Any, encoder: Any, rows: dict[str, RecordSet], options: AttackOptions) -> Setting:
    """Return the setting of rows and options; without tokenizer and encoder it serves to plan alone."""
    names = set(AttackOptions.fields()) & {item.name for item in dataclasses.fields(Setting)} - set(ROWS)
    shared: dict[str, Any] = {name: getattr(options, name) for name in names}
    shared["prune_rates"] = _numbers("--prune-rates", options.prune_rates, below=1.0)
    shared["adapter_scales"] = _numbers("--adapter-scales", options.adapter_scales)
    return Setting(tokenizer, encoder, **rows, **shared)  # type: ignore[arg-type]


def every_attack(options: AttackOptions) -> list[Attack]:
    """Return the plan of attacks that options allow for, to know their names before there are rows or models."""
    rows = RecordSet("", (Record(0, text="one"), Record(1, text="another")), "", "memory")
    return plan(new_setting(None, None, {"forget": rows}, options))


def not_yet(*_: Any) -> Any:
    """Stand for the adapter, in a plan, before it is loaded."""
    raise RuntimeError("the adapter is not loaded yet")  # replaced before any attack runs


def _cut(records: RecordSet, most: int, sources: Sources, name: str) -> RecordSet:
    known = sources.forget_sha256
    if name == "forget" and known and records.sha256 != known:
        raise InputError(
            f"--forget '{records.name}' is not what the run unlearned (its rows differ).", "Give the run's own rows."
        )
    return records if len(records) <= most else dataclasses.replace(records, records=records.records[:most])


def _numbers(option: str, text: str, *, below: float | None = None) -> tuple[float, ...]:
    """Return the numbers of a comma-separated option."""
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{option} '{text}' holds something else than numbers.", "Give them like 0.1,0.3.") from None
    if any(value <= 0 for value in values) or (below is not None and any(value >= below for value in values)):
        raise InputError(f"{option} '{text}' is out of range.", "Give numbers above 0, and shares below 1.")
    return values
