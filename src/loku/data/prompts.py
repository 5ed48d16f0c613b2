"""How a question becomes a prompt: question and answer tags, or the tokenizer's own chat template."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError

from loku.errors import InputError, suggestion
from loku.files import write_json

FILE_NAME = "prompt_template.json"
DAY = datetime.datetime(2024, 7, 26)  # what templates that print the date (Llama 3) print, today and on any other day


@dataclass(frozen=True)
class TagTemplate:
    """Question and answer tags, by the names of TOFU's model configuration.

    A prompt is `question_start_tag + question + question_end_tag + answer_tag`. With `supervise_answer_tag` the answer
    tag's tokens are learnt and scored as well, as TOFU does for Phi-1.5.
    """

    question_start_tag: str = "Question: "
    question_end_tag: str = "\n"
    answer_tag: str = "Answer: "
    supervise_answer_tag: bool = False

    def question(self, question: str) -> str:
        """Return the tagged question, without the answer tag."""
        return f"{self.question_start_tag}{question}{self.question_end_tag}"

    def prompt(self, question: str) -> str:
        """Return everything before the answer."""
        return self.question(question) + self.answer_tag

    def describe(self) -> str:
        """Return the template in one line, for people."""
        supervised = ", answer tag supervised" if self.supervise_answer_tag else ""
        return f"tags {self.prompt('{question}')!r}{supervised}"


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template, with an optional system prompt."""

    system_prompt: str | None = None

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return a question as a conversation."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": question}]

    def describe(self) -> str:
        """Return the template in one line, for people."""
        system = f", system prompt {self.system_prompt!r}" if self.system_prompt else ""
        return f"the tokenizer's chat template{system}"


Template = TagTemplate | ChatTemplate


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, generation: bool, where: str) -> str:
    """Return a conversation as the tokenizer's chat template writes it, with `generation` up to the answer to come.

    Reasoning is off: a template that writes an empty thinking block before an answer (Qwen3's) puts it into the
    prompt, where it belongs, and templates that do not know the variable ignore it. Today is always 26 July 2024, so
    that a run means the same tomorrow. Raises InputError, naming `where`,
    when the template refuses the conversation, as many do with a system turn.
    """
    try:
        with _same_day():
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False,
                date_string=DAY.strftime("%d %b %Y"),
            )  # fmt: skip
    except TemplateError as error:
        raise InputError(
            f"{where}: the tokenizer's chat template refuses the conversation ({error}).",
            "Give the turns that it takes, another tokenizer.chat_template, or tags by --prompt-template.",
        ) from error
    return text


class _Day(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        """Return the day on which all prompts are written."""
        return cls(DAY.year, DAY.month, DAY.day, tzinfo=tz)


@contextmanager
def _same_day() -> Iterator[None]:
    """Let templates that ask transformers for today's date (`strftime_now`) get the same one every day."""
    from transformers.utils import chat_template_utils as owner

    clock = owner.datetime
    owner.datetime = _Day
    try:
        yield
    finally:
        owner.datetime = clock


def resolve_template(
    tokenizer: Any, model_folder: str | Path | None = None, template_file: str | Path | None = None
) -> Template:
    """Return the template of a model: the file given, else the model folder's, else the chat template, else tags.

    The last resort are TOFU's tags for Phi-1.5 ("Question: ...\\nAnswer: "). Raises InputError for a bad file.
    """
    if template_file is not None:
        if not Path(template_file).is_file():
            raise InputError(f"--prompt-template '{template_file}' does not exist.", "Give a JSON file with the tags.")
        return read_template(template_file)
    if model_folder is not None and (Path(model_folder) / FILE_NAME).is_file():
        return read_template(Path(model_folder) / FILE_NAME)
    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate()
    return TagTemplate()


def read_template(path: str | Path) -> Template:
    """Read a prompt_template.json: the fields of `TagTemplate`, or `system_prompt` alone for `ChatTemplate`."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"The prompt template '{path}' is not JSON ({error}).", _example()) from error
    if not isinstance(values, dict):
        raise InputError(f"The prompt template '{path}' is not a JSON object.", _example())
    chat = set(values) == {"system_prompt"}
    valid = {
        field.name: bool if field.name == "supervise_answer_tag" else str
        for field in dataclasses.fields(ChatTemplate if chat else TagTemplate)
    }
    for name, value in values.items():
        if name not in valid:
            raise InputError(f"The prompt template '{path}' has the unknown key '{name}'.", suggestion(name, valid))
        if not isinstance(value, valid[name]):
            raise InputError(
                f"The prompt template '{path}' gives {value!r} for '{name}'.", f"'{name}' takes {valid[name].__name__}."
            )
    return ChatTemplate(**values) if chat else TagTemplate(**values)


def save_template(template: Template, folder: str | Path) -> None:
    """Write prompt_template.json into a model folder; a plain chat template needs none."""
    if isinstance(template, TagTemplate) or template.system_prompt:
        write_json(Path(folder) / FILE_NAME, dataclasses.asdict(template))


def _example() -> str:
    return f"Write it like {json.dumps(dataclasses.asdict(TagTemplate()))}."
