"""The page of a run: its numbers, its text, its size, and how it behaves in a browser where there is one."""

import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import Bytes, load_pair, pair_of, tiny

import train
from extras import view
from extras.profile_horizon import horizon_of_profile
from rollout import Rollout, rollout, sampling_noise
from support import data, run_folder
from support.cli import BadInput
from support.prompts import render

HOSTILE = "a</script><script>document.title='x'</script><!-- &amp; <b>\n\t\x1b[31m\u202e\u2028é😀 "


class Data(HTMLParser):
    """The content of the script element with the data, as a browser splits the page."""

    def __init__(self, text: str):
        super().__init__()
        self.inside, self.scripts, self.found = False, 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.inside = ("id", "data") in attributes

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        self.found += text if self.inside else ""


def data_of(path: Path) -> dict:
    return json.loads(Data(path.read_text(encoding="utf-8")).found)


def run_view(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["view", *map(str, arguments)])
    view.main()


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """The folder of a short toy run."""
    folder = tmp_path_factory.mktemp("view") / "run"
    flags = "--preset toy --steps 2 --eval-limit 3 --eval-batch 3 --max-new-tokens 40 --show-every 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags.split(), "--out", str(folder)])
        train.main()
    return folder


def close(found: list[int], right: torch.Tensor, unit: float) -> bool:
    found = torch.tensor(found) / unit
    return torch.allclose(found, right.flatten().float(), rtol=0, atol=0.51 / unit)


def test_the_numbers_are_those_of_train_score_and_of_the_models(run, monkeypatch):
    run_view(monkeypatch, run, "--answers", 2, "--teacher")
    content = data_of(run / "view.html")
    assert [a["writer"] for a in content["problems"][1]["answers"]] == ["before", "after", "teacher"]
    knobs = run_folder.resumed(train.Knobs, {"resume": str(run)})
    pair = load_pair(run / "student", knobs.teacher)
    problems = data.train_and_test(knobs.data, "", 3, knobs.seed)[1][:2]
    prompts = render(pair.tokenizer, problems, "")
    noise = sampling_noise([(knobs.seed, "view", i) for i in range(2)], 40)
    rollouts = rollout(pair.student, prompts, 40, pair.eos_ids, noise, vocab_size=pair.vocab_size)
    with torch.no_grad():
        _, right = train.score(pair, rollouts)
    for row, problem in enumerate(content["problems"]):
        found = problem["answers"][1]  # the student after the run
        of_row = right["row"] == row
        tokens = rollouts.tokens[row][rollouts.response_mask[row]]
        texts = [content["texts"][i] for i in found["tokens"]]
        assert problem["question"] == problems[row].question
        assert "".join(texts) == pair.tokenizer.decode(tokens)
        assert close(found["kl"]["after"], right["reverse_kl"][of_row], 1e4)
        for name, role in (("after", "student"), ("teacher", "teacher")):
            assert close(found["logp"][name], right[f"{role}_logp"][of_row], 1e3)
            assert close(found["entropy"][name], right[f"{role}_entropy"][of_row], 1e3)
            text = torch.tensor([prompts[row] + tokens.tolist()])
            with torch.no_grad():
                logits = getattr(pair, role)(text).logits[0, len(prompts[row]) - 1 : -1, : pair.vocab_size]
            p, ids = logits.softmax(-1).topk(5)
            assert close(found["p"][name], p, 1e3)
            likeliest = [content["texts"][i] for i in found["ids"][name][::5]]
            assert likeliest == [pair.tokenizer.decode([i]) for i in ids[:, 0].tolist()]
    before, after = (content["problems"][0]["answers"][1]["kl"][name] for name in ("before", "after"))
    assert before != after  # two students


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nb", "a↵\nb"),
        ("\t\r\x00", "⇥⟨U+000D⟩⟨U+0000⟩"),
        ("\x7f\u202e\u200b\ud800", "⟨U+007F⟩⟨U+202E⟩⟨U+200B⟩⟨U+D800⟩"),
        (" <b> & é 😀\\n", " <b> & é 😀\\n"),
    ],
)
def test_characters_that_do_not_show_become_visible(text, shown):
    assert view.visible(text) == shown


def test_the_data_cannot_leave_its_script_element():
    content = {"texts": [HOSTILE, "\ud800", "]]>", "{{data}}"]}
    page = view.page(content)
    assert json.loads(Data(page).found) == content
    assert Data(page).scripts == Data(view.page({})).scripts == 2
    assert page.encode()  # a lone surrogate has no bytes


def content_of(texts_of_tokens: list[list[int]], tokenizer, vocab_size: int) -> dict:
    """The content of a page of one problem an answer, by two random students and a random teacher."""
    settings = {"vocab_size": vocab_size, "max_position_embeddings": 600}
    before, after = (pair_of(tiny(seed, **settings), tiny(9, **settings)) for seed in (1, 2))
    texts = view.Texts(tokenizer)
    problems = []
    for tokens in texts_of_tokens:
        ids = torch.tensor([tokens])
        ones = torch.ones_like(ids, dtype=torch.bool)
        rollouts = Rollout([[1]], ids, ones, torch.zeros(ids.shape), torch.tensor([True]))
        scores = {"before": view.score(before, rollouts), "after": view.score(after, rollouts)}
        answers = [view.answer(texts, writer, rollouts, 0, scores) for writer in ("before", "after")]
        problems.append({"question": view.visible(HOSTILE), "gold": "1", "answers": answers})
    facts = {"run": "r", "horizon": 13, "top": 5, "units": view.UNITS, "student": "s", "teacher": "t"}
    facts |= {"schedule": "topd", "steps": 1, "max_new_tokens": 64, "temperature": 1.0}
    return {"facts": facts, "texts": list(texts.index), "problems": problems}


class Words:
    """A tokenizer of words of three to eight letters."""

    def decode(self, tokens):
        return "".join(f" {'abcdefgh'[: 3 + i % 6]}{i}" for i in map(int, tokens))


def test_twenty_answers_of_512_tokens_take_less_than_2_mb():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5000, (10, 512), generator=generator).tolist()
    content = content_of(tokens, Words(), 5000)
    assert sum(len(answer["tokens"]) for p in content["problems"] for answer in p["answers"]) == 20 * 512
    assert len(view.page(content).encode()) < 2e6


def test_wrong_input_is_named_and_nothing_is_written(run, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("student"))
    old = folder / "view.html"
    old.write_text("old")
    cases = [
        ([], "no run is named"),
        ([tmp_path / "none"], "name the folder of a run"),
        ([folder], "--resume"),
        ([folder, "--answers", "0"], "raise it"),
        ([folder, "other"], "--help"),
    ]
    for arguments, remedy in cases:
        with pytest.raises(BadInput, match=remedy):
            run_view(monkeypatch, *arguments)
    (folder / "student").mkdir()
    config = json.loads((run / "config.json").read_text())
    held_out = next(name for name in config["inputs"] if name.startswith("held-out"))
    others = config | {"inputs": config["inputs"] | {held_out: ""}}
    (folder / "config.json").write_text(json.dumps(others))
    with pytest.raises(BadInput, match=f"{held_out} changed since the run was started"):
        run_view(monkeypatch, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view.models, "load_tokenizers", lambda *given: ("one", "another"))
        with pytest.raises(BadInput, match="different tokenizers.*name a run with one tokenizer"):
            run_view(monkeypatch, folder)
    digests = config["digests"] | {"eval_limit": run_folder.hash_of_json(0)}
    for changed, remedy in (
        (config | {"unknown": 1}, "start a new one"),  # of another version
        (config | {"eval_limit": 0, "digests": digests}, "with --data"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput, match=remedy):
            run_view(monkeypatch, folder)
    assert old.read_text() == "old"


def test_a_page_is_replaced_at_the_end_only(tmp_path, monkeypatch):
    out = tmp_path / "view.html"
    out.write_text("old")

    def full(part):
        assert out.read_text() == "old" and part.read_text() == "new"
        raise OSError("no space left")

    monkeypatch.setattr(run_folder, "sync", full)
    with pytest.raises(BadInput, match="no space left.*make room"):
        view.write("new", out)
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"] and out.read_text() == "old"
    monkeypatch.undo()
    view.write("new", out)
    assert out.read_text() == "new"


@pytest.fixture(scope="module")
def content() -> dict:
    """Two problems, of which the first has answers with a hostile text."""
    return content_of([list(HOSTILE.encode()), list(b"another one")], Bytes(), 256)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, content, tmp_path):
    """The browser with the page just opened; afterwards its console has no errors."""
    path = tmp_path / "view.html"
    path.write_text(view.page(content), encoding="utf-8")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def script(page, expression: str, *arguments):
    return page.execute_script(f"return {expression}", *arguments)


def panel(page) -> str:
    return script(page, "document.getElementById('panel').innerText")


def test_the_text_is_shown_whole_and_harmless(page, content):
    answer = content["problems"][0]["answers"][0]
    shown = script(page, "document.querySelector('.text').textContent")
    assert shown == "".join(content["texts"][i] for i in answer["tokens"]) == view.visible(HOSTILE)
    assert page.title == "r, token by token"
    assert script(page, "document.querySelectorAll('.text b').length") == 0
    nodes = "[...document.querySelector('.text').children]"
    parts = script(page, f"{nodes}.map(node => [node.textContent, node.offsetWidth])")
    smile = [text for text, _ in parts].index("😀")
    assert [text for text, _ in parts[smile - 3 : smile]] == ["", "", ""]
    assert min(width for _, width in parts[smile - 3 : smile]) > 4  # each can be pointed at


def test_hover_shows_what_all_models_expected(page, content):
    from selenium.webdriver import ActionChains

    answer = content["problems"][0]["answers"][1]
    token = page.find_elements("css selector", ".text")[1].find_elements("css selector", ".token")[4]
    ActionChains(page).move_to_element(token).perform()
    assert "Token 5 of" in panel(page) and "student after training" in panel(page)
    rows = "[...document.querySelectorAll(`[data-model=${arguments[0]}] tr`)].map(row => row.innerText)"
    for model in ("before", "after", "teacher"):
        found = [float(row.split()[-1]) for row in script(page, rows, model)]
        assert found == [p / 1e3 for p in answer["p"][model][20:25]]
        assert f"{answer['entropy'][model][4] / 1e3:.2f}" in panel(page)


def test_arrow_keys_move_the_focus(page):
    from selenium.webdriver import Keys

    tokens = page.find_elements("css selector", ".text")[1].find_elements("css selector", ".token")
    page.execute_script("arguments[0].focus()", tokens[0])
    moves = [(Keys.RIGHT, 2), (Keys.RIGHT, 3), (Keys.LEFT, 2), (Keys.END, len(tokens)), (Keys.HOME, 1)]
    for key, position in moves:
        page.switch_to.active_element.send_keys(key)
        assert f"Token {position} of" in panel(page)
    page.switch_to.active_element.send_keys(Keys.DOWN)
    focused = page.switch_to.active_element
    assert focused.location["y"] > tokens[0].location["y"]
    label = focused.get_attribute("aria-label")
    assert label.startswith("token ") and "reverse KL" in label
    assert focused.get_attribute("tabindex") == "0" and tokens[0].get_attribute("tabindex") == "-1"
    focused.send_keys(Keys.UP)
    assert page.switch_to.active_element == tokens[0]


def test_the_horizon_greys_out_what_lies_beyond_it(page, content):
    tokens = sum(len(answer["tokens"]) for answer in content["problems"][0]["answers"])
    slider = "h = document.getElementById('horizon'); h.value = arguments[0];"
    places = []
    for horizon in (13, 1, 40):
        page.execute_script(slider + "h.dispatchEvent(new Event('input'))", horizon)
        assert script(page, "document.querySelectorAll('.unseen').length") == tokens - 2 * horizon
        assert f"H = {horizon} tokens" in page.find_element("id", "length").text
        places.append(float(script(page, "document.querySelector('svg .horizon').getAttribute('x1')")))
    assert places[1] < places[0] < places[2]


def test_colours_and_the_45_percent_mark_follow_the_measure_and_the_student(page, content):
    seen = []
    for choice in ("kl", "gap", "after"):
        page.find_element("css selector", f"input[value={choice}]").click()
        colour = script(page, "document.querySelector('.token').style.background")
        seen.append((colour, script(page, "document.getElementById('scale').innerText")))
    assert len({colour for colour, _ in seen}) == 3
    assert "−5+" in seen[1][1] and "−5+" not in seen[0][1]
    answers = content["problems"][0]["answers"]
    gap = answers[0]["logp"]["teacher"][0] - answers[0]["logp"]["after"][0]
    assert ("blue" if gap > 0 else "orange") in seen[2][0]
    for a, answer in enumerate(answers):
        kl = torch.tensor(answer["kl"]["after"]) / 1e4
        mark = script(page, "document.querySelectorAll('svg')[arguments[0]].dataset.mark", a)
        assert int(mark) == horizon_of_profile(kl, torch.arange(len(kl)))


def test_the_next_problem(page):
    page.find_element("id", "next").click()
    assert script(page, "document.querySelector('.text').textContent") == "another one"
    page.find_element("id", "next").click()
    assert script(page, "document.getElementById('problem').value") == "0"
