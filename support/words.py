"""A world in which nobody places the gap between student and teacher: counting aloud, in eight styles.

    user       first , sam has eight coins . friday plusthree . saturday minustwo . how many ?
    assistant  we count : at first eight . friday plusthree , eight to eleven . ... so \\boxed{ nine }

Every author of the training texts has a style and slips of its own, and a slip can happen at any step. The
student learns from texts of all authors. The teacher is the same student after expert iteration: it answers
problems and is trained on its own right answers, round by round. Where the two differ is for them to find.

    python train.py --preset words --steps 1     builds student/, teacher/, train.jsonl and test.jsonl first
"""

import hashlib
import json
import random
import re
import shutil
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2Tokenizer

from support import toy
from support.cli import BadInput
from support.toy import make_model, word

CACHE = Path(__file__).parents[1] / ".cache" / "words"
NAMES = ("sam", "ann", "tom", "eve")
THINGS = ("coins", "cards", "shells", "stones")
WEEK = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# An author's style is one of each. {before} and {after} are the running total around a step.
OPENINGS = ("we count :", "let us see .", "day by day :", "the work :", "well ,", "count :")
STARTS = ("at first {start} .", "{name} has {start} .", "start : {start} {thing} .", "{start} to begin .")
DAYS = ("{day}", "on {day}", "then {day}", "next , {day}")
STEPS = (
    "{change} , {before} to {after} .",
    "{change} : {before} becomes {after} .",
    "{change} on {before} is {after} .",
    "{change} turns {before} into {after} ;",
    "{change} . from {before} to {after} .",
    "{change} , so {before} is now {after} .",
)
RECAPS = ("", "no more days .", "{day} was last .", "that is all .")
CLOSES = ("so", "answer :", "{name} has", "the result is")
SLIPS = ("misread", "sign", "sum", "skip", "carry", "final")
LARGEST = 18  # total of a problem
LARGEST_CHANGE = 6  # of the total, in a day
LIMIT = 24  # the largest total in a text, right or wrong
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)

PRESET = {  # train.py's settings for this world
    "instruction": "",
    "max_new_tokens": 100,
    "steps": 40,
    "batch_size": 32,
    "micro_batch": 8192,
    "checkpointing": False,
    "lr": 1e-3,
    "eval_every": 10,
    "eval_limit": 500,
    "eval_batch": 250,
    "eval_temperature": 1.0,
    "dtype": "float32",
}

Row = tuple[list[int], list[int]]  # ids of a prompt and of an answer


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the models; the cache is keyed by it."""

    seed: int = 0
    authors: int = 8
    slip_rate: float = 0.15  # of a step
    days: tuple[int, int] = (3, 6)
    width: int = 64
    batch: int = 16
    pretrain_steps: int = 1500
    lr: float = 6e-3
    rounds: int = 8  # of expert iteration: questions, then steps on the right answers
    questions: int = 1600
    kept: int = 2400  # right answers, the latest
    round_steps: int = 350
    round_lr: float = 3e-3
    horizon: int = 100  # of an answer, in tokens
    held_out: int = 1000
    problems: int = 5000  # in train.jsonl


def signed(change: int) -> str:
    """A change as one word, hence one token."""
    return f"{'minus' if change < 0 else 'plus'}{word(abs(change))}"


@dataclass(frozen=True)
class Problem:
    name: str
    thing: str
    start: int
    first_day: int
    changes: tuple[int, ...]  # of the total, one a day

    def day(self, step: int) -> str:
        return WEEK[(self.first_day + step) % 7]

    def question(self) -> str:
        steps = [f"{self.day(step)} {signed(change)} ." for step, change in enumerate(self.changes)]
        return f"first , {self.name} has {word(self.start)} {self.thing} . {' '.join(steps)} how many ?"

    def result(self) -> int:
        return self.start + sum(self.changes)


@dataclass(frozen=True)
class Author:
    opening: str
    start: str
    day: str
    step: str
    recap: str
    close: str
    slips: tuple[float, ...]  # weight of each of SLIPS


def draw_authors(recipe: Recipe) -> list[Author]:
    rng = random.Random(f"authors {recipe.seed}")
    pieces = (OPENINGS, STARTS, DAYS, STEPS, RECAPS, CLOSES)
    return [
        Author(*map(rng.choice, pieces), tuple(rng.random() for _ in SLIPS)) for _ in range(recipe.authors)
    ]


def draw_problem(recipe: Recipe, rng: random.Random) -> Problem:
    """A problem whose running total stays between 1 and LARGEST."""
    start = total = rng.randint(1, LARGEST)
    changes = []
    for _ in range(rng.randint(*recipe.days)):
        possible = [c for c in range(-LARGEST_CHANGE, LARGEST_CHANGE + 1) if c and 1 <= total + c <= LARGEST]
        changes.append(rng.choice(possible))
        total += changes[-1]
    return Problem(rng.choice(NAMES), rng.choice(THINGS), start, rng.randrange(7), tuple(changes))


def draw_slips(
    problem: Problem, author: Author, rate: float, rng: random.Random
) -> dict[int, tuple[str, int]]:
    """{step: (kind, 1 or -1)}; the step after the last one is the box, where `final` alone happens."""
    slips = {}
    for step in range(len(problem.changes) + 1):
        if rng.random() < rate:
            kind = rng.choices(SLIPS, author.slips)[0]
            if (kind == "final") == (step == len(problem.changes)):
                slips[step] = (kind, rng.choice((-1, 1)))
    return slips


def answer(problem: Problem, author: Author, slips: dict[int, tuple[str, int]]) -> tuple[str, int] | None:
    """The text of an answer and its result, with the given slips; None if a total leaves 0 to LIMIT.

    misread   an amount is one more or less than in the question
    sign      a gain is taken for a loss, or the reverse
    sum       a step's result is wrong by one
    skip      a day is left out
    carry     a step starts from a total wrong by one
    final     the box differs from the last total by one
    """
    total = problem.start
    about = {"name": problem.name, "thing": problem.thing, "start": word(total)}
    texts = [author.opening, author.start.format(**about)]
    for step, change in enumerate(problem.changes):
        kind, off = slips.get(step, ("", 0))
        if kind == "skip":
            continue
        before = total + off * (kind == "carry")
        size = abs(change) + off * (kind == "misread")
        gain = (change > 0) != (kind == "sign")
        change = size if gain else -size
        total = before + change + off * (kind == "sum")
        if not (0 <= before <= LIMIT and 0 <= total <= LIMIT):
            return None
        texts.append(author.day.format(day=problem.day(step)))
        texts.append(author.step.format(change=signed(change), before=word(before), after=word(total)))
    total += slips.get(len(problem.changes), ("", 0))[1]
    if not 0 <= total <= LIMIT:
        return None
    texts.append(author.recap.format(day=problem.day(len(problem.changes) - 1)))
    texts.append(f"{author.close.format(**about)} \\boxed{{ {word(total)} }}")
    return " ".join(filter(None, texts)), total


def draw_answer(problem: Problem, authors: list[Author], rate: float, rng: random.Random) -> str:
    """An answer of a random author, slips included; drawn again if a total has no word."""
    while True:
        author = rng.choice(authors)
        found = answer(problem, author, draw_slips(problem, author, rate, rng))
        if found:
            return found[0]


def make_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen's kind, trained on the world's words so that each is one token."""
    templates = " ".join((*OPENINGS, *STARTS, *DAYS, *STEPS, *RECAPS, *CLOSES))
    plain = " ".join(text for text, *_ in string.Formatter().parse(templates))
    words = [*plain.split(), *NAMES, *THINGS, *WEEK, *map(word, range(LIMIT + 1))]
    words += map(signed, range(-LARGEST_CHANGE - 1, LARGEST_CHANGE + 2))  # misread: one more or less
    words += ["first", "how", "many", "?", "\\boxed{", "}", "system", "user", "assistant"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    trained.train_from_iterator([f" {name}" for name in words], trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": special[:1], "eos_token": special[1]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompt_of(tokenizer, problem: Problem) -> list[int]:
    messages = [{"role": "user", "content": problem.question()}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def by_length(rows: list[Row], size: int, rng: random.Random) -> list[list[Row]]:
    """Batches of rows of similar length, in random order."""
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return rng.sample(batches, len(batches))


def repeated(rows: list[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Batches of the same rows, without end; none if there are no rows."""
    while rows:
        yield from by_length(rows, size, rng)


def texts_of_authors(tokenizer, recipe: Recipe, rng: random.Random) -> Iterator[list[Row]]:
    """Batches of fresh problems with answers of random authors, without end."""
    authors = draw_authors(recipe)
    while True:
        rows = []
        for _ in range(16 * recipe.batch):
            problem = draw_problem(recipe, rng)
            text = draw_answer(problem, authors, recipe.slip_rate, rng)
            ids = tokenizer.encode(f" {text}") + [tokenizer.eos_token_id]
            rows.append((prompt_of(tokenizer, problem), ids))
        yield from by_length(rows, recipe.batch, rng)


def pad(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """ids, labels: (b, L) int64 each; labels are -100 except on the answer."""
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
    return ids, labels


def learn(model, batches: Iterable[list[Row]], steps: int, lr: float, bar: tqdm) -> None:
    """Next-token training on the answers, AdamW with a cosine to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _, rows in zip(range(steps), batches):
        ids, labels = pad(rows)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def boxed(text: str) -> str:
    """The word in the box; empty if there is none."""
    found = re.search(r"\\boxed\{ (\w+) \}", text)
    return found[1] if found else ""


def right_answers(model, tokenizer, problems: list[Problem], horizon: int, sampler: Callable) -> list[Row]:
    """Sample an answer to each problem, and keep those that end with the right result."""
    rows = []
    for start in range(0, len(problems), 400):
        part = problems[start : start + 400]
        prompts = [prompt_of(tokenizer, problem) for problem in part]
        noise = torch.rand(len(part), horizon)
        rollouts = sampler(model, prompts, horizon, {tokenizer.eos_token_id}, noise)
        for problem, prompt, tokens, mask in zip(part, prompts, rollouts.tokens, rollouts.response_mask):
            ids = tokens[mask].tolist()
            right = boxed(tokenizer.decode(ids)) == word(problem.result())
            if right and ids[-1] == tokenizer.eos_token_id:
                rows.append((prompt, ids))
    return rows


def write_problems(folder: Path, recipe: Recipe) -> list[Problem]:
    """Write train.jsonl and test.jsonl, which share no problem; returns those of train.jsonl."""
    rng = random.Random(f"problems {recipe.seed}")
    drawn = [draw_problem(recipe, rng) for _ in range(recipe.held_out + recipe.problems)]
    problems = list(dict.fromkeys(drawn))
    for name, part in (("test", problems[: recipe.held_out]), ("train", problems[recipe.held_out :])):
        rows = [{"question": problem.question(), "answer": word(problem.result())} for problem in part]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return problems[recipe.held_out :]


def write_world(folder: Path, recipe: Recipe, sampler: Callable) -> None:
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"training {recipe.seed}")
    problems = write_problems(folder, recipe)
    tokenizer = make_tokenizer()
    model = make_model(recipe.width, tokenizer)
    total = recipe.pretrain_steps + recipe.rounds * recipe.round_steps
    with tqdm(total=total, desc="building the world 'words', once", mininterval=0.5) as bar:
        learn(model, texts_of_authors(tokenizer, recipe, rng), recipe.pretrain_steps, recipe.lr, bar)
        save(model, tokenizer, folder / "student")
        right: list[Row] = []
        for _ in range(recipe.rounds):
            asked = rng.sample(problems, recipe.questions)
            right += right_answers(model, tokenizer, asked, recipe.horizon, sampler)
            right = right[-recipe.kept :]
            learn(model, repeated(right, recipe.batch, rng), recipe.round_steps, recipe.round_lr, bar)
        save(model, tokenizer, folder / "teacher")


def save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def folder_of(recipe: Recipe, cache: Path) -> Path:
    """The folder of a world; it depends on the recipe and on the source of this file and of toy.py."""
    sources = [Path(path).read_text(encoding="utf-8") for path in (__file__, toy.__file__)]
    key = hashlib.sha256("".join([*sources, json.dumps(asdict(recipe))]).encode()).hexdigest()[:8]
    return cache / f"{recipe.seed}-{key}"


def build(sampler: Callable, recipe: Recipe = Recipe(), cache: Path = CACHE) -> Path:
    """The folder of a world, built if it does not exist: student/, teacher/, train.jsonl, test.jsonl.

    `sampler` is `rollout.rollout`, or what takes the same arguments: support/ imports none of the five files.
    """
    folder = folder_of(recipe, cache)
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # of two processes one builds, the other waits
            part = folder.with_suffix(".part")  # gets its name only when complete
            shutil.rmtree(part, ignore_errors=True)
            if not folder.exists():
                part.mkdir()
                with torch.random.fork_rng(devices=[]):
                    write_world(part, recipe, sampler)
                part.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot build the world words ({error}): make {cache} writable") from error
    return folder


def preset() -> dict:
    """train.py's settings for this world, which need not exist yet."""
    folder = folder_of(Recipe(), CACHE)
    return PRESET | {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": str(folder),
    }
