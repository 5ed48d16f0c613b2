"""What is checked before a run: losses and how they meet, layers, spans, and reference values that are reused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import loku
from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku.config import UnlearnOptions, resolve
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evidence import importance_provenance
from loku.job import check_objective, prepare
from loku.models import load_model
from loku.target_values import read_logprobs, write_logprobs

FAST = {"rank": 2, "batch_size": 4, "grad_accum": 1, "max_steps": 2, "evaluate": False, "device": "cpu"}


def options(**settings):
    return resolve(UnlearnOptions, {}, settings)


@pytest.mark.parametrize(
    ("settings", "given", "remedy"),
    [
        ({"forget_options": {"betta": 1}}, "The forget loss 'ihl' has no option 'betta'.", "Did you mean 'beta'?"),
        ({"retain_options": {"beta": 1}}, "The retain loss 'nll' has no option 'beta'.", "It has none."),
        ({"forget_options": {"stop": "much"}}, "The forget loss 'ihl' got stop='much'.", "Give a number."),
        ({"forget_loss": "npo", "forget_options": {"beta": 0}}, "The forget loss 'npo' got beta=0, and", "above 0"),
        ({"combine": "primal-dual"}, "primal-dual needs a bound on the retain loss.", "Give --retain-bound"),
        ({"retain_bound": 1.0}, "--retain-bound is of no use with --combine sum.", "Add --combine primal-dual."),
        ({"layer": 2}, "--layer 2 does not exist: the model has 2.", "Count from 0 or from -1."),
        ({"layer": -3}, "--layer -3 does not exist", "Count from 0"),
        ({"tune_layers": 1}, "--tune-layers is of no use with --tune lora.", "Add --tune full"),
        ({"tune": "full", "tune_layers": 3}, "--tune-layers 3 is more than the model's 2 layers.", "Give fewer."),
        ({"level_model": "x/y", "forget_loss": "npo"}, "--level-model is of no use without ihl.", "Choose"),
        ({"level_model": "./nowhere"}, "--level-model './nowhere' does not exist as a folder.", "Check the path"),
    ],
)
def test_objectives_that_cannot_be_are_refused(settings, given, remedy):
    with pytest.raises(InputError) as caught:
        check_objective(tiny_model(), options(**settings))
    assert given in caught.value.given
    assert remedy in caught.value.remedy


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert options(forget_options="stop=1e-2").forget_options == {"stop": 0.01}
    assert options(forget_options={"stop": "1e-2"}).forget_options == {"stop": 0.01}  # of a recipe
    found = options(forget_options={"beta": np.float32(0.5)}, forget_loss="npo", rank=np.int64(4))
    assert (type(found.forget_options["beta"]), type(found.rank)) == (float, int)
    with pytest.raises(InputError, match="for 'rank'"):
        options(rank=np.array([4, 8]))


def test_a_level_model_of_another_vocabulary_is_refused(tmp_path):
    other = copy.deepcopy(byte_level_tokenizer())
    other.add_tokens(["Tarnhollow"])
    tiny_model(vocab_size=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has another vocabulary than the target model"):
        prepare(
            tiny_model(), byte_level_tokenizer(), load_records(rows(2)), load_records(rows(2, 20)),
            options(level_model=str(tmp_path / "other"), rank=2),
        )  # fmt: skip


def test_the_template_of_a_models_folder_is_found_without_naming_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "prompt_template.json").write_text(json.dumps({"question_start_tag": "Q: "}))
    model = load_model(str(tmp_path))
    job = prepare(model, byte_level_tokenizer(), load_records(rows(2)), load_records(rows(2, 20)), options(rank=2))
    assert job.template.question_start_tag == "Q: "


def test_provenance_follows_what_the_chat_template_writes():
    hashes = []
    for mark in ("<a>", "<b>"):
        tokenizer = copy.deepcopy(byte_level_tokenizer())
        tokenizer.chat_template = f"{{% for m in messages %}}{mark}{{{{ m['content'] }}}}{{% endfor %}}"
        job = prepare(tiny_model(), tokenizer, load_records(rows(2)), load_records(rows(2, 20)), options(rank=2))
        hashes.append(importance_provenance(job, "fila", options(rank=2), "model"))
    assert hashes[0] != hashes[1]


def test_a_bound_on_the_retain_loss_needs_retain_rows():
    settings = {"method": "pdu", "retain_bound": 1.0, "retain_weight": 0.0}
    forget = load_records(rows(2))
    with pytest.raises(InputError, match="--retain-bound bounds the loss on the retain rows, and --retain is missing"):
        prepare(tiny_model(), byte_level_tokenizer(), forget, None, options(**settings))


def test_option_pairs_from_the_command_line():
    found = options(forget_options="stop=0.1, beta=1").forget_options
    assert found == {"stop": 0.1, "beta": 1}
    with pytest.raises(InputError, match=r"--forget-options has 'stop', which is no pair.\nWrite name=value"):
        options(forget_options="stop")


def test_alternates_are_made_only_for_losses_that_compare():
    tokenizer, model = byte_level_tokenizer(), tiny_model()
    job = prepare(model, tokenizer, rows(3), rows(4, 20), options(**FAST))
    assert job.alternates is None
    job = prepare(model, tokenizer, rows(3), rows(4, 20), options(method="idk-ap", **FAST))
    assert [len(job.alternates), len(job.retain_alternates)] == [3, 4]


def test_spans_weigh_the_forget_tokens_of_their_rows_only():
    forget = rows(3)
    forget[1] |= {"forget_spans": ["town"]}
    job = prepare(tiny_model(), byte_level_tokenizer(), forget, rows(4, 20), options(**FAST))
    weights = [example.weights for example in job.encoded_forget.examples]
    assert weights[0] is None
    assert 0 < sum(weights[1]) < sum(label >= 0 for label in job.encoded_forget.examples[1].labels)


def test_spans_change_what_is_trained(tmp_path):
    forget = [row | {"forget_spans": [row["answer"].split()[-1]]} for row in rows(3)]
    plain = loku.unlearn(tiny_model(), byte_level_tokenizer(), rows(3), rows(4, 20), tmp_path / "plain", **FAST)
    chosen = loku.unlearn(tiny_model(), byte_level_tokenizer(), forget, rows(4, 20), tmp_path / "spans", **FAST)

    def first_loss(result):
        return json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])["forget_loss"]

    assert first_loss(plain) != pytest.approx(first_loss(chosen), rel=1e-6)


def test_reference_values_are_cached_in_the_run_folder(tmp_path):
    settings = FAST | {"method": "npo"}
    result = loku.unlearn(tiny_model(), byte_level_tokenizer(), rows(3), rows(4, 20), tmp_path / "run", **settings)
    file = result.folder / "reference.safetensors"
    with safe_open(file, framework="pt") as handle:
        assert handle.get_tensor("lengths").numel() == 3
        provenance = json.loads(handle.metadata()["provenance"])
    assert provenance["model"] == result.record["model"]["sha256"]
    before = file.stat().st_mtime_ns
    loku.unlearn(tiny_model(), byte_level_tokenizer(), rows(3), rows(4, 20), tmp_path / "run", **settings)
    assert file.stat().st_mtime_ns == before


def test_logprobs_are_read_back_only_for_the_same_provenance(tmp_path):
    values = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    write_logprobs(tmp_path / "x.safetensors", values, {"model": "a"})
    found = read_logprobs(tmp_path / "x.safetensors", {"model": "a"})
    assert all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
    assert read_logprobs(tmp_path / "x.safetensors", {"model": "b"}) is None
    assert read_logprobs(tmp_path / "y.safetensors", {"model": "a"}) is None
    (tmp_path / "z.safetensors").write_bytes(b"torn")
    assert read_logprobs(tmp_path / "z.safetensors", {"model": "a"}) is None


def test_a_level_model_stops_what_it_does_not_know_either(tmp_path, model_folder):
    settings = FAST | {"init": "lora"}
    result = loku.unlearn(
        tiny_model(), byte_level_tokenizer(), rows(3), rows(4, 20), tmp_path / "run", level_model=str(model_folder),
        **settings,
    )  # fmt: skip
    assert (result.folder / "level.safetensors").is_file()


def test_only_the_last_layers_are_tuned(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = FAST | {"tune": "full", "tune_layers": 1, "learning_rate": 1e-3}
    loku.unlearn(model, byte_level_tokenizer(), rows(3), rows(4, 20), tmp_path / "run", **settings)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_the_python_api_finishes_the_run(tmp_path):
    settings = FAST | {"evaluate": True, "eval_rows": 2, "max_new_tokens": 4}
    result = loku.unlearn(tiny_model(), byte_level_tokenizer(), rows(3), rows(4, 20), tmp_path / "run", **settings)
    assert result.record["status"] == "finished"
    for name in ("results.json", "report.html", "adapter/README.md"):
        assert (result.folder / name).is_file()
