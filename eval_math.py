"""Full-length generation and grading: the score at both ends of a distillation.

    python eval_math.py --model PATH --data FILE --limit 128

The grader is `is_correct(response, answer)`; it needs math-verify and nothing else.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from cli import BadInput, knob, parse, run

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def boxed(text: str) -> list[str]:
    r"""The contents of every \boxed{...}, nested braces balanced, that closes within 500 characters."""
    found = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(match.end(), min(len(text), match.end() + 500)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[match.end() : end].strip())
                break
    return found


def extract(response: str) -> str | None:
    r"""The final answer, by the first rule that finds one.

    First \boxed{} (not the last: a student that never learned to stop repeats itself after the answer),
    then "#### x", then "the answer is x", then the last number. None if there is no number either.
    """
    if found := boxed(response):
        return found[0]
    if match := re.search(r"####\s*(.+)", response):
        return match[1].strip()
    if found := re.findall(r"answer is:?\s*\**\s*([^\n]+)", response, re.IGNORECASE):
        return found[-1].rstrip(" .*")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    return numbers[-1] if numbers else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the response's extracted answer equals `answer`, by text, else by math-verify (5 s at most)."""
    found = extract(response[-20000:] if "\\boxed" not in response else response[:100000])
    if found is None or len(found) > 500:
        return False
    if plain(found) == plain(answer):
        return True
    from math_verify import parse as read
    from math_verify import verify

    # gold first: verify(gold, answer) is not symmetric
    return bool(verify(read(f"${answer}$"), read(f"${found}$")))


def plain(text: str) -> str:
    """Text without what never changes a number: money signs, thousands commas, spaces, a trailing .0"""
    text = re.sub(r"[\s$]|\\[,!;]|(?<=\d),(?=\d{3})", "", text)
    return re.sub(r"\.0*$", "", text)


def evaluate(
    model, tokenizer, prompts, problems, end_ids, max_new_tokens, batch_size, temperature, seed
) -> dict:
    """The score on `problems`, a dict with accuracy and its standard error, and a record per problem."""
    import torch
    from tqdm import tqdm

    from rollout import rollout

    generator = torch.Generator(model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    records = []
    with tqdm(total=len(order), desc="evaluating", unit="problem", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ro = rollout(
                model, [prompts[i] for i in rows], max_new_tokens, end_ids, temperature, None, generator
            )
            for row, i in enumerate(rows):
                tokens = ro.tokens[row][ro.response_mask[row]]
                response = tokenizer.decode(tokens, skip_special_tokens=True)
                record = {
                    "problem": problems[i].question,
                    "response": response,
                    "extracted": extract(response),
                }
                record |= {"gold": problems[i].answer, "correct": is_correct(response, problems[i].answer)}
                records.append(record | {"length": len(tokens), "finished": bool(ro.finished[row])})
            bar.update(len(rows))
            bar.set_postfix(accuracy=f"{sum(r['correct'] for r in records) / len(records):.1%}")
    return score(records), records


def score(records: list[dict]) -> dict:
    """The numbers of a run over n problems; se is that of a mean of n independent ones."""
    n = len(records)
    accuracy = sum(r["correct"] for r in records) / n
    return {
        "accuracy": accuracy,
        "se": (accuracy * (1 - accuracy) / max(n - 1, 1)) ** 0.5,
        "n": n,
        "truncated": sum(not r["finished"] for r in records) / n,
        "no_answer": sum(r["extracted"] is None for r in records) / n,
        "mean_length": sum(r["length"] for r in records) / n,
    }


@dataclass
class Knobs:
    model: str = knob("", "hub name or local folder")
    data: str = knob("openai/gsm8k:main", "hub name[:config], local file or folder; its test split")
    limit: int = knob(128, "problems, a seeded random subset; 0 is all")
    max_new_tokens: int = knob(1024, "longest response")
    batch_size: int = knob(16, "responses sampled together")
    temperature: float = knob(0.0, "0 is greedy")
    instruction: str = knob(INSTRUCTION, "text after each problem")
    system_prompt: str = knob("", "system message, none if empty")
    device: str = knob("", "cuda, cpu, ...; by default a GPU if there is one")
    seed: int = knob(0, "of the subset and the sampling")
    out: str = knob("", "JSONL file for the responses; must not exist")


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__, None))
    import json

    import data

    if not knobs.model:
        raise BadInput("no --model: name a model folder or a hub model")
    if min(knobs.max_new_tokens, knobs.batch_size) < 1 or knobs.limit < 0 or knobs.temperature < 0:
        raise BadInput(
            "--max-new-tokens and --batch-size must be 1 or more, --limit and --temperature 0 or more"
        )
    if knobs.out and Path(knobs.out).exists():
        raise BadInput(f"output {knobs.out} exists: name another file with --out")
    problems = data.subset(data.read_problems(knobs.data, "test"), knobs.limit, knobs.seed)
    tokenizer = data.load_tokenizer(knobs.model)
    device = data.find_device(knobs.device)
    model = data.load_model(knobs.model, data.fastest_dtype(device), device)
    prompts = data.render(tokenizer, problems, knobs.instruction, knobs.system_prompt)
    sizes = (knobs.max_new_tokens, knobs.batch_size, knobs.temperature, knobs.seed)
    started = time.perf_counter()
    result, records = evaluate(model, tokenizer, prompts, problems, data.end_ids(model, tokenizer), *sizes)
    if knobs.out:
        Path(knobs.out).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    seconds = time.perf_counter() - started
    print(f"accuracy {result['accuracy']:.1%} +- {result['se']:.1%} (standard error, n = {result['n']})")
    print(f"truncated {result['truncated']:.1%}, no answer {result['no_answer']:.1%}", end=", ")
    print(f"mean length {result['mean_length']:.0f} tokens, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
