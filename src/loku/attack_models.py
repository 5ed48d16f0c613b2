"""Attacks on one model: which to run, the model they are run on, and a store that takes each result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from loku.adapters.export import PortableLora, check_fits_base, merged_weights
from loku.attack_store import AttackStore
from loku.attacks.suite import FAMILIES, Attack, Setting
from loku.config import ModelOptions
from loku.errors import InputError, LokuError, suggestion
from loku.models import load_model
from loku.progress import Update


def named(text: str, planned: Sequence[Attack]) -> list[Attack]:
    """Return the attacks that a comma-separated option names, by family or one by one, and the plain measurement.

    Raises InputError for an unknown name, and when nothing is named.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    valid = ["all", *FAMILIES, *(item.name for item in planned)]
    for name in names:
        if name not in valid:
            raise InputError(f"--attacks '{name}' is not known.", suggestion(name, valid))
    if not names:
        raise InputError("--attacks names nothing.", suggestion("", valid))
    return [item for item in planned if item.name == "none" or {"all", item.family, item.name} & set(names)]


def choose(text: str, planned: Sequence[Attack]) -> list[Attack]:
    """Return the attacks that an option names and that can run; see `named`.

    Those that lack something are left out of "all" and of a family. Raises InputError for a name of which nothing can
    run.
    """
    for name in text.split(","):
        found = named(name, planned) if name.strip() else []
        wanted = [item for item in found if name.strip() in ("all", item.family, item.name)]
        if wanted and all(item.missing for item in wanted):
            raise InputError(
                f"--attacks '{name.strip()}' cannot run: {wanted[0].missing}.", "Give that, or leave it out."
            )
    return [item for item in named(text, planned) if not item.missing]


def run_attacks(
    setting: Setting,
    model: PreTrainedModel,
    role: str,
    attacks: Sequence[Attack],
    store: AttackStore,
    *,
    update: Update = lambda *_: None,
    failed: Callable[[str, str], Any] = lambda *_: None,
) -> None:
    """Run on a model what the store lacks of the attacks for its role, each into the store as soon as it is done.

    An attack that fails is noted in the store and told to `failed` (name and reason); the others go on.
    """
    missing = [item for item in attacks if role in item.roles and not store.has(item.name, role, len(setting.kept))]
    for place, item in enumerate(missing):
        update(place, len(missing), item.name)
        start = time.monotonic()
        try:
            result = item.run(setting, model)
        except Exception as error:  # libraries raise what they like of odd models
            reason = error.given if isinstance(error, LokuError) else repr(error)
            store.fail(item, role, reason)
            failed(item.name, reason)
            continue
        kept = {"kept": len(setting.kept)} if "beside" in result else {}
        store.add(item, role, result | kept | {"seconds": round(time.monotonic() - start, 3)})
    update(len(missing), len(missing), "")


def load(name: str, options: ModelOptions) -> PreTrainedModel:
    """Load a model as the options say."""
    return load_model(name, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code)


def merged_model(base: str, lora: PortableLora, scale: float, options: ModelOptions) -> PreTrainedModel:
    """Load a base with an adapter, scaled, merged in, in the base's type, as it would be released."""
    model = load(base, options)
    check_fits_base(model, lora, base)
    model.load_state_dict(merged_weights(model, lora.scaled(scale)))
    return model


def adapter_maker(
    lora: PortableLora, target: str, options: ModelOptions
) -> Callable[[float, str | None], PreTrainedModel]:
    """Return what adapter attacks ask for models: `(scale, base)`, without a base the target."""
    return lambda scale, base: merged_model(base or target, lora, scale, options)
