"""A checked job: model, rows and template, encoded. Everything that can be refused is refused here."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.adapters.fisher import layer_groups
from loku.adapters.initialisers import initialiser_of
from loku.adapters.layers import check_rank, target_layers
from loku.config import UnlearnOptions
from loku.data.encoding import EncodedSet, Encoder, Example
from loku.data.prompts import ChatTemplate, TagTemplate, resolve_template
from loku.data.records import check_disjoint
from loku.data.refusals import REFUSALS, encode_alternates, read_refusals
from loku.data.sources import RecordSet, load_records
from loku.data.spans import select_spans
from loku.errors import InputError
from loku.files import check_output_file
from loku.forward import text_config
from loku.meeting import Meeting
from loku.models import check_fits, check_model_source, check_tokenizer, load_model, load_tokenizer
from loku.objective import forget_term, retain_term
from loku.progress import console
from loku.retain_self import sample_retain as sample_from_model
from loku.runs import check_tracker

SELF = "self"


@dataclass(frozen=True)
class UnlearnResult:
    """What `unlearn` gives back: the model with its adapters on, and the run folder."""

    model: PeftModel | PreTrainedModel
    folder: Path
    record: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The folder of the exported ordinary LoRA (with tune="full": of the new model)."""
        return self.folder / ("model" if (self.folder / "model").is_dir() else "adapter")


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked: nothing that can be refused is left to refuse once the work starts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: TagTemplate | ChatTemplate
    forget: RecordSet
    retain: RecordSet | None
    encoder: Encoder
    encoded_forget: EncodedSet
    encoded_retain: EncodedSet | None
    alternates: list[list[Example]] | None = None  # other answers to the forget prompts
    retain_alternates: list[list[Example]] | None = None

    def trained_examples(self) -> list[Example]:
        """Return the sequences of the forget and retain rows."""
        sets = [found.examples for found in (self.encoded_forget, self.encoded_retain) if found is not None]
        return [example for found in sets for example in found]

    def examples(self) -> list[Example]:
        """Return every sequence that training reads: of the rows, and of other answers to their prompts."""
        draws = [*(self.alternates or ()), *(self.retain_alternates or ())]
        return [*self.trained_examples(), *(example for group in draws for example in group)]


def load_rows(options: UnlearnOptions) -> tuple[RecordSet, RecordSet | str | None]:
    """Read the forget and retain rows that the options name. Raises InputError when either is missing."""
    if not options.forget:
        raise InputError("--forget is missing.", "Give the rows that must go: a file, a dataset folder or a hub id.")
    forget = load_records(options.forget, option="--forget", data_dir=options.data_dir)
    retain: RecordSet | str | None = options.retain
    if options.retain and options.retain != SELF:
        retain = load_records(options.retain, option="--retain", data_dir=options.data_dir)
    return forget, retain


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Any,
    retain: Any,
    options: UnlearnOptions,
) -> Job:
    """Check everything and encode the rows. Raises InputError; nothing is written or trained."""
    check_tokenizer(tokenizer)
    check_tracker(options.report_to)
    if options.importance:
        check_output_file(options.importance, "Give a file name ending in .safetensors.", option="--importance")
    _warn_of_half_precision(model, options)
    alternates_needed = check_objective(model, options)
    if options.level_model is not None:
        _check_level_model(options, tokenizer)
    template = resolve_template(tokenizer, options.model or _folder_of(model), options.prompt_template)
    forget = as_records(forget, "--forget", options)
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise InputError("The model carries an adapter already.", "Give it without: `model = model.unload()`.")
    if options.tune == "lora":
        layers = target_layers(model, options.targets)
        check_rank(layers, options.rank)
        layer_groups(layers, options.importance_memory)
    if retain is None and options.retain_weight:
        raise InputError(
            "--retain is missing.",
            "Give rows that must stay, or `--retain self` to sample them from the model itself, or "
            "`--retain-weight 0 --init lora` to do without (the model then forgets how to speak).",
        )
    if retain is None and options.retain_bound is not None:
        raise InputError(
            "--retain-bound bounds the loss on the retain rows, and --retain is missing.",
            "Give --retain, or leave it out.",
        )
    check_start(options, has_retain=retain is not None)
    encoder = Encoder(tokenizer, template, options.max_length)
    encoded_forget = with_spans(encoder.encode_records(forget, option="--forget"), forget, tokenizer)
    if isinstance(retain, str) and retain == SELF:
        retain = sample_from_model(
            model, tokenizer, template, forget.records, rows=options.self_rows, length=options.self_length,
            seed=options.seed,
        )  # fmt: skip
    elif retain is not None:
        retain = as_records(retain, "--retain", options)
        check_disjoint(forget, retain)
    encoded_retain = encoder.encode_records(retain, option="--retain") if retain is not None else None
    refusals = read_refusals(options.refusals) if options.refusals else REFUSALS
    others: list[Any] = [None, None]
    for side, (records, option) in enumerate(((forget, "--forget"), (retain, "--retain"))):
        if alternates_needed[side] and records is not None:
            others[side] = encode_alternates(
                encoder, records.records, refusals=refusals, seed=options.seed, option=option
            )
    job = Job(model, tokenizer, template, forget, retain, encoder, encoded_forget, encoded_retain, *others)
    check_fits(model, tokenizer, max(len(example.input_ids) for example in job.examples()))
    return job


def load_target(options: UnlearnOptions) -> PreTrainedModel:
    """Load the model that is to forget, in the type that it is trained in.

    With --dtype auto that is the stored one, but float32 where all weights are trained (half precision swallows small
    updates), and bfloat16 for what is stored in float16, in which small gradients vanish: then `options.dtype` says so
    from here on, so that the run's other models are loaded alike.
    """
    dtype = "float32" if options.tune == "full" and options.dtype == "auto" else options.dtype
    model = load_model(
        str(options.model), dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    if dtype == "auto" and model.dtype == torch.float16:
        console.print("stored in float16, in which small gradients vanish: trained in bfloat16 (or give --dtype)")
        options.dtype = "bfloat16"
        return load_target(options)  # not `.to`, which would round the rotary frequencies, too
    return model


def _warn_of_half_precision(model: PreTrainedModel, options: UnlearnOptions) -> None:
    if model.dtype == torch.float16:
        print("warning: in float16 small gradients vanish; give the model in bfloat16 or float32", file=sys.stderr)
    elif options.tune == "full" and model.dtype == torch.bfloat16:
        print("warning: weights in bfloat16 swallow small updates; give the model in float32", file=sys.stderr)


def _check_level_model(options: UnlearnOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a level model that reads other tokens."""
    theirs = load_tokenizer(str(options.level_model), trust_remote_code=options.trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--level-model '{options.level_model}' has another vocabulary than the target model.",
            "Give one that was trained from the same model and tokenizer.",
        )


def _folder_of(model: PreTrainedModel) -> str | None:
    """Return the folder that a model in memory was loaded from, or None."""
    name = str(getattr(model.config, "name_or_path", "") or "")
    return name if name and Path(name).is_dir() else None


def check_start(options: UnlearnOptions, *, has_retain: bool) -> None:
    """Raise InputError where the initialiser or the penalty lacks rows, or has options that it does not take."""
    if options.tune != "lora":
        if options.orthogonality:
            raise InputError("--orthogonality is of no use with --tune full.", "It looks at the adapter: leave it out.")
        return
    initialiser = initialiser_of(options.init)
    initialiser.values(options.init_options)
    if has_retain:
        return
    if initialiser.needs:
        raise InputError(
            f"--init {options.init} compares the forget rows with retain rows, and --retain is missing.",
            "Give --retain, or start without importance: --init lora.",
        )
    if options.orthogonality:
        raise InputError("--orthogonality looks at the retain rows, and --retain is missing.", "Give --retain.")


def with_spans(encoded: EncodedSet, records: RecordSet, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
    """Give the tokens of rows with `forget_spans` their weights; all tokens of other rows count."""
    spans = {record.index: record.forget_spans for record in records if record.forget_spans}
    if not spans:
        return encoded
    examples = []
    for index, group in itertools.groupby(encoded.examples, key=lambda example: example.index):
        found = list(group)
        examples += select_spans(tokenizer, found, spans[index], row=index) if index in spans else found
    return dataclasses.replace(encoded, examples=examples)


def check_objective(model: PreTrainedModel, options: UnlearnOptions) -> tuple[bool, bool]:
    """Check losses, their options and how they meet. Returns which sides compare with other answers.

    Raises InputError for what does not exist, or not for this model.
    """
    forget, retain = (
        forget_term(options.forget_loss, options.forget_options),
        retain_term(options.retain_loss, options.retain_options),
    )
    Meeting.named(options.combine, bound=options.retain_bound, rate=options.dual_rate)
    layers = text_config(model).num_hidden_layers
    if options.layer is not None and not -layers <= options.layer < layers:
        raise InputError(f"--layer {options.layer} does not exist: the model has {layers}.", "Count from 0 or from -1.")
    if options.tune_layers is not None:
        if options.tune != "full":
            raise InputError("--tune-layers is of no use with --tune lora.", "Add --tune full, or choose --targets.")
        if options.tune_layers > layers:
            raise InputError(
                f"--tune-layers {options.tune_layers} is more than the model's {layers} layers.", "Give fewer."
            )
    if options.level_model is not None:
        if options.forget_loss != "ihl":
            raise InputError("--level-model is of no use without ihl.", "Choose --forget-loss ihl, or leave it out.")
        check_model_source(options.level_model, option="--level-model")
    return forget.needs("alternate"), retain.needs("alternate")


def as_records(rows: Any, option: str, options: UnlearnOptions) -> RecordSet:
    """Return rows given in any form as a record set."""
    return rows if isinstance(rows, RecordSet) else load_records(rows, option=option, data_dir=options.data_dir)
