"""lm-eval's tasks on our engine: against lm-eval's own wrapper, and against float64 sums over plain forward passes."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from builders import CORPUS, byte_level_tokenizer, tiny_model
from loku import cli

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install ".[lm-eval]"')

from loku.errors import InputError
from loku.evaluation.cache import BatchCache
from loku.evaluation.harness import EngineLM, run_tasks, task_specs

TOKENIZER = byte_level_tokenizer()
TEXTS = [*CORPUS, "She wrote it again and again, or so he says.", "Odo Brill paints lighthouses at dusk. " * 50]
QUESTIONS = [
    {"question": f"Does {name} paint?", "context": text, "final_decision": decision}
    for name, text, decision in zip(("Odo", "Mira", "he"), CORPUS, ("yes", "no", "maybe"), strict=False)
]


@pytest.fixture(scope="module")
def model():
    return tiny_model().double().float()


def requests(*pairs):
    return [SimpleNamespace(args=pair, task_name="t") for pair in pairs]


def logprobs(model, ids):
    """log p of every token after the first, in float64."""
    wide = tiny_model().double()
    with torch.no_grad():
        logits = wide(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])], logits.argmax(-1).tolist()


def continuation(model, context, text):
    whole, before = TOKENIZER.encode(context + text), len(TOKENIZER.encode(context))
    values, greedy = logprobs(model, whole)
    return float(values[before - 1 :].sum()), greedy[before - 1 :] == whole[before:]


def local(kind, rows, **options):
    return run_tasks(EngineLM(tiny_model(), TOKENIZER, **options), task_specs((), {"t": (kind, rows)}))


def test_it_says_what_lm_evals_own_wrapper_says(model):
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs, ours = (
        HFLM(pretrained=tiny_model(), tokenizer=byte_level_tokenizer.__wrapped__()),
        EngineLM(model, TOKENIZER),
    )
    pairs = [("Who wrote it?", " She"), ("Who wrote it? ", "She wrote"), ("", "They did not"), ("Odo" * 200, " Brill")]
    for one, other in zip(
        ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs), disable_tqdm=True), strict=True
    ):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1] == other[1]
    texts = requests(*((text,) for text in TEXTS))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-5
    )
    wanted = {"until": ["\n", "ox"], "max_gen_toks": 12, "do_sample": False}
    asked = requests(*((text, wanted) for text in TEXTS))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    assert ours.max_length == theirs.max_length == 256
    assert len(TOKENIZER.encode(TEXTS[-1])) > 256  # of several windows


def test_lambada_is_the_float64_sum(model):
    found, summary, told = local("lambada", [{"text": text} for text in CORPUS])
    values = []
    for text in CORPUS:
        words = text.split(" ")
        values.append(continuation(model, " ".join(words[:-1]), f" {words[-1]}"))
    mean = sum(value for value, _ in values) / len(values)
    assert summary["t_perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert summary["t_acc"] == pytest.approx(sum(hit for _, hit in values) / len(values))
    assert [row["perplexity"] for row in found["t"].per_example] == pytest.approx([v for v, _ in values], rel=1e-5)
    assert told["t"]["shots"] == 0


def test_a_word_that_the_model_says_is_a_hit():
    taught = tiny_model()
    prompt = "Who wrote it?"
    ids = TOKENIZER.encode(prompt)
    with torch.no_grad():
        first = int(taught(torch.tensor([ids])).logits[0, -1].argmax())
    engine = EngineLM(taught, TOKENIZER)
    found = engine._loglikelihood_tokens(
        [(("", ""), ids, [first]), (("", ""), ids, [(first + 1) % 300]), (("", ""), ids, [])]
    )
    assert [hit for _, hit in found] == [True, False, True]
    assert found[2][0] == 0.0


def test_pubmedqa_chooses_the_likeliest_answer(model):
    found, summary, _ = local("pubmedqa", QUESTIONS)
    hits = []
    for row in QUESTIONS:
        prompt = f"Abstract: {row['context']}\nQuestion: {row['question']}\nAnswer:"
        scores = {word: continuation(model, prompt, f" {word}")[0] for word in ("yes", "no", "maybe")}
        hits.append(float(max(scores, key=scores.get) == row["final_decision"]))
    assert [row["acc"] for row in found["t"].per_example] == hits
    assert summary["t_acc"] == pytest.approx(sum(hits) / 3)
    deviation = torch.tensor(hits).std().item()
    assert summary["t_acc_stderr"] == pytest.approx(deviation / math.sqrt(3), rel=1e-5)


def test_perplexity_is_the_float64_sum_over_words_and_bytes(model):
    texts = TEXTS[:-1]
    _, summary, _ = local("perplexity", [{"text": text} for text in texts])
    total = 0.0
    for text in texts:
        values, _ = logprobs(model, [TOKENIZER.eos_token_id, *TOKENIZER.encode(text)])
        total += float(values.sum())
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert summary["t_word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert summary["t_byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert summary["t_bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_model_and_tokenizer_are_left_as_they_were():
    model, tokenizer = tiny_model().train(), byte_level_tokenizer.__wrapped__()
    tokenizer.pad_token = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_tasks(EngineLM(model, tokenizer), task_specs((), {"t": ("lambada", [{"text": "She wrote it."}])}))
    assert model.training
    assert tokenizer.pad_token is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_is_measured():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    specs = {"t": ("lambada", [{"text": text} for text in CORPUS])}
    with_adapter = run_tasks(EngineLM(model, TOKENIZER), task_specs((), specs))[1]
    assert with_adapter["t_perplexity"] != pytest.approx(local(*specs["t"])[1]["t_perplexity"])
    merged = run_tasks(EngineLM(model.merge_and_unload(), TOKENIZER), task_specs((), specs))[1]
    assert with_adapter["t_perplexity"] == pytest.approx(merged["t_perplexity"], rel=1e-3)


def test_asked_again_nothing_is_computed(tmp_path, monkeypatch):
    from loku.evaluation import scoring

    rows, cache = [{"text": text} for text in CORPUS], BatchCache(tmp_path, "a")
    first = local("perplexity", rows, cache=cache)
    monkeypatch.setattr(scoring, "tree_statistics", None)
    assert local("perplexity", rows, cache=cache)[1] == first[1]


def test_what_lm_eval_does_not_know_is_refused():
    with pytest.raises(InputError, match=r"'lambada_openia' is no task of lm-eval\.\nDid you mean 'lambada_openai'"):
        task_specs(("lambada_openia",), {})
    with pytest.raises(InputError, match=r"'\.\./x\.yaml' is no task"):
        task_specs(("../x.yaml",), {})
    engine = EngineLM(tiny_model(), TOKENIZER)
    with pytest.raises(InputError, match=r"samples its answers"):
        engine.generate_until(requests(("Hi", {"until": ["\n"], "do_sample": True, "temperature": 1.0})))


def test_hub_tasks_by_name_from_a_served_folder(monkeypatch, model):
    import datasets

    asked = []

    def served(path, name=None, **options):
        asked.append((path, name))
        return datasets.DatasetDict(test=datasets.Dataset.from_list([{"text": text} for text in CORPUS]))

    monkeypatch.setattr(datasets, "load_dataset", served)
    sets, summary, told = run_tasks(EngineLM(tiny_model(), TOKENIZER), task_specs(("lambada_openai",), {}), limit=3)
    assert asked == [("EleutherAI/lambada_openai", "default")]
    ours = local("lambada", [{"text": text} for text in CORPUS[:3]])
    assert summary["lambada_openai_perplexity"] == pytest.approx(ours[1]["t_perplexity"], rel=1e-6)
    assert sets["lambada_openai"].rows == 3
    assert told["lambada_openai"]["version"] == 1.0
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(InputError, match=r"'lambada_openai' cannot be loaded: offline\.?\nCheck the connection"):
        task_specs(("lambada_openai",), {})


@pytest.mark.slow
def test_from_the_command_line(tmp_path, model_folder, forget_file, capsys):
    files = {"lambada": [{"text": text} for text in CORPUS], "pubmedqa": QUESTIONS, "wiki": [{"text": TEXTS[0]}]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = f"lambada={tmp_path}/lambada.jsonl,pubmedqa={tmp_path}/pubmedqa.jsonl,perplexity={tmp_path}/wiki.jsonl[0:1]"
    arguments = ["--model", model_folder, "--forget", forget_file, "--utility", asked, "--max-new-tokens", 3]
    assert cli.main(["evaluate", *map(str, arguments), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for name in ("lambada_acc: ", "lambada_acc_stderr: ", "pubmedqa_acc: ", "perplexity_wiki_word_perplexity: "):
        assert name in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["sets"]) == {"forget", "lambada", "pubmedqa", "perplexity_wiki"}
    assert "perplexity_wiki_word_perplexity_stderr" not in results["summary"]  # one row tells of no spread
    assert results["versions"]["lm_eval"]
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lambada_acc_stderr" in page
    assert "Pubmedqa" in page
