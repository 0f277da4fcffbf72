"""The world of words: its answers and slips, its tokenizer, its cache, its preset."""

import json
import random
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_math
import train
from rollout import rollout
from support import data, run_folder, toy, words
from support.cli import BadInput
from support.prompts import render

MICRO = words.Recipe(
    width=8,
    batch=2,
    pretrain_steps=2,
    rounds=1,
    questions=4,
    round_steps=2,
    horizon=8,
    held_out=5,
    problems=20,
)
PROBLEM = words.Problem("sam", "coins", 5, 4, (3, -2, 4))
AUTHOR = words.Author(
    "count :", "at first {start} .", "on {day}", "{change} , {before} to {after} .", "", "so", (1,) * 6
)
NUMBERS = {toy.word(n): n for n in range(words.LIMIT + 1)}


def drawn(count: int = 300, seed: int = 0):
    """Random problems, each with a random author."""
    rng = random.Random(seed)
    recipe = words.Recipe(seed)
    authors = words.draw_authors(recipe)
    return [(words.draw_problem(recipe, rng), rng.choice(authors)) for _ in range(count)]


def counted(question: str) -> int:
    """The result, counted from the words of the question."""
    start = NUMBERS[re.search(r"has (\w+)", question)[1]]
    changes = re.findall(r"day (plus|minus)(\w+)", question)
    return start + sum(NUMBERS[n] * (1 if sign == "plus" else -1) for sign, n in changes)


def test_answers_without_slips_are_right():
    """In every author's style the boxed number is that of the question, and each step follows."""
    for problem, author in drawn():
        text, result = words.answer(problem, author, {})
        assert result == counted(problem.question()) == NUMBERS[words.boxed(text)]
        assert eval_math.extract(text) == words.boxed(text)
        totals = [problem.start]
        for change in problem.changes:
            totals.append(totals[-1] + change)
        assert [NUMBERS[w] for w in text.split() if w in NUMBERS][-1] == totals[-1]
        for before, after in pairwise(totals):
            assert {toy.word(before), toy.word(after)} <= set(text.split())


SLIPS = {
    "misread": (1, 9, "on saturday minusthree , eight to five ."),
    "sign": (1, 14, "on saturday plustwo , eight to ten ."),
    "sum": (1, 11, "on saturday minustwo , eight to seven ."),
    "skip": (1, 12, "on friday plusthree , five to eight . on sunday plusfour , eight to twelve ."),
    "carry": (1, 11, "on saturday minustwo , nine to seven ."),
    "final": (3, 11, "on sunday plusfour , six to ten . so \\boxed{ eleven }"),
}


@pytest.mark.parametrize("kind", words.SLIPS)
def test_a_slip_shows_in_the_text_and_in_the_result(kind):
    step, result, shown = SLIPS[kind]
    assert words.answer(PROBLEM, AUTHOR, {})[1] == 10
    text, found = words.answer(PROBLEM, AUTHOR, {step: (kind, 1)})
    assert (found, NUMBERS[words.boxed(text)]) == (result, result) and shown in text


def test_slips_happen_at_every_step_and_of_every_kind():
    """`final` at the box alone, the others at every step; nothing prefers a place."""
    rng = random.Random(0)
    counts = {}
    for _ in range(20_000):
        for step, (kind, _) in words.draw_slips(PROBLEM, AUTHOR, 0.3, rng).items():
            counts[step, kind] = counts.get((step, kind), 0) + 1
    others = [counts.pop((step, kind)) for step in range(3) for kind in words.SLIPS if kind != "final"]
    assert list(counts) == [(3, "final")] and min(others) > 0.8 * max(others)


def test_totals_that_no_word_names_are_refused():
    assert words.answer(replace(PROBLEM, start=words.LARGEST), AUTHOR, {1: ("sign", 1)}) is None
    assert words.answer(replace(PROBLEM, start=words.LIMIT, changes=()), AUTHOR, {0: ("final", 1)}) is None


def test_each_word_is_one_token():
    tokenizer = words.make_tokenizer()
    for problem, author in drawn():
        for text in (problem.question(), words.answer(problem, author, {})[0]):
            ids = tokenizer.encode(f" {text}")
            assert tokenizer.decode(ids) == f" {text}"
            assert len(ids) == len(text.replace("\\boxed{", "\\ boxed {").split())
        assert len(ids) < words.PRESET["max_new_tokens"]
        assert words.prompt_of(tokenizer, problem) == render(tokenizer, [Question(problem)], "")[0]


class Question:
    def __init__(self, problem):
        self.question = problem.question()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """The folder of a world of two steps of training."""
    return words.build(rollout, MICRO, tmp_path_factory.mktemp("words"))


def test_a_world_is_a_pair_of_models_and_two_files(micro):
    for name in ("student", "teacher"):
        AutoModelForCausalLM.from_pretrained(micro / name)
        assert len(AutoTokenizer.from_pretrained(micro / name)) == len(words.make_tokenizer())
    rows = {name: data.read_jsonl(micro / f"{name}.jsonl") for name in ("test", "train")}
    assert (len(rows["test"]), len(rows["train"])) == (5, 20)
    assert len({row["question"] for part in rows.values() for row in part}) == 25
    assert all(NUMBERS[row["answer"]] == counted(row["question"]) for row in rows["test"])


def test_the_teacher_is_trained_on_its_own_right_answers(tmp_path):
    """A sampler that answers the first half of the problems right, and the others wrong."""
    tokenizer = words.make_tokenizer()
    problems = [problem for problem, _ in drawn(6)]
    texts = [words.answer(p, AUTHOR, {})[0] for p in problems[:3]]
    texts += [words.answer(p, AUTHOR, {len(p.changes): ("final", -1)})[0] for p in problems[3:]]

    def sampler(model, prompts, horizon, eos_ids, noise):
        ids = [[*tokenizer.encode(f" {text}"), tokenizer.eos_token_id] for text in texts]
        ids[0] = ids[0][:-1]  # cut by the horizon
        width = max(map(len, ids))
        tokens = train.torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = train.torch.tensor([[i < len(row) for i in range(width)] for row in ids])
        return train.Rollout(prompts, tokens, mask, tokens.float(), mask.any(1))

    rows = words.right_answers(None, tokenizer, problems, 120, sampler)
    assert [tokenizer.decode(ids[:-1]).strip() for _, ids in rows] == texts[1:3]


def test_a_seed_redraws_everything_and_decides_everything(micro, tmp_path):
    same = contents(words.build(rollout, MICRO, tmp_path / "same"))
    other = contents(words.build(rollout, replace(MICRO, seed=1), tmp_path / "other"))
    assert same == contents(micro)
    assert all(same[name] != other[name] for name in ("model.safetensors", "train.jsonl", "test.jsonl"))
    authors = [words.draw_authors(words.Recipe(seed)) for seed in (0, 0, 1)]
    assert authors[0] == authors[1] != authors[2]


def test_the_cache_depends_on_recipe_and_source_alone(tmp_path, monkeypatch):
    name = words.folder_of(MICRO, tmp_path / "a").name
    assert name == words.folder_of(MICRO, tmp_path / "b").name
    assert name != words.folder_of(replace(MICRO, rounds=2), tmp_path / "a").name
    source = tmp_path / "words.py"
    source.write_text("changed")
    for module in (words, toy):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(source))
            assert words.folder_of(MICRO, tmp_path / "a").name != name


def test_a_world_that_exists_is_not_built_again(micro):
    assert words.build(None, MICRO, micro.parent) == micro


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="writable"):
        words.build(rollout, MICRO, cache=tmp_path / "file")


def test_the_preset_trains(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "folder_of", lambda recipe, cache: micro)
    flags = "--steps 1 --batch-size 2 --max-new-tokens 8 --eval-limit 2 --eval-batch 2 --eval-every 0"
    argv = f"train.py --preset words {flags} --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", argv.split())
    train.main()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == str(micro) and config["lr"] == words.PRESET["lr"] and not config["instruction"]


@pytest.mark.parametrize("flags", ["--data=missing.jsonl", "--student=./missing", "--world=closing"])
def test_bad_input_is_found_before_the_world_is_built(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(words, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset=words", flags])
    with pytest.raises(BadInput) as error:
        train.main()
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_problems_read_before_the_world_is_built_may_have_other_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(words, "CACHE", tmp_path / "cache")
    (tmp_path / "own.jsonl").write_text('{"q": "1 + 1?"}\n')
    flags = "--data=own.jsonl --question-column=q --eval-limit=0 --student=./missing"
    monkeypatch.setattr(sys, "argv", f"train.py --preset=words {flags}".split())
    with pytest.raises(BadInput, match="./missing does not exist"):
        train.main()


def test_the_preset_is_chosen_by_name_alone():
    assert run_folder.preset_of({}, default="toy") == "toy"
    assert run_folder.world_preset("words", "") == words.preset()
    assert run_folder.world_preset("qwen", "") == {}
