"""A world small enough for a laptop: two tiny chat models and an arithmetic task with long answers.

    user       x=3, then +4 fiftytwo times
    assistant  step by step +4: fiftyone7 fifty1 fortynine5 ... one7 zero1 \\boxed{1}

Each step of an answer is a countdown and the running sum modulo 10, one token each.

The world is built to show the mechanism that the papers claim, and shows no more than that. Both models are
trained on a mixture of correct answers and of wrong ones, which add one too much; the first words of an
answer announce which it will be. The teacher is then trained on correct answers alone. So the two models
differ at the start of an answer, and a short rollout is enough to see it. In the other world, `closing`, they
differ only at the end, which a truncated rollout never reaches.

    python -m support.toy --world opening     builds student/, teacher/, train.jsonl and test.jsonl under
    .cache/toy
"""

import hashlib
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from support.cli import BadInput, knob, parse, run_main

CACHE = Path(__file__).parents[1] / ".cache" / "toy"
WORLDS = ("opening", "closing")
CORRECT, WRONG = "step by step", "a quick guess"  # the first words of an answer in `opening`
KEEP, SLIP = "so it is", "one more is"  # the words before the result in `closing`
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ONES = f"{ONES} seventeen eighteen nineteen".split()
TENS = ["", "", "twenty", "thirty", "forty", "fifty"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PRESET = {  # train.py's settings for this world
    "instruction": "",
    "max_new_tokens": 128,
    "steps": 40,
    "batch_size": 32,
    "micro_batch": 8192,
    "checkpointing": False,
    "lr": 1e-3,
    "eval_every": 10,
    "eval_limit": 100,
    "eval_batch": 100,
    "eval_temperature": 1.0,  # greedy answers would all be of the more likely kind
    "dtype": "float32",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the models; the cache is keyed by it."""

    seed: int = 0
    # Additions in an answer of 114 to 124 tokens. Not 50: one too much, added 50 times, is 0 modulo 10.
    steps: tuple[int, int] = (51, 56)
    correct_share: float = 0.3  # of the answers in the mixture
    student_width: int = 64
    teacher_width: int = 72
    batch: int = 16
    pretrain_steps: int = 450
    posttrain_steps: int = 100
    lr: float = 6e-3


def word(n: int) -> str:
    """0 to 59 as one word, hence one token: Qwen's tokenizer splits numerals into digits."""
    return ONES[n] if n < 20 else TENS[n // 10] + (ONES[n % 10] if n % 10 else "")


def question(start: int, add: int, times: int) -> str:
    return f"x={start}, then +{add} {word(times)} times"


def answer(start: int, add: int, times: int, world: str, correct: bool) -> tuple[str, int]:
    """The text of a correct or a wrong answer, and its result."""
    step = add if correct or world == "closing" else add + 1
    result = (start + step * times) % 10
    steps = " ".join(f"{word(times - i)}{(start + step * i) % 10}" for i in range(1, times + 1))
    if world == "opening":
        return f"{CORRECT if correct else WRONG} +{step}: {steps} \\boxed{{{result}}}", result
    result = result if correct else (result + 1) % 10
    return f"work: {steps} {KEEP if correct else SLIP} \\boxed{{{result}}}", result


def make_tokenizer(recipe: Recipe) -> Qwen2Tokenizer:
    """A tokenizer of Qwen's kind, trained on the task's words so that each is one token."""
    kinds = [(world, correct) for world in WORLDS for correct in (True, False)]
    texts = [question(*p) + answer(*p, *kind)[0] for p in all_problems(recipe)[:50] for kind in kinds]
    texts += [f"{role}\n" for role in ("system", "user", "assistant")]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=1000, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(width: int, tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        initializer_range=0.1,  # with 0.02, meant for wide models, learning starts three times later
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # precise positions in a short text
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def all_problems(recipe: Recipe) -> list[tuple[int, int, int]]:
    low, high = recipe.steps
    problems = [(s, a, n) for s in range(10) for a in range(1, 9) for n in range(low, high + 1)]
    random.Random(recipe.seed).shuffle(problems)
    return problems


def examples(
    tokenizer, problems, world: str, correct_share: float, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """ids, labels: (b, L) int64 each; labels are -100 except on the answer."""
    rows = []
    for problem in problems:
        messages = [{"role": "user", "content": question(*problem)}]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(messages, **how)
        text, _ = answer(*problem, world, rng.random() < correct_share)
        rows.append((prompt, tokenizer.encode(text) + [tokenizer.eos_token_id]))
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
    return ids, labels


def learn(model, tokenizer, world: str, share: float, steps: int, recipe: Recipe, bar: tqdm) -> None:
    """Next-token training on fresh answers to the training problems, AdamW with a cosine to zero."""
    rng, problems = random.Random(recipe.seed + 1), all_problems(recipe)[100:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ids, labels = examples(tokenizer, rng.sample(problems, recipe.batch), world, share, rng)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def write_world(folder: Path, world: str, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(recipe)
    problems = all_problems(recipe)
    for name, part in (("test", problems[:100]), ("train", problems[100:])):
        rows = [{"question": question(*p), "answer": str(answer(*p, world, True)[1])} for p in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    total = 2 * recipe.pretrain_steps + recipe.posttrain_steps
    with tqdm(total=total, desc=f"building the toy world '{world}', once", mininterval=0.5) as bar:
        for name, width in (("student", recipe.student_width), ("teacher", recipe.teacher_width)):
            model = make_model(width, tokenizer)
            learn(model, tokenizer, world, recipe.correct_share, recipe.pretrain_steps, recipe, bar)
            if name == "teacher":
                learn(model, tokenizer, world, 1.0, recipe.posttrain_steps, recipe, bar)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)


def folder_of(world: str, recipe: Recipe, cache: Path) -> Path:
    """The folder of a world; it depends on the recipe and on the source of this file."""
    source = Path(__file__).read_text(encoding="utf-8") + json.dumps(asdict(recipe))
    return cache / f"{world}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def build(world: str, recipe: Recipe = Recipe(), cache: Path = CACHE) -> Path:
    """The folder of a world, built if it does not exist: student/, teacher/, train.jsonl, test.jsonl."""
    folder = folder_of(world, recipe, cache)
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
                    write_world(part, world, recipe)
                part.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot build the toy world ({error}): make {cache} writable") from error
    return folder


def preset(world: str) -> dict:
    """train.py's settings for a world, which need not exist yet."""
    folder = folder_of(world, Recipe(), CACHE)
    return PRESET | {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": str(folder),
    }


@dataclass
class Knobs:
    world: str = knob("opening", "where student and teacher differ", choices=WORLDS)


def main() -> None:
    print(build(Knobs(**parse(Knobs, __doc__)).world))


if __name__ == "__main__":
    run_main(main)
