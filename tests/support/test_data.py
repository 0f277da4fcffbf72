"""Problems of every format and layout, rows that are refused, and the order in which steps use problems."""

import contextlib
import gzip
import json
import time

import pyarrow.parquet
import pytest

from support import data
from support.cli import BadInput
from support.data import Layout, Problem


def written(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


SOLUTION = "First we add 2 and 3, which gives the number 5. Then we see that the sum of both is 5."
LAYOUTS = {  # data set: (its row, the question, the final answer)
    "GSM8K": ({"question": "q", "answer": "2+3=<<2+3=5>>5\n#### 1,234"}, "q", "1,234"),
    "MATH": (
        {"problem": "q", "level": "Level 5", "solution": r"so $\boxed{\frac{1}{2}}$."},
        "q",
        r"\frac{1}{2}",
    ),
    "MATH-500": ({"problem": "q", "solution": SOLUTION, "answer": "p - q", "level": 2}, "q", "p - q"),
    "NuminaMath": (
        {"source": "s", "problem": "q", "solution": r"\boxed{1} or \boxed{2}", "messages": user("q", "a")},
        "q",
        "2",
    ),
    "DAPO": (
        {"prompt": user("q"), "reward_model": {"ground_truth": "34", "style": "rule"}, "ability": "MATH"},
        "q",
        "34",
    ),
    "OpenR1-Math": (
        {"problem": "q", "answer": "7", "solution": SOLUTION, "messages": user("q", "a")},
        "q",
        "7",
    ),
    "MetaMathQA": (
        {"query": "q", "original_question": "o", "response": f"{SOLUTION}\n#### 5\nThe answer is: 5"},
        "q",
        "5",
    ),
    "MetaMathQA with a box": (
        {"query": "q", "response": r"It is $\boxed{\frac12}$. The answer is: $\frac12$."},
        "q",
        r"$\frac12$",
    ),
    "answers of a model": ({"query": "q", "response": "so 12", "answer": "13"}, "q", "13"),
    "DeepMath": ({"question": "q", "final_answer": "0", "r1_solution_1": SOLUTION}, "q", "0"),
    "Big-Math": ({"problem": "q", "answer": r"3 \text{ cm}", "source": "s"}, "q", r"3 \text{ cm}"),
    "OlympiadBench": ({"question": "q", "solution": [SOLUTION], "final_answer": ["1", 2.0]}, "q", "1, 2"),
    "plain prompt": ({"prompt": "q", "answer": "5"}, "q", "5"),
    "equal columns": ({"prompt": "q", "question": "q", "answer": "5"}, "q", "5"),
    "empty columns": ({"question": None, "problem": "q", "answer": "", "solution": "5"}, "q", "5"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_public_data_sets(tmp_path, name):
    row, question, answer = LAYOUTS[name]
    path = written(tmp_path / "p.jsonl", [row])
    assert data.read_problems(path, "train") == [Problem(question, answer)]


def test_columns_by_name(tmp_path):
    row = {"question": "q", "text": {"body": "b"}, "a.b": "dotted", "a": {"c": 1}, "answer": SOLUTION}
    path = written(tmp_path / "p.jsonl", [row])
    for layout, found in [
        (Layout("text.body", "a.c"), ("b", "1")),
        (Layout("a.b", "question"), ("dotted", "q")),
    ]:
        assert data.read_problems(path, "train", layout) == [Problem(*found)]


ANSWERS = [  # a gold answer as it is written, and as it is read
    (7, "7"),
    (5.0, "5"),
    (0.25, "0.25"),
    (-0.0, "0"),
    (10**30, "1" + "0" * 30),
    (10**400, "1" + "0" * 400),
    (1e30, "1e+30"),
    ("None", "None"),
    ("nan", "nan"),
    ("27.0", "27.0"),
    (" 5 ", "5"),
    (["1", 2], "1, 2"),
    ("x #### 7", "7"),
    ("The final answer is: 42.", "42"),
    ("#### Step 1\nadd\n#### 7\nThe answer is: 7", "7"),
    ("so #### 7 The answer is: 7", "7"),
    ("Answer: 7", "7"),
    ("x_1 = 1\nx_2 = 7", "x_1 = 1\nx_2 = 7"),
    ("3 + 4 = 7\n**Final answer:** 7.", "7"),
    ("\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"),
    (r"The answer is \boxed{\{1, 2\}}.", r"\{1, 2\}"),
    (r"\boxed{\text{A} \fbox{} }", r"\text{A} \fbox{}"),
    ("x = 1 or x = 2. Mr. Wu", "x = 1 or x = 2. Mr. Wu"),
    ("+".join(f"{i}x^{{{i}}}" for i in range(40)), "+".join(f"{i}x^{{{i}}}" for i in range(40))),
    # and those that cannot be read, with what the line says
    (None, BadInput("has an empty answer in answer")),
    ("", BadInput("has an empty answer")),
    (" ", BadInput("has an empty answer")),
    ([], BadInput("has an empty answer")),
    (float("nan"), BadInput("has an empty answer")),
    (float("inf"), BadInput("inf in answer, which is not a finite number")),
    (True, BadInput("has a bool in answer")),
    ({"value": 5}, BadInput("has a dict in answer")),
    ([["1"], ["2"]], BadInput("has a list in answer")),
    (["1", None], BadInput("has an empty part of the answer in answer")),
    (["1", ""], BadInput("has an empty part of the answer in answer")),
    ("The answer is 42, which is 6 times 7", BadInput("not marked by")),
    ("The answer is: " + SOLUTION, BadInput("not marked by")),
    ("#### Solution\nWe add.", BadInput("not marked by")),
    ("so\n####", BadInput("not marked by")),
    ("Final Answer: The final answer is 4", BadInput("not marked by")),
    ("3 + 2 = 5\n10 / 2 = 5", BadInput("not marked by")),
    ("['5']", BadInput("has a list written as text in answer")),
    ('["5", "6"]', BadInput("has a list written as text in answer")),
    ("['5' '6']", BadInput("has a list written as text in answer")),
    ("\ud800", BadInput("half of a surrogate pair in answer")),
    (SOLUTION, BadInput("not marked by")),
    (
        "so we add the next of these numbers again " * 8,
        BadInput("name the column of answers by --answer-column"),
    ),
    ("9" * 501, BadInput("a solution of 501 characters")),
    ("#### 5\nbecause 2 + 3 is 5", BadInput("not marked by")),
    (r"the cut \boxed{5", BadInput("not marked by")),
    (r"\boxed{5} #### 6", BadInput("has the final answers '6' and '5' in answer, which differ")),
]


@pytest.mark.parametrize(
    "text", ["#### " * 100_000 + "\nx", "the answer is: " * 50_000, r"\boxed{" * 100_000]
)
def test_answers_are_read_in_linear_time(text):
    started = time.time()
    with contextlib.suppress(data.BadRow):
        data.final_answer(text, "answer")
    assert time.time() - started < 2


@pytest.mark.parametrize("answer, found", ANSWERS, ids=lambda value: repr(value)[:30])
def test_answers(tmp_path, answer, found):
    path = written(tmp_path / "p.jsonl", [{"question": "q", "answer": answer}])
    if isinstance(found, str):
        assert data.read_problems(path, "test") == [Problem("q", found)]
        return
    with pytest.raises(BadInput, match="^1 of 1 rows of .*p.jsonl cannot be used: line 1 ") as error:
        data.read_problems(path, "test")
    assert str(found) in str(error.value)
    (problem,) = data.read_problems(path, "train", answers="optional")
    assert problem.answer is None and str(found) in problem.fault


BAD_ROWS = [  # a line of a file, and why it cannot be used even to train on
    (
        {"answer": "5", "text": "q"},
        "no column question or problem or query or prompt, only answer, text: name the column by --question",
    ),
    ({"question": None, "answer": "5"}, "has an empty question in question"),
    ({"question": " ", "answer": "5"}, "has an empty question in question"),
    ({"question": "q", "prompt": "p", "answer": "5"}, "both question and prompt, which differ"),
    ({"question": {"text": "q"}, "answer": "5"}, "has a dict in question"),
    ({"question": ["a", "b"], "answer": "5"}, "has a list in question"),
    ({"question": [["a"]], "answer": "5"}, "has a list in question"),
    ({"question": True, "answer": "5"}, "has a bool in question"),
    ({"prompt": user("a", "b"), "answer": "5"}, "a chat of the roles user, user in prompt"),
    ({"prompt": [{"role": "system", "content": "s"}, *user("q")], "answer": "5"}, "give --system-prompt"),
    ({"prompt": [{"role": "assistant", "content": "s"}], "answer": "5"}, "the roles assistant"),
    ({"prompt": user([{"type": "text", "text": "q"}]), "answer": "5"}, "has a list in prompt"),
    ({"prompt": user(" "), "answer": "5"}, "has an empty question in prompt"),
    ({"question": "a\ud800", "answer": "5"}, "half of a surrogate pair in question"),
    (r'{"question": "q", "answer": "\frac{1}{2}"}', r"has '\x0crac{' in answer"),
    (r'{"question": "q", "answer": "\text{yes}"}', r"has '\text{' in answer"),
    (r'{"question": "q", "answer": "\rho + 1"}', r"has '\rho' in answer"),
    (r'{"question": "\forall x", "answer": "1"}', r"has '\x0corall' in question"),
    (r'{"question": "q", "answer": "x \neq 3"}', r"has '\neq' in answer"),
    ({"question": "q", "answer": "<think> \\boxed{4}"}, "has no answer after its reasoning in answer"),
    ({"question": "x" * 200_001, "answer": "5"}, "200,001 characters"),
    ('{"question": "q", "answer": 1e400}', "inf in answer"),
    ("[" * 100_000, "cannot be read"),
    ('{"question": "q", "answer": ' + "9" * 5000 + "}", "cannot be read"),
    ("[1, 2]", "not a JSON object"),
    ("null", "not a JSON object"),
    ('{"question": "q", "answ', "cannot be read"),
    ("{}", "only an empty object"),
]


@pytest.mark.parametrize("row, why", BAD_ROWS, ids=lambda value: str(value)[:30])
def test_bad_rows_are_named_and_skipped_on_demand(tmp_path, capsys, row, why):
    good = {"question": "q", "answer": "5"}
    path = written(tmp_path / "p.jsonl", [good, "", row, good])
    with pytest.raises(BadInput) as error:
        data.read_problems(path, "test")
    line = str(error.value)
    assert line.startswith(f"1 of 3 rows of {path} cannot be used: line 3 ") and why in line
    assert line.endswith("or add --skip-bad-rows") and "\n" not in line and len(line) < 600
    assert data.read_problems(path, "test", Layout(skip_bad_rows=True)) == [Problem("q", "5")] * 2
    assert f"1 of 3 rows of {path} cannot be used and are skipped: line 3 " in capsys.readouterr().out


def test_the_first_three_of_many_bad_rows_are_named(tmp_path, capsys):
    rows = [{"question": str(i), "answer": None if i % 2 else "5"} for i in range(10)]
    path = written(tmp_path / "p.jsonl", rows)
    assert len(data.read_problems(path, "test", Layout(skip_bad_rows=True))) == 5
    out = capsys.readouterr().out
    assert out.startswith("5 of 10 rows") and [f"line {i}" in out for i in (2, 4, 6, 8)] == [True] * 3 + [
        False
    ]
    assert len(data.read_problems(path, "train", answers="optional")) == 10
    assert not capsys.readouterr().out
    with pytest.raises(BadInput, match="10 of 10 rows .* cannot be used: line 1 ") as error:
        data.read_problems(path, "test", Layout(answer_column="gold", skip_bad_rows=True))
    assert "has no column gold, only question, answer: name the column by --answer-column" in str(error.value)


def test_training_needs_no_answers(tmp_path):
    """Held-out problems do: they are drawn from those that have one, the same ones if all have."""
    rows = [{"problem": f"q{i}", "answer": None if i % 2 else "5"} for i in range(20)]
    path = written(tmp_path / "p.jsonl", rows)
    problems, test = data.train_and_test(path, "", 10, 0)
    assert len(problems) == len(test) == 10 and all(p.answer == "5" for p in test)
    assert {p.question for p in test} == {f"q{i}" for i in range(0, 20, 2)}
    assert all(p.answer is None for p in data.train_and_test(path, "", 0, 0)[0])  # not read

    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}  "} for i in range(20)])
    rest, test = data.train_and_test(prompts, path, 5, 0, Layout(skip_bad_rows=True))
    assert len(rest) == 15 and not {p.question.strip() for p in rest} & {p.question for p in test}
    assert not any(p.fault for p in rest)
    with pytest.raises(
        BadInput, match="10 of 20 rows of .*p.jsonl cannot be used: line 2 has an empty answer"
    ):
        data.train_and_test(prompts, path, 5, 0)
    with pytest.raises(
        BadInput, match="only 0 problems with an answer, and 5 .*line 1 has no column answer or"
    ):
        data.train_and_test(prompts, "", 5, 0)


def unreadable(folder):
    """Files and names that cannot be read, and what the line says."""
    good = '{"question": "q", "answer": "5"}\n'
    (folder / "zipped.jsonl").write_bytes(gzip.compress(good.encode()))
    (folder / "wide.jsonl").write_text(good, encoding="utf-16")
    (folder / "latin.csv").write_text("question,answer\n\u00e9,5\n", encoding="latin-1")
    (folder / "twice.csv").write_text("question,answer,answer\nq,5,6\n")
    (folder / "open.csv").write_text('question,answer\n"q,5\n')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "broken.json").write_text('[{"question": ')
    (folder / "broken.parquet").write_text("PAR1")
    (folder / "folder.jsonl").mkdir()
    (folder / "both").mkdir()
    for suffix in ("json", "csv"):
        (folder / "both" / f"test.{suffix}").write_text(good)
    not_utf_8 = "line 1 cannot be read ('utf-8' codec can't decode"
    found = {"zipped.jsonl": not_utf_8, "wide.jsonl": not_utf_8, "latin.csv": "text in UTF-8"}
    found |= {"twice.csv": "names a column twice", "open.csv": "unexpected end of data"}
    found |= {"deep.json": "RecursionError", "broken.json": "JSONDecodeError", "broken.parquet": "Arrow"}
    found |= {"folder.jsonl": "has no test.jsonl", "both": "has test.csv and test.json"}
    found |= {"x" * 256 + ".jsonl": "File name too long", "a\0b.jsonl": "does not exist"}
    return found


def test_files_that_cannot_be_read(tmp_path):
    for name, says in unreadable(tmp_path).items():
        for layout in (Layout(), Layout(skip_bad_rows=True)):
            with pytest.raises(BadInput) as error:
                data.read_problems(str(tmp_path / name), "test", layout)
            assert says in str(error.value) and "\n" not in str(error.value), name


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = written(tmp_path / "p.jsonl", [])

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)  # chmod does not stop root
    with pytest.raises(BadInput, match="cannot read data .*p.jsonl .*Permission denied"):
        data.read_problems(path, "train")


def test_cells_of_a_csv_file_are_text(tmp_path):
    """ "None" and "nan" are answers, an empty cell is missing, and a float is written as 5.0."""
    cells = {"None": "None", "nan": "nan", "NA": "NA", "007": "007", "5.0": "5", "1e400": "1e400", "": None}
    cells |= {"True": "True", '"1,5"': "1,5", '"a\n""b"""': 'a\n"b"'}
    (tmp_path / "p.csv").write_text("\ufeffquestion,answer\r\n" + "".join(f"q,{c}\r\n" for c in cells))
    problems = data.read_problems(str(tmp_path / "p.csv"), "train", answers="optional")
    assert [p.answer for p in problems] == list(cells.values())
    (tmp_path / "p.csv").write_text("question,answer\nq,5\nq\nq,5,6\n")
    with pytest.raises(BadInput, match="2 of 3 rows .* row 2 has 1 cells, the header 2"):
        data.read_problems(str(tmp_path / "p.csv"), "train")


def test_numbers_of_32_bits_in_a_parquet_file(tmp_path):
    """0.1 was read as 0.10000000149011612, so that the right answer was wrong."""
    golds = pyarrow.array([0.1, 2.5, 7, 1e-7], pyarrow.float32())
    table = pyarrow.table({"question": ["a", "b", "c", "d"], "answer": golds})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    problems = data.read_problems(str(tmp_path / "p.parquet"), "train")
    assert [problem.answer for problem in problems] == ["0.1", "2.5", "7", "1e-07"]


@pytest.mark.parametrize("name, form", [("p.jsonl", "{}\n"), ("p.json", "[{}]")])
def test_a_field_that_is_named_twice(tmp_path, name, form):
    """Python would keep the last one in silence."""
    (tmp_path / name).write_text(form.format('{"question": "q", "answer": "5", "answer": "6"}'))
    with pytest.raises(BadInput, match="names 'answer' twice"):
        data.read_problems(str(tmp_path / name), "train")


def test_numbers_and_chats_of_a_parquet_file(tmp_path):
    from datasets import Dataset

    columns = {"prompt": [user("a"), user("b"), user("c")], "answer": [5.0, None, float("nan")]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "p.parquet")
    problems = data.read_problems(str(tmp_path / "p.parquet"), "train", answers="optional")
    assert [p[:2] for p in problems] == [("a", "5"), ("b", None), ("c", None)]


def test_json_arrays(tmp_path):
    (tmp_path / "p.json").write_text('[{"question": "q", "answer": 5}, {"question": "q", "answer": "x"}, 3]')
    with pytest.raises(BadInput, match="1 of 3 rows .* row 3 is not a JSON object: 3"):
        data.read_problems(str(tmp_path / "p.json"), "test")
    problems = data.read_problems(str(tmp_path / "p.json"), "test", Layout(skip_bad_rows=True))
    assert problems == [Problem("q", "5"), Problem("q", "x")]


def test_lines_end_at_newlines_alone(tmp_path):
    """U+2028 inside a JSON string ends no line: GSM8K has one, and str.splitlines breaks there."""
    path = tmp_path / "u.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "x #### 7"}\r\n\n', encoding="utf-8-sig")
    assert data.read_problems(str(path), "train") == [Problem("a\u2028b", "7")]


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_formats_give_the_same_problems(tmp_path, suffix):
    from datasets import Dataset

    table = Dataset.from_dict({"problem": ["a", "b"], "answer": ["1", "2"]})
    getattr(table, f"to_{suffix}")(tmp_path / f"p.{suffix}")
    assert data.read_problems(str(tmp_path / f"p.{suffix}"), "train") == [
        Problem("a", "1"),
        Problem("b", "2"),
    ]


def test_unusual_data_that_is_valid(tmp_path):
    """CRLF, a byte order mark, answers that are numbers or lists, right-to-left text, a problem twice."""
    same = '{"question": "x=3, then +4 fiftytwo times", "answer": "1"}'
    rows = ['{"problem": "שלום 2+2", "answer": [1, 2]}', '{"problem": "x", "answer": 7}', same, same]
    path = tmp_path / "with space.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")
    found = data.read_problems(str(path), "train")
    assert [p.answer for p in found] == ["1, 2", "7", "1", "1"]
    assert found[0].question == "שלום 2+2"
    train_on, test = data.train_and_test(str(path), "", 1, 0)
    assert not {p.question for p in train_on} & {p.question for p in test}


def test_held_out_problems_that_repeat_are_left_out(tmp_path, capsys):
    """Each would count as a problem of its own in the interval."""
    problems = [Problem(f"{text} ?", answer) for text, answer in ("a1", "b2", "a1", "a3", "b2")]
    assert data.distinct([*problems, Problem(" a  ?", "1")], "x") == [problems[i] for i in (0, 1, 3)]
    assert "3 of 6 problems of x repeat another one: each is evaluated once" in capsys.readouterr().out
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"question": f"q {i % 4}", "answer": "1"}) + "\n" for i in range(20)))
    problems, test = data.train_and_test(str(path), "", 3, 0)
    assert len({p.question for p in test}) == 3 and len({p.question for p in problems}) == 1
    with pytest.raises(BadInput, match="only 4 problems with an answer, and 5 .*each counted once"):
        data.train_and_test(str(path), "", 5, 0)


def test_limit_is_a_seeded_random_subset():
    problems = [Problem(str(i), "1") for i in range(100)]
    first = data.subset(problems, 20, 0)
    assert first == data.subset(problems, 20, 0) != data.subset(problems, 20, 1)
    assert first != problems[:20]


def test_batches_repeat_by_seed_and_use_every_prompt_once_an_epoch():
    first = [data.batch_indices(10, 4, step, 7) for step in range(5)]
    assert first == [data.batch_indices(10, 4, step, 7) for step in range(5)]
    assert first != [data.batch_indices(10, 4, step, 8) for step in range(5)]
    flat = sum(first, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    two_epochs_and_more = data.batch_indices(3, 7, 0, 0)
    assert sorted(two_epochs_and_more[:6]) == [0, 0, 1, 1, 2, 2]
