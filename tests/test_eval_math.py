"""Evaluation: where an answer stands in a response; sampling in batches, resuming, comparing models."""

import json
import multiprocessing
import random
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import in_process
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_math
from eval_math import HeldOut, boxed, extract, is_correct
from rollout import Rollout, rollout
from support import cli, data
from support.grading import compare_quickly, plain
from support.prompts import decode_answers, render
from support.workers import Grader

ROOT = Path(eval_math.__file__).parent

FLAGS = ["--max-new-tokens", "128", "--instruction", "", "--dtype", "float32"]


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval_math.py", *map(str, flags)])
    return eval_math.main()


def test_two_models_are_compared_on_the_same_problems(world, tmp_path, monkeypatch, capsys):
    models = ["--model", world / "student", "--model", world / "teacher", "--limit", 30]
    main(monkeypatch, *models, "--data", world / "test.jsonl", *FLAGS, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    a, b = found["scores"]["A-student test"], found["scores"]["B-teacher test"]
    assert b["accuracy"] > a["accuracy"] and a["n"] == b["n"] == 30
    gap = found["differences"]["B-teacher - A-student, test"]
    assert gap["difference"] == pytest.approx(b["accuracy"] - a["accuracy"]) and gap["p"] < 0.01
    assert "sign test" in capsys.readouterr().out
    records = data.read_jsonl(tmp_path / "out" / "B-teacher-test.jsonl")
    problems = {p.question: p.answer for p in data.read_problems(str(world / "test.jsonl"), "test")}
    assert all(problems[r["problem"]] == r["gold"] for r in records)
    main(monkeypatch, "--regrade", tmp_path / "out" / "B-teacher-test.jsonl")
    assert "0 of 30 verdicts differ" in capsys.readouterr().out


def test_every_model_has_a_label_of_its_own(world, tmp_path, monkeypatch):
    """Also models of one name. There are 26 letters, and no model is dropped in silence."""
    labels = []

    def record(name, label, *args):
        labels.append(label)
        answer = {"index": 0, "response": "5", "gold": "5", "verdict": "right", "extracted": "5"}
        answer |= {"length": 1, "seconds": 1.0, "finished": True}
        return {"test": [answer | dict.fromkeys(("correct", "correct_strict", "correct_last"), True)]}

    monkeypatch.setattr(eval_math, "evaluate_model", record)
    models = ["--model", world / "teacher"] * 26
    flags = ["--data", world / "test.jsonl", "--out", tmp_path / "out"]
    main(monkeypatch, *models, *flags)
    assert labels[:2] + labels[25:] == ["A-teacher", "B-teacher", "Z-teacher"]
    assert len(set(labels)) == 26
    with pytest.raises(cli.BadInput, match="27 models are too many for one comparison: give at most 26"):
        main(monkeypatch, *models, "--model", "another", *flags)


def test_a_stopped_run_resumes_to_the_same_scores(world, tmp_path, monkeypatch, request):
    """Real kills at random moments, and an incomplete line. Sampled, so the noise must be the same too."""
    flags = ["--model", world / "teacher", "--data", world / "test.jsonl", "--limit", 30, "--samples", 2]
    flags += ["--temperature", 1, "--top-p", 0.9, "--batch-size", 10, *FLAGS, "--max-new-tokens", 20]
    main(monkeypatch, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "stopped"
    answers = out / "A-teacher-test.jsonl"
    rng = random.Random(0)
    given = [*flags, "--out", out]
    for _ in range(request.config.getoption("--kills")):
        process = in_process(eval_math.main, given, tmp_path / "output")
        while process.is_alive() and not answers.exists():  # a slow machine takes long to get there
            time.sleep(0.05)
        process.join(timeout=rng.random())
        process.kill()
        process.join()
        given = ["--resume", out]
    answers.write_bytes(answers.read_bytes()[:-30])
    main(monkeypatch, *given)
    stopped, whole = data.read_jsonl(answers), data.read_jsonl(tmp_path / "whole" / answers.name)
    for record in stopped + whole:
        del record["seconds"]
    assert stopped == whole


def test_a_resumed_evaluation_keeps_its_batch_size_unless_less_is_asked_for(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    problems = data.read_problems(str(world / "test.jsonl"), "test")[:12]
    held_out = HeldOut(problems, render(tokenizer, problems, ""), tokenizer, {tokenizer.eos_token_id})
    path = tmp_path / "answers.jsonl"
    sizes = []

    def sampler(model, prompts, *settings, **more):
        sizes.append(len(prompts))
        return rollout(model, prompts, *settings, **more)

    for asked in (4, 1, 64):
        eval_math.evaluate(model, held_out, path, 8, batch_size=asked, sampler=sampler)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert sizes == [4] * 3 + [1] * 8 + [4] * 2


def test_an_answer_does_not_depend_on_its_batch(world, tmp_path, monkeypatch):
    """The sampling noise belongs to problem and sample; so a smaller batch gives the same answers."""
    texts = []
    for size in (7, 16):
        flags = ["--model", world / "student", "--data", world / "test.jsonl", "--limit", 8, "--samples", 2]
        flags += ["--temperature", 1, "--batch-size", size, *FLAGS, "--max-new-tokens", 20]
        flags += ["--out", tmp_path / str(size)]
        main(monkeypatch, *flags)
        records = data.read_jsonl(tmp_path / str(size) / "A-student-test.jsonl")
        texts.append([record["response"] for record in records])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


@pytest.mark.parametrize("flags", [[], ["--temperature", 0.7], ["--temperature", 0.7, "--top-p", 0.9]])
def test_a_sampler_of_another_distribution_is_refused(world, tmp_path, monkeypatch, flags):
    """A wrong cache once gave a believable score."""

    def forgetful(model, prompts, horizon, eos_ids, noise, **options):
        rollouts = rollout(model, prompts, horizon, eos_ids, noise, **options)
        return replace(rollouts, logp=rollouts.logp - 0.1 * rollouts.response_mask)

    model = ["--model", world / "student", "--data", world / "test.jsonl", "--limit", 4, *FLAGS, *flags]
    model += ["--max-new-tokens", 20]
    main(monkeypatch, *model, "--out", tmp_path / "right")
    monkeypatch.setattr(eval_math, "evaluate", partial(eval_math.evaluate, sampler=forgetful))
    with pytest.raises(cli.BadInput, match="Qwen2ForCausalLM samples from another distribution"):
        main(monkeypatch, *model, "--out", tmp_path / "wrong")


def test_more_than_one_short_answer_is_compared_with_the_sampler(world, tmp_path, monkeypatch):
    """A mean over a single token says little; here the last answer is right, and the others are not."""

    def wrong_but_last(model, prompts, horizon, eos_ids, noise, **options):
        rollouts = rollout(model, prompts, horizon, eos_ids, noise, **options)
        rollouts.logp[:-1] -= 0.1
        return rollouts

    monkeypatch.setattr(eval_math, "evaluate", partial(eval_math.evaluate, sampler=wrong_but_last))
    flags = ["--model", world / "student", "--data", world / "test.jsonl", "--limit", 4, *FLAGS]
    with pytest.raises(cli.BadInput, match="Qwen2ForCausalLM samples from another distribution"):
        main(monkeypatch, *flags, "--max-new-tokens", 1, "--out", tmp_path / "out")


def test_non_finite_probabilities_end_an_evaluation(world, tmp_path, monkeypatch):
    """A temperature of 1e-320 divides by zero; the score was 0 %."""
    model = ["--model", world / "student", "--data", world / "test.jsonl", "--limit", 4, *FLAGS]
    with pytest.raises(cli.BadInput, match="^Qwen2ForCausalLM has non-finite log-probabilities after"):
        main(monkeypatch, *model, "--temperature", 1e-320, "--out", tmp_path / "out")


def test_a_base_model_does_not_read_the_instruction(world, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    shutil.copytree(world / "student", base)
    (base / "chat_template.jinja").unlink()
    flags = ["--model", base, "--data", world / "test.jsonl", "--instruction", "In words.", "--limit", 1]
    with pytest.raises(cli.BadInput, match="context"):  # the worked examples are too long for the toy
        main(monkeypatch, *flags, "--out", tmp_path / "out")
    assert "examples take the place of --instruction" in capsys.readouterr().out


def test_base_models_end_at_the_next_question():
    class Tokenizer:
        chat_template = None
        added_tokens_decoder = {}
        all_special_ids = []

        def decode(self, tokens):
            return bytes(tokens).decode()

    tokens = torch.tensor([list(b"4.\nQuestion: 3?")])
    unfinished = torch.tensor([False])
    rollouts = Rollout([[1]], tokens, torch.ones_like(tokens, dtype=torch.bool), tokens.float(), unfinished)
    answer = {"response": "4.", "length": 15, "finished": True}
    assert decode_answers(rollouts, Tokenizer()) == [answer]


def test_tags_of_reasoning_may_be_special_tokens(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokens = torch.tensor([tokenizer.encode("<think>5</think>6<|im_end|>")])
    rollouts = Rollout([[4]], tokens, tokens >= 0, tokens.float(), tokens[:, 0] >= 0)
    assert decode_answers(rollouts, tokenizer)[0]["response"] == "<think>5</think>6"


def test_reasoning_that_the_template_opens_has_no_answer_until_it_is_closed():
    class Tokenizer:
        chat_template = "ends with <think>"
        added_tokens_decoder = {}
        all_special_ids = []

        def decode(self, tokens):
            return bytes(tokens).decode()

    def extracted(prompt, response):
        tokens = torch.tensor([list(response)])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        rollouts = Rollout([list(prompt)], tokens, mask, tokens.float(), torch.tensor([False]))
        return extract(decode_answers(rollouts, Tokenizer())[0]["response"])

    assert extracted(b"3?<think>\n", rb"Is it \boxed{4}? Or 5") is None
    assert extracted(b"3?<think>\n", rb"Is it \boxed{4}?</think> No, 5") == "5"
    assert extracted(b"3?<think></think>\n", rb"It is \boxed{4}") == "4"


EXTRACTED = [  # response, its answer
    (r"so \boxed{42}", "42"),
    (r"first \boxed{7} and then, never stopping, \boxed{8}", "7"),
    (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\left\{ x \mid x>0 \right.}", r"\left\{ x \mid x>0 \right."),
    (r"\boxed{} then \boxed{5}", "5"),
    (r"\boxed{42 and \boxed{43}", "43"),
    (r"} } \boxed{5}", "5"),
    (r"#### 3 but \boxed{4}", "4"),
    ("6 * 7 = 42\n#### 42", "42"),
    ("#### 42\nQuestion: more\n#### 43", "42"),
    ("The answer is 42.", "42"),
    ("The final answer is: **3.5** meters", "3.5** meters"),
    ("answer: $\\frac{1}{2}$.\nThanks", "$\\frac{1}{2}$"),
    ("#### Step 1: Find x\nso\nThe answer is 5.", "5"),
    ("##### Solution\n so 10-15", "15"),
    ("The answer is 42, which is 6 times 7", "42"),
    ("Answer: " + " " * 4000 + "y" * 300, None),
    ("That makes 40 and 2, so 1,042 in all", "1,042"),
    ("Revenue grew by 12.5%.", "12.5%"),
    (r"It is 5 \% of them", r"5 \%"),
    ("it costs $-3.50", "-3.50"),
    ("of 3 dice it is .5.", ".5"),
    ("in total 1.2e5.", "1.2e5"),
    ("in total 1e-3", "1e-3"),
    ("in total 4 eggs, or 5e", "5"),
    ("I do not know", None),
    ("", None),
    (r"\boxed{42", "42"),
    (r"\boxed{" + "x" * 501 + "}", None),
    # not an answer: go on to the next candidate
    ("The answer is therefore 14.", "14"),
    ("The answer is clearly $\\frac{1}{4}$ here.", "$\\frac{1}{4}$"),
    ("To get the answer: multiply 7 by 2. The product is 14.", "14"),
    ("The answer is obtained by doubling 7 and adding 0, so 14.", "14"),
    ("The answer is the product of both:\n7 * 2 = 14", "14"),
    (r"The answer is \[14\]", r"\[14\]"),
    ("The answer is:\n$$\n.5\n$$", ".5"),
    ("#### **14**", "14"),
    ("#### 1. Add\n7 + 7\n#### **2) Check**\nThe answer is 14.", "14"),
    ("#### 14 eggs", "14 eggs"),
    ("#### 14.\nQuestion: 3 eggs", "14."),
    ("The answer is 1, 2, and 3.", "1, 2, and 3"),
    ("The answer is $x = 1$, or $x = 2$.", "$x = 1$, or $x = 2$"),
    ("The answer is 14, and that is even.", "14"),
    ("The answer is 1, 2, and 3, which are small.", "1, 2, and 3"),
    ("The answer is (1, 2), and (3, 4).", "(1, 2), and (3, 4)"),
    ("The answer is 14 hours, or 840 minutes.", "14 hours"),
    ("The answer is 0.5, or 50%.", "0.5"),
    ("The answer is 14, and 3 is left.", "14"),
    ("The answer is 14 because 2 * 7 = 14.", "14"),
    ("The answer is 14 (since 2 * 7 = 14).", "14"),
    ("The answer is 14; she had 3 before.", "14"),
    ("The answer is `14`.", "14"),
    ("The answer is $14$ apples.", "$14$ apples"),
    (r"**Answer**: $\frac12$", r"$\frac12$"),
    ("**Final Answer**: B", "B"),
    ("Answer : 14", "14"),
    ("### Final Answer\n\nTherefore, she has 14 dollars.", "14"),
    ("**Answer**\n\n2 * 7 = 14\nThe answer is 14.", "14"),
    ("7 * 2\n\n### Final Answer\n\n$\\frac12$", r"$\frac12$"),
    (r"**Answer**" + "\n" + r"\[ \frac12 \]", r"\[ \frac12 \]"),
    (r"The probability is $\frac{3}{4}$.", r"\frac{3}{4}"),
    (r"fill \boxed{\phantom{14}} and \boxed{?} and \boxed{\quad}: \boxed{14}", "14"),
    (r"The form is \boxed{answer}, so \boxed{\text{ }} \boxed{14}", "14"),
    (r"\boxed{\boldsymbol{14}}", r"\boldsymbol{14}"),
    ("The answer is not 5. The answer is 14.", "14"),
    ("The answer is not possible.", "not possible"),
    ("The answer is the ordered triple $(1,2,3)$.", "$(1,2,3)$"),
    ("The answer is the negative number -5.", "-5"),
    ("The answer is that she has double the amount: 24.", "24"),
    ("The answer is that 12 students scored more than Tom.", "12"),
    # reasoning
    (r"<think>\boxed{3}? No.</think> So \boxed{14}.", "14"),
    (r"\boxed{3} <think>a</think> \boxed{4} <think>b</think> 14", "14"),
    (r"\boxed{3} was the prompt's <think></think> 14", "14"),
    (r"<think>It is \boxed{14}, or", None),
    (r"<think>one</think> \boxed{3} <think>It is \boxed{14}", None),
]
ENDLESS_FORMULAS = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\int_0^1 x^{x^{x^x}} dx}"]
HOSTILE = [
    r"\boxed{" + "(" * 400 + "}",
    "{" * 100_000,
    "}" * 100_000,
    r"\boxed{" * 20_000,
    r"\boxed{x}" * 12_000,
    "9" * 100_000,
    "9," * 50_000,
    "answer is " * 10_000,
    "answer is " + " " * 100_000,
    "#### " * 20_000,
    r"\boxed{NaN}",
    r"\boxed{\x00\ud800}",
    r"\boxed{\frac{1}{}",
    "\\" * 100_000,
    "−½√" * 30_000,
]


@pytest.mark.parametrize(
    "words", ["negative", "minus", "less than", "half of", "twice", "the square root of"]
)
def test_a_number_is_not_taken_out_of_words_that_change_it(words):
    assert not is_correct(f"The answer is {words} 16.", "16")


@pytest.mark.parametrize("response, answer", EXTRACTED)
def test_extracted(response, answer):
    assert extract(response) == answer


def test_first_box_and_last_box():
    """A reported collapse of full rollouts was a last-box extractor reading what came after the answer."""
    response = r"\boxed{7}. Again: \boxed{8}"
    assert extract(response) == "7"
    assert boxed(response)[-1] == "8"
    assert boxed(r"\boxed{1} \fbox{2} {\boxed {3}}") == ["1", "2", "3"]
    assert boxed(r"\boxed{\{1\}} \boxed{2\\{3}} \\boxed{4}") == [r"\{1\}", r"2\\{3}", "4"]


def test_hostile_text_is_graded_in_bounded_time():
    with Grader(extract, boxed, workers=1) as grader:
        for response in HOSTILE:
            started = time.time()
            assert grader.verdict(response, "42")["verdict"] in ("wrong", "no answer"), response[:50]
            assert time.time() - started < 10, response[:50]


def test_an_endless_formula_ends_in_bounded_time():
    with Grader(extract, boxed, workers=1, seconds=1) as grader:
        for response in ENDLESS_FORMULAS:
            assert grader.verdict(response, "42")["verdict"] == "timed out"


ENDLESS = [
    "answer is ",
    r"\boxed{",
    r"\boxed{?}",
    r"\boxed{5}",
    "{",
    "}",
    "9",
    "9,",
    "1.1",
    "9/",
    "#### ",
    "#### 5 ",
]
ENDLESS += ["answer is $", "*", "~", " ", "\n", "\\", "−½", "-$", "<think>", "x", "."]


@pytest.mark.parametrize("start", ["", "answer is ", "answer is therefore ", r"\boxed{5", "####"])
def test_long_text_is_searched_in_linear_time(start):
    """In the main process, where no clock runs: extraction, and the comparison by text and number."""
    for text in ENDLESS:
        size = 50_000 if start else 1_000_000  # quadratic time is noticed in either
        response = start + text * (size // len(text))
        started = time.process_time()
        found = extract(response)
        compare_quickly(found or "", "42")
        assert time.process_time() - started < 2, text


def test_an_overlong_unit_is_read_in_linear_time():
    started = time.process_time()
    for text in [
        "5" + "~" * 20_000 + "cm",
        "5 " + "ab " * 160,
        r"\text{" * 80,
        "{" * 250 + "}" * 250,
        "x=" * 240,
    ]:
        compare_quickly(text, "42")
        compare_quickly("42", text)
        plain(text)
    assert time.process_time() - started < 5


def test_is_correct_reads_a_whole_solution_and_refuses_one_without_an_answer():
    for answer in ("72", "24 + 48 = 72 clips\n#### 72", r"It is \boxed{72}.", 72):
        assert is_correct(r"\boxed{72}", answer) and not is_correct(r"\boxed{71}", answer)
    for answer in (None, "", [], "She sold 48 / 2 clips in May. Then she sold clips in April and in June."):
        with pytest.raises(ValueError, match="empty|not marked"):
            is_correct("72", answer)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_graders_of_its_own():
    """It would read the verdicts that its parent asked for."""
    cases = [(rf"\boxed{{x + {i}}}", f"{i + i % 2} + x") for i in range(40)]
    assert is_correct(*cases[0])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(is_correct, cases, chunksize=1) == [i % 2 == 0 for i in range(40)]


def test_correct_by_three_rules():
    """By the first box or another rule, by a box alone, and by the last box."""
    responses = ["#### 5", r"\boxed{5} \boxed{6}", r"\boxed{6} \boxed{5}", "no"]
    with Grader(extract, boxed, workers=1) as grader:
        graded = grader.grade(responses, ["5"] * 4)
    assert [one["correct"] for one in graded] == [True, True, False, False]
    assert [one["correct_strict"] for one in graded] == [False, True, False, False]
    assert [one["correct_last"] for one in graded] == [True, False, True, False]
    assert [one["extracted"] for one in graded] == ["5", "5", "6", None]
    assert graded[3]["verdict"] == "no answer"
    assert [is_correct(response, "5") for response in responses] == [True, True, False, False]
