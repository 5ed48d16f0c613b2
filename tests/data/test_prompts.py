"""Prompts: which template a model gets, and template files that are refused."""

from __future__ import annotations

import copy
import json

import pytest

from builders import byte_level_tokenizer
from loku.data.prompts import FILE_NAME, ChatTemplate, TagTemplate, read_template, resolve_template, save_template
from loku.errors import InputError

PLAIN = byte_level_tokenizer()
LLAMA = TagTemplate("[INST] ", " [/INST]", "")


def chatty():
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def test_the_default_tags_are_tofus():
    template = TagTemplate()
    assert template.question("Who?") == "Question: Who?\n"
    assert template.prompt("Who?") == "Question: Who?\nAnswer: "
    assert template.describe() == r"tags 'Question: {question}\nAnswer: '"
    assert TagTemplate(supervise_answer_tag=True).describe().endswith(", answer tag supervised")


def test_a_chat_with_and_without_a_system_prompt():
    user = {"role": "user", "content": "Who?"}
    assert ChatTemplate().messages("Who?") == [user]
    assert ChatTemplate("Be brief.").messages("Who?") == [{"role": "system", "content": "Be brief."}, user]
    assert ChatTemplate().describe() == "the tokenizer's chat template"
    assert ChatTemplate("Be brief.").describe() == "the tokenizer's chat template, system prompt 'Be brief.'"


def test_the_file_given_wins_over_the_models_over_the_chat_template_over_tags(tmp_path):
    assert resolve_template(PLAIN) == resolve_template(PLAIN, tmp_path) == TagTemplate()
    assert resolve_template(chatty(), tmp_path) == ChatTemplate()
    save_template(LLAMA, tmp_path)
    assert resolve_template(chatty(), tmp_path) == LLAMA
    (tmp_path / "mine.json").write_text('{"answer_tag": "A: "}')
    assert resolve_template(chatty(), tmp_path, tmp_path / "mine.json") == TagTemplate(answer_tag="A: ")
    assert resolve_template(chatty(), "owner/name") == ChatTemplate()


@pytest.mark.parametrize("template", [LLAMA, TagTemplate(supervise_answer_tag=True), ChatTemplate("Be brief.")])
def test_saving_and_reading(tmp_path, template):
    save_template(template, tmp_path)
    assert read_template(tmp_path / FILE_NAME) == template


def test_a_plain_chat_template_needs_no_file(tmp_path):
    save_template(ChatTemplate(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "given", "remedy"),
    [
        ("{", "is not JSON (", 'Write it like {"question_start_tag": "Question: "'),
        ('["Question: "]', "is not a JSON object.", 'Write it like {"question_start_tag"'),
        ('{"question_tag": "Q"}', "has the unknown key 'question_tag'.", "Did you mean 'question_end_tag'?"),
        ('{"answer_tag": 3}', "gives 3 for 'answer_tag'.", "'answer_tag' takes str."),
        ('{"supervise_answer_tag": "yes"}', "gives 'yes' for 'supervise_answer_tag'.", "takes bool."),
        ('{"system_prompt": 3}', "gives 3 for 'system_prompt'.", "'system_prompt' takes str."),
        ('{"system_prompt": "x", "answer_tag": "A"}', "has the unknown key 'system_prompt'.", "Valid names are: "),
    ],
)  # fmt: skip
def test_bad_template_files_are_refused(tmp_path, text, given, remedy):
    path = tmp_path / "template.json"
    path.write_text(text)
    for read in (lambda: read_template(path), lambda: resolve_template(PLAIN, None, path)):
        with pytest.raises(InputError) as caught:
            read()
        assert caught.value.given.startswith(f"The prompt template '{path}' ")
        assert given in caught.value.given
        assert remedy in caught.value.remedy


def test_a_missing_template_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--prompt-template '.*none\.json' does not exist\.\nGive a JSON file"):
        resolve_template(PLAIN, None, tmp_path / "none.json")


def test_the_example_in_the_remedy_is_a_valid_file(tmp_path):
    path = tmp_path / "template.json"
    path.write_text("[]")
    with pytest.raises(InputError) as caught:
        read_template(path)
    example = caught.value.remedy.removeprefix("Write it like ").removesuffix(".")
    path.write_text(example)
    assert read_template(path) == TagTemplate()
    assert set(json.loads(example)) == {"question_start_tag", "question_end_tag", "answer_tag", "supervise_answer_tag"}


def test_templates_that_print_the_date_print_the_same_one_every_day():
    import datetime

    from loku.data.prompts import render_chat

    tokenizer = copy.deepcopy(byte_level_tokenizer())
    for asks in ("{{ strftime_now('%d %b %Y') }}", "{{ date_string }}"):
        tokenizer.chat_template = asks + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        assert render_chat(tokenizer, [{"role": "user", "content": "!"}], generation=True, where="") == "26 Jul 2024!"
    from transformers.utils import chat_template_utils

    assert chat_template_utils.datetime is datetime.datetime  # only for as long as it is rendered
