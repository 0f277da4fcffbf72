r"""Scores one can believe: full-length generation, grading, and how far luck could have moved the number.

    python eval_math.py --model PATH --benchmark gsm8k --limit 128
    python eval_math.py --model A --model B --data FILE        the paired difference of two models
    python eval_math.py --resume FOLDER                        go on after a stop, to the same scores
    python eval_math.py --regrade FILE.jsonl                   grade saved answers again, without a model

The grader is `is_correct(response, answer)` of grading.py. Answers, verdicts and scores go to the run folder.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import data
from cli import BadInput, knob, parse, run
from grading import Grader, is_correct  # noqa: F401  is_correct: for those who look for it here
from scores import summarize, tell

# What follows a problem in the chat, by the style of the benchmark.
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
INTEGER = "\nPlease reason step by step. The answer is an integer; put it within \\boxed{}."
# What precedes it for a base model, which has no chat template, and where such a model runs on.
FEW_SHOT = r"""Question: A box holds 12 pencils. Mia buys 3 boxes and gives away 7. How many has she left?
Answer: Mia buys 3 * 12 = 36 pencils. She has 36 - 7 = 29 left. The final answer is \boxed{29}.

Question: What is $\frac{1}{2} + \frac{1}{3}$?
Answer: Over 6 this is $\frac{3}{6} + \frac{2}{6}$. The final answer is \boxed{\frac{5}{6}}.

"""
NEXT_QUESTION = "\nQuestion:"
BENCHMARKS = {  # name: (hub data set, its split, instruction)
    "gsm8k": ("openai/gsm8k:main", "test", INSTRUCTION),
    "math500": ("HuggingFaceH4/MATH-500", "test", INSTRUCTION),
    "aime24": ("HuggingFaceH4/aime_2024", "train", INTEGER),
    "aime25": ("math-ai/aime25", "test", INTEGER),
    "amc23": ("math-ai/amc23", "test", INTEGER),
    "minerva": ("math-ai/minervamath", "test", INSTRUCTION),
    "olympiadbench": ("math-ai/olympiadbench", "test", INSTRUCTION),
}


def evaluate(
    model, tokenizer, prompts, problems, ends, path: Path, max_new_tokens, batch_size, samples, seed, **law
) -> list[dict]:
    """A record per answer, written to the JSONL file `path` batch by batch; whole batches it has are kept.

    `law` is the sampler's temperature (0 is greedy) and top_p; `samples` the answers to each problem.
    """
    import torch
    from tqdm import tqdm

    from fast import sampler

    # Longest prompts first: what does not fit into memory says so at once, and little of a batch is padding.
    asked = [i for i in range(len(prompts)) for _ in range(samples)]
    asked.sort(key=lambda i: -len(prompts[i]))
    records, sampled = data.whole_batches(path, len(asked)), sampler("", model)
    size = records[0]["batch_size"] if records else batch_size
    bar = tqdm(total=len(asked), initial=len(records), desc=path.stem, unit="answer", leave=False)
    with path.open("a", buffering=1, encoding="utf-8") as file, Grader() as grader, bar:
        for start in range(len(records), len(asked), size):
            rows, began = asked[start : start + size], time.perf_counter()
            # A seed for each batch: a resumed run samples what the stopped one would have.
            law["generator"] = torch.Generator(model.device).manual_seed(seed * 1_000_003 + start)
            ro = sampled(model, [prompts[i] for i in rows], max_new_tokens, ends, **law)
            new = answers(ro, tokenizer)
            seconds = (time.perf_counter() - began) / len(new)
            verdicts = grader.grade([a["response"] for a in new], [problems[i].answer for i in rows])
            for i, answer, verdict in zip(rows, new, verdicts):
                head = {"index": i, "problem": problems[i].question, "seconds": seconds, "batch_size": size}
                records.append(head | answer | verdict)
            file.write("".join(json.dumps(record) + "\n" for record in records[start:]))
            right, tokens, spent = (sum(r[key] for r in records) for key in ("correct", "length", "seconds"))
            bar.set_postfix({"correct": f"{right / len(records):.1%}", "tokens/s": f"{tokens / spent:.0f}"})
            bar.update(len(new))
    return records


def answers(ro, tokenizer) -> list[dict]:
    """Text, length in tokens and whether it came to an end, of each row of a rollout."""
    found = []
    for tokens, mask, finished in zip(ro.tokens, ro.response_mask, ro.finished.tolist()):
        text, length = tokenizer.decode(tokens[mask], skip_special_tokens=True), int(mask.sum())
        if tokenizer.chat_template is None:  # a base model has ended where it asks itself the next question
            text, asks, _ = text.partition(NEXT_QUESTION)
            finished = finished or bool(asks)
        found.append({"response": text, "length": length, "finished": finished})
    return found


@dataclass(frozen=True)
class Knobs:
    model: tuple[str, ...] = knob((), "hub name or folder; given twice, the two are compared")
    benchmark: tuple[str, ...] = knob((), "may be given several times", choices=BENCHMARKS)
    data: tuple[str, ...] = knob((), "file, folder or hub data set instead; its test split")
    limit: int = knob(0, "problems, a random subset drawn by the seed; 0: all", 0)
    max_new_tokens: int = knob(1024, "longest answer", 1)
    samples: int = knob(1, "answers to each problem: avg@K, pass@k, maj@K", 1)
    temperature: float = knob(0.0, "0 is greedy", 0)
    top_p: float = knob(1.0, "sample from the likeliest tokens that hold this share", 0.01, most=1)
    instruction: str | None = knob(None, "text after each problem; default: the benchmark's own")
    system_prompt: str = knob("", "system message; the chat template's own if empty")
    thinking: bool = knob(False, "let a model think first, where its chat template has the switch")
    batch_size: int | str = knob(
        "auto", "answers sampled together; auto: what fits, up to 64", 1, word="auto"
    )
    seed: int = knob(0, "of the subset and the sampling", 0, most=2**32)
    dtype: str = knob("", "default: the faster one here", choices=("bfloat16", "float32"))
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    out: str = knob("", "run folder; default: the first free runs/eval-N")
    resume: str = knob("", "run folder to go on with; its own settings hold")
    regrade: str = knob("", "JSONL file of answers to grade again, without a model")


def problems_by_name(knobs: Knobs) -> dict[str, list]:
    """The problems of each benchmark and file that was asked for. Raises BadInput."""
    sources = [(name, *BENCHMARKS[name][:2]) for name in knobs.benchmark]
    sources += [(Path(name).stem, name, "test") for name in knobs.data]
    names = [name for name, _, _ in sources]
    if len(set(names)) < len(names):
        raise BadInput(f"{', '.join(names)}: two are of one name; rename a file, or ask for each once")
    return {n: data.subset(data.read_problems(s, part), knobs.limit, knobs.seed) for n, s, part in sources}


def check(knobs: Knobs) -> None:
    if not knobs.model or not knobs.benchmark + knobs.data:
        raise BadInput("nothing to ask, or nobody: needs a --model, and a --benchmark or --data")
    if knobs.samples > 1 and knobs.temperature == 0:
        raise BadInput(f"{knobs.samples} greedy answers are all the same: add --temperature 0.7 or the like")


def regrade(file: str) -> None:
    records = data.read_jsonl(Path(file)) if Path(file).is_file() else []
    needed = {"index", "response", "gold", "verdict", "length", "finished", "seconds"}
    if not records or any(needed - r.keys() or not isinstance(r["response"], str) for r in records):
        raise BadInput(f"{file} holds no graded answers: name a JSONL file that an evaluation wrote")
    with Grader() as grader:
        fresh = grader.grade([r["response"] for r in records], [r["gold"] for r in records])
    changed = sum(old["verdict"] != new["verdict"] for old, new in zip(records, fresh))
    print(tell(summarize({Path(file).stem: {"regraded": [old | new for old, new in zip(records, fresh)]}})))
    print(f"{changed} of {len(records)} verdicts differ from those in the file, which stays as it was")


def evaluate_model(name: str, label: str, problems: dict, knobs: Knobs, folder: Path) -> dict[str, list]:
    """The records of one model on each benchmark, also in files that begin with its label."""
    import torch

    import memory
    import models
    import report

    device = models.find_device(knobs.device)
    tokenizer = models.load_tokenizer(name)
    model = models.load_model(name, getattr(torch, knobs.dtype), device)
    records, ends = {}, models.end_ids(tokenizer, model)
    for benchmark, asked in problems.items():
        default = BENCHMARKS[benchmark][2] if benchmark in BENCHMARKS else INSTRUCTION
        instruction = default if knobs.instruction is None else knobs.instruction
        prompts = data.render(tokenizer, asked, instruction, knobs.system_prompt, knobs.thinking, FEW_SHOT)
        models.check_context([model], prompts, knobs.max_new_tokens)
        size = memory.batch_that_fits(model, prompts, knobs.max_new_tokens, knobs.batch_size)
        law = {"temperature": knobs.temperature, "top_p": knobs.top_p}
        how = folder / f"{label}-{benchmark}.jsonl", knobs.max_new_tokens, size, knobs.samples, knobs.seed
        if not (folder / "config.json").exists():  # nothing is written before all is known to be there
            report.write_config(folder, asdict(knobs), device)
        records[benchmark] = evaluate(model, tokenizer, prompts, asked, ends, *how, **law)
    return records


def main() -> None:
    given = parse(Knobs, __doc__, None)
    if "regrade" in given:
        regrade(given["regrade"])
        return
    import models
    import report

    if "resume" in given:
        folder, knobs = Path(given["resume"]), Knobs(**report.resumed(Knobs, given))
    else:
        knobs = Knobs(**given)
        check(knobs)
        folder = report.new_folder(knobs.out, "eval")
        knobs = replace(knobs, dtype=models.dtype_name(knobs.dtype, models.find_device(knobs.device)))
    problems = problems_by_name(knobs)
    labels = {f"{chr(ord('A') + i)}-{Path(name).name}": name for i, name in enumerate(knobs.model)}
    with report.only_run(folder, fresh=not knobs.resume):
        runs = {label: evaluate_model(n, label, problems, knobs, folder) for label, n in labels.items()}
        result = summarize(runs) | {"knobs": asdict(knobs)}
        report.write_json(folder / "scores.json", result)
        print(tell(result))


if __name__ == "__main__":
    run(main)
