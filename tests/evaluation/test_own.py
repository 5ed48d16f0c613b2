"""The suite for one's own rows: which metrics appear with which data, on every row format."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import DivergenceError, InputError
from loku.evaluation import measuring
from loku.evaluation.assembly import membership
from loku.evaluation.generation import generate
from loku.evaluation.own import evaluate_own
from loku.evaluation.reference import load_reference
from loku.evaluation.results import read_results, write_results
from loku.evaluation.scoring import score

TOKENIZER = byte_level_tokenizer()
QUESTIONS = [{"question": f"Where was Mira{n} born?", "answer": f"Mira{n} was born in Tarnhollow."} for n in range(4)]
RICH = [
    row
    | {
        "paraphrased_answer": "In Tarnhollow.",
        "perturbed_answer": ["In Baku.", "Odo Brill paints."],
        "paraphrased_question": "Mira's birthplace?",
    }
    for row in QUESTIONS
]
TEXTS = [{"text": "The quick brown fox jumps over the lazy dog, 0123456789 times; (then) rests! " * n} for n in (1, 3)]


def records(rows, option="--forget"):
    return load_records(rows, option=option)


def evaluate(forget=None, *, seed=0, **options):
    options = {"max_new_tokens": 8, "template": TagTemplate()} | options
    return evaluate_own(tiny_model(seed=seed), TOKENIZER, forget=records(forget or QUESTIONS), **options)


def test_plain_questions_have_the_plain_metrics():
    found = evaluate()
    assert set(found.sets["forget"].metrics) == {
        "probability",
        "rougeL_recall",
        "rougeL_f1",
        "exact_match",
        "exact_memorisation",
        "extraction_strength",
        "extraction_strength_floor",
        "refusal_rate",
        "perplexity",
        "repetition",
        "token_entropy",
        "predictive_entropy",
    }
    assert found.summary == {}
    assert found.suite == "own"
    assert "indistinguishability not measured" in found.verdict["sentence"]
    assert found.texts == []


def test_teacher_forced_numbers_follow_their_definitions():
    found = evaluate().sets["forget"]
    encoder = Encoder(TOKENIZER, TagTemplate(), 500)
    scores = [score(tiny_model(), encoder.encode(row), pad_id=0)[0] for row in records(QUESTIONS)]
    for row, one in zip(found.per_example, scores, strict=True):
        assert row["probability"] == pytest.approx(math.exp(-one.mean_nll), rel=1e-5)
        assert row["tokens"] == one.tokens
        assert row["exact_memorisation"] == pytest.approx(one.hits[:-1].mean())  # the last is the end of sequence
    total, tokens = sum(one.nll for one in scores), sum(one.tokens for one in scores)
    assert found.metrics["perplexity"].mean == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_more_columns_bring_more_metrics():
    found = evaluate(RICH, retain=records(QUESTIONS))
    forget = found.sets["forget"].metrics
    assert {"truth_ratio", "truth_ratio_arithmetic", "paraphrase_exact_match"} <= set(forget)
    assert "truth_ratio" not in found.sets["retain"].metrics
    assert found.summary["retain_perplexity"] == found.sets["retain"].metrics["perplexity"].mean


def test_utility_is_the_harmonic_mean_of_what_retain_and_general_have():
    found = evaluate(retain=records(RICH), general=records(QUESTIONS), holdout=records(QUESTIONS))
    parts = [found.mean("retain", metric) for metric in ("probability", "rougeL_recall", "truth_ratio")]
    parts += [found.mean("general", metric) for metric in ("probability", "rougeL_recall")]
    expected = 0.0 if min(parts) == 0 else len(parts) / sum(1 / part for part in parts)
    assert found.summary["model_utility"] == pytest.approx(expected)
    assert list(found.sets) == ["forget", "retain", "general", "holdout"]


def taught(rows, steps=60):
    """A tiny model that knows the rows by heart."""
    model = tiny_model()
    examples = [Encoder(TOKENIZER, TagTemplate(), 500).encode(row)[0] for row in records(rows)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = sum(model(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss for e in examples)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def test_a_model_that_knows_the_rows_scores_full_marks():
    found = evaluate_own(
        taught(RICH[:2]),
        TOKENIZER,
        forget=records(RICH[:2]),
        holdout=records([{"question": "Who wrote it?", "answer": "She wrote it."}] * 2),
        template=TagTemplate(),
        keep_text=True,
    )
    forget = {name: value.mean for name, value in found.sets["forget"].metrics.items()}
    assert forget["probability"] > 0.9
    for metric in ("rougeL_recall", "exact_match", "exact_memorisation", "extraction_strength"):
        assert forget[metric] == 1.0
    assert found.summary["mia_auc"] == 1.0
    assert found.verdict["level"] == "not suppressed"
    assert found.texts[0] == {
        "set": "forget",
        "index": 0,
        "question": "Where was Mira0 born?",
        "answer": "Mira0 was born in Tarnhollow.",
        "generation": "Mira0 was born in Tarnhollow.",
    }


def test_a_paraphrased_answer_is_an_exact_match_too():
    rows = [{**QUESTIONS[0], "paraphrased_answer": "In Baku."}]
    swapped = [{**QUESTIONS[0], "answer": "In Baku."}]
    found = evaluate_own(taught(swapped), TOKENIZER, forget=records(rows), template=TagTemplate())
    assert found.mean("forget", "exact_match") == 1.0
    assert found.mean("forget", "rougeL_recall") < 1.0


def test_a_paraphrased_question_is_asked():
    rows = [{**QUESTIONS[0], "paraphrased_question": "Mira's birthplace?"}]
    knows = taught([{**QUESTIONS[0], "question": "Mira's birthplace?"}])
    found = evaluate_own(knows, TOKENIZER, forget=records(rows), template=TagTemplate())
    assert found.mean("forget", "paraphrase_exact_match") == 1.0
    assert "exact_match" in found.sets["forget"].metrics


def test_running_text_is_scored_whole_and_continued_from_the_middle():
    found = evaluate(TEXTS, max_new_tokens=None, max_length=60, keep_text=True)
    encoder = Encoder(TOKENIZER, TagTemplate(), 60)
    windows = [encoder.encode(row) for row in records(TEXTS)]
    assert len(windows[1]) > 1
    for row, parts in zip(found.sets["forget"].per_example, windows, strict=True):
        assert row["tokens"] == sum(len(part.input_ids) - 1 for part in parts)
        scores = score(tiny_model(), parts, pad_id=0)
        assert row["nll"] == pytest.approx(sum(s.nll for s in scores) / sum(s.tokens for s in scores), rel=1e-5)
        assert row["exact_memorisation"] == pytest.approx(np.concatenate([s.hits for s in scores]).mean())
    first = windows[0][0].input_ids
    assert found.texts[0]["question"] == TOKENIZER.decode(first[: len(first) // 2]).strip()
    assert found.texts[0]["answer"] == TOKENIZER.decode(first[len(first) // 2 :][:50]).strip()
    assert len(TOKENIZER(found.texts[0]["generation"])["input_ids"]) <= 50
    assert "truth_ratio" not in found.sets["forget"].metrics


def test_other_row_formats():
    pairs = [{"prompt": "Mira was born", "completion": " in Tarnhollow."}, {"prompt": "Who?", "completion": " Odo."}]
    assert evaluate(pairs).sets["forget"].rows == 2
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who is Odo?"},
        {"role": "assistant", "content": "A painter."},
    ]
    found = evaluate_own(tiny_model(), tokenizer, forget=records([{"messages": chat}]), keep_text=True)
    assert found.settings["template"]["kind"] == "ChatTemplate"
    assert found.texts[0]["question"] == "Hi\nHello.\nWho is Odo?"
    assert found.texts[0]["answer"] == "A painter."
    assert found.sets["forget"].per_example[0]["exact_memorisation"] >= 0


def test_an_empty_thinking_block_is_part_of_the_prompt_when_answers_are_generated():
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    asked = []
    original = measuring.generate

    def spy(model, tokenizer, prompts, **options):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return original(model, tokenizer, prompts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "generate", spy)
        found = evaluate_own(tiny_model(), tokenizer, forget=records(QUESTIONS[:1]), max_new_tokens=2)
    assert asked == ["<|user|>Where was Mira0 born?<|endoftext|><|assistant|><think>\n\n</think>\n\n"]
    answer = len(tokenizer("Mira0 was born in Tarnhollow.")["input_ids"])
    assert found.sets["forget"].per_example[0]["tokens"] == answer + 1  # and the end of sequence


@pytest.mark.parametrize(("architecture", "setting"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_rows_beyond_what_the_model_can_read_are_refused_before_any_work(architecture, setting):
    model = tiny_model(architecture, **{setting: 20})
    seen = []
    sentence = r"The longest row has \d+ tokens, but the model reads 20 at most\.\nGive --max-length 20 or less"
    with pytest.raises(InputError, match=sentence):
        evaluate_own(model, TOKENIZER, forget=records(TEXTS), max_length=60, progress=lambda *args: seen.append(args))
    assert not seen
    assert evaluate_own(model, TOKENIZER, forget=records(TEXTS), max_length=20).sets["forget"].rows == 2


def test_membership_and_leak_against_the_reference(tmp_path):
    options = {"retain": records(QUESTIONS), "holdout": records(RICH)}
    path = write_results(evaluate(RICH, seed=1, model_name="clean", **options), tmp_path)
    found = evaluate(RICH, reference=path, **options)
    theirs = read_results(path).summary["mia_auc_min_k"]
    ours = found.summary["mia_auc_min_k"]
    assert "priv_leak" not in read_results(path).summary
    assert found.summary["priv_leak"] == pytest.approx(100 * (theirs - ours) / (1 - theirs))
    assert found.summary["forget_quality_rows"] == 4
    assert "clean" in found.verdict["rests_on"]
    assert found.reference["kind"] == "retain-only"


def test_leak_is_left_out_where_it_is_not_defined():
    found = evaluate(holdout=records(QUESTIONS))
    forget, holdout = found.sets["forget"], found.sets["holdout"]
    assert set(membership(forget, holdout)) == {
        "mia_auc", "mia_auc_zlib", "mia_auc_min_k", "mia_auc_min_k_plus_plus",
    }  # fmt: skip
    found.summary["mia_auc_min_k"] = 1.0
    assert "priv_leak" not in membership(forget, holdout, load_reference(found))


def test_a_reference_without_perturbed_answers_gives_a_warning_and_no_forget_quality():
    found = evaluate(reference=evaluate(seed=1))
    assert "forget_quality" not in found.summary
    assert "needs perturbed answers" in found.warnings[0]
    assert "indistinguishability not measured" in found.verdict["sentence"]


def test_answers_may_be_twice_as_long_as_the_longest_reference():
    rows = [{"question": "Q?", "answer": "a b"}, {"question": "Q?", "answer": "Mira Voss was born in Tarnhollow. " * 3}]
    model = tiny_model()
    found = evaluate_own(model, TOKENIZER, forget=records(rows), template=TagTemplate(), keep_text=True)
    longest = max(row["tokens"] for row in found.sets["forget"].per_example)
    prompts = [Encoder(TOKENIZER, TagTemplate(), 500).encode(row)[0] for row in records(rows)]
    prompts = [example.input_ids[: example.generation_length] for example in prompts]
    expected = generate(model, TOKENIZER, prompts, max_new_tokens=2 * longest + 8)
    assert [row["generation"] for row in found.texts] == [answer.text for answer in expected]
    assert max(len(answer.ids) for answer in expected) == 2 * longest + 8


def test_one_row_is_enough_and_half_precision_works():
    model = tiny_model().bfloat16()
    found = evaluate_own(model, TOKENIZER, forget=records(QUESTIONS[:1]), max_new_tokens=4)
    assert found.model["dtype"] == "bfloat16"
    assert all(value.low == value.mean == value.high for value in found.sets["forget"].metrics.values())


def test_progress_goes_from_nothing_to_all():
    seen = []
    evaluate(RICH, progress=lambda done, total, note: seen.append((done, total, note)), batch_rows=3, batch_tokens=100)
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][0] == seen[-1][1]
    assert {note for _, _, note in seen} == {"scoring", "generating"}


def test_a_row_whose_prompt_fills_the_limit_is_refused_before_any_work():
    with pytest.raises(InputError, match=r"--retain row 0 has no answer token left"):
        evaluate_own(
            tiny_model(),
            TOKENIZER,
            forget=records([{"question": "Q?", "answer": "A."}]),
            retain=records([{"question": "Where was she born? " * 20, "answer": "A."}]),
            template=TagTemplate(),
            max_length=50,
        )


def test_membership_is_not_compared_with_a_reference_of_other_holdout_rows():
    other = [{"question": f"Who is Odo{n}?", "answer": f"Odo{n} paints."} for n in range(4)]
    reference = evaluate(RICH, seed=1, holdout=records(other))
    found = evaluate(RICH, reference=reference, holdout=records(RICH))
    assert not any("distance" in name or name in ("priv_leak", "mia_auc_reference") for name in found.summary)
    assert any("was measured on other holdout rows than these" in warning for warning in found.warnings)
    assert "forget_quality" in found.summary  # the forget rows are the same


def test_a_model_that_says_no_number_is_named_and_nothing_crashes():
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(DivergenceError, match=r"The likelihood of forget row 0 is not finite"):
        evaluate_own(model, TOKENIZER, forget=records(QUESTIONS), max_new_tokens=2)


def test_a_paraphrased_question_beyond_the_context_is_refused_before_any_work():
    model, seen = tiny_model("gpt2", n_positions=60), []
    rows = [RICH[0] | {"paraphrased_question": "Where on earth was Mira0 born? " * 9}]
    with pytest.raises(InputError, match="but the model reads 60 at most"):
        evaluate_own(model, TOKENIZER, forget=records(rows), progress=lambda *args: seen.append(args))
    assert not seen
