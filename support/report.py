"""What a run shows: an answer with the teacher's gap on each token, a table of scores, advice, a curve."""

import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from support import data
from support.cli import printable
from support.run_folder import append_csv, read_csv, replaced, write_json
from support.scores import difference, format_difference, wilson

PLACES = ("row", "position")  # where a token is; their means have no meaning


def show_rollout(
    folder: Path, bar: tqdm, step: int, tokenizer, rollouts, statistics: dict[str, Tensor]
) -> None:
    """Print the step's first answer with the teacher's gap on each token.

    Appends it to rollouts.jsonl, and the statistics by position to positions.csv.
    """
    answer = rollouts.tokens[0][rollouts.response_mask[0]]
    of_first = statistics["row"] == 0
    gap = torch.zeros(len(answer), device=answer.device)  # of tokens without a loss it is not known
    gap_of_tokens = statistics["teacher_logp"] - statistics["student_logp"]
    gap[statistics["position"][of_first]] = gap_of_tokens[of_first].float()
    colour = sys.stdout.isatty()
    text = gap_text(tokenizer, answer, gap, colour)
    bar.write(f"step {step}, log p_teacher - log p_student {'in red' if colour else 'in brackets'}: {text}")
    record = {"step": step, "prompt": rollouts.prompts[0], "response": answer.tolist()}
    record["text"] = gap_text(tokenizer, answer, gap, colour=False)
    with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    append_csv(folder / "positions.csv", rows_by_position(step, statistics, rollouts.tokens.shape[1]))


def rows_by_position(step: int, statistics: dict[str, Tensor], length: int) -> list[dict[str, Any]]:
    """The rows of positions.csv for a step: the mean of each statistic at each of `length` positions.

    It is NaN where no answer has a token with a loss.
    """
    names = [name for name in statistics if name not in PLACES]
    values = torch.stack([statistics[name].float() for name in names], dim=1)  # (N, K)
    sums = values.new_zeros(length, len(names)).index_add(0, statistics["position"], values)
    counts = torch.bincount(statistics["position"], minlength=length)
    rows = []
    for i, (count, means) in enumerate(zip(counts.tolist(), (sums / counts[:, None]).tolist())):
        rows.append({"step": step, "position": i, "tokens": count} | dict(zip(names, means)))
    return rows


def offending_rows(tokenizer, rollouts, statistics: dict[str, Tensor]) -> dict[str, Any]:
    """The texts of a batch with a non-finite loss or gradient, and the numbers and texts of the bad rows."""
    texts = []
    for prompt, ids, mask in zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask):
        texts.append(tokenizer.decode(prompt + ids[mask].tolist()))
    bad = sorted(set(statistics["row"][~statistics["reverse_kl"].isfinite()].tolist()))
    return {"bad_rows": bad, "bad": [texts[i] for i in bad], "batch": texts}


def finish(folder: Path, summary: dict) -> None:
    """Write summary.json and curve.png; print the table and the advice."""
    rows = read_csv(folder / "metrics.csv")
    tokens = sum(int(row["response_tokens"]) for row in rows)
    summary = summary | {"response_tokens": tokens, "steps": len(rows)}
    lines = [f"{tokens:,} tokens sampled in {len(rows)} steps, {summary['seconds'] / 60:.1f} minutes"]
    lines.append(advice_on_kl(rows))
    if summary["before"]:
        answers = [data.read_jsonl(folder / f"eval_{name}.jsonl") for name in ("before", "after")]
        summary["change"] = difference(*answers)
        lines = [*table(summary), *lines, *advice_on_accuracy(summary)]
    write_json(folder / "summary.json", summary)
    draw_curve(rows, summary, folder)
    print("\n".join(lines))
    print(f"curve: {folder / 'curve.png'}, student: {folder / 'student'}")


def gap_text(tokenizer, tokens: Tensor, gap: Tensor, colour: bool, most: int = 120) -> str:
    """A response with the teacher's gap log p_T(y) - log p_S(y) on each token: (R,), (R,) -> text.

    The redder a token, the lower the teacher's probability; a gap of -3 nats (a factor of 20) is full red.
    Without colour, gaps beyond half a nat follow their token in brackets. After `most` tokens the text is
    cut.
    """
    pieces = []
    for text, nats in zip(token_texts(tokenizer, tokens[:most]), gap.tolist()):
        piece = printable(text)
        if colour:
            light = 255 - int(min(max(-nats, 0.0), 3.0) * 60)
            piece = f"\033[38;2;0;0;0;48;2;255;{light};{light}m{piece}\033[0m"
        elif abs(nats) > 0.5:
            piece += f"[{nats:+.1f}]"
        pieces.append(piece)
    return "".join(pieces) + (" ..." if len(gap) > most else "")


def token_texts(tokenizer, tokens: Tensor) -> list[str]:
    """The text that each of (R,) tokens adds to those before it.

    A character may span several tokens: the last of them adds it, the others add an empty text.
    """
    texts, start, end = [], 0, 0  # tokens[start:end] is the context: some tokenizers drop a leading space
    for i in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:i])
        if text.endswith("\ufffd"):  # an incomplete character
            texts.append("")
        else:
            texts.append(text[len(tokenizer.decode(tokens[start:end])) :])
            start, end = end, i
    return texts


def table(summary: dict) -> list[str]:
    """Three rows, student before, student after and teacher, and the change."""
    lines = [f"{'':16}{'accuracy':>10}{'+- se':>8}{'truncated':>11}{'length':>8}{'n':>6}"]
    for name, key in (("student before", "before"), ("student after", "after"), ("teacher", "teacher")):
        s = summary[key]
        row = f"{name:16}{s['accuracy']:>10.1%}{s['se']:>8.1%}{s['truncated']:>11.1%}"
        lines.append(row + f"{s['mean_length']:>8.0f}{s['n']:>6}")
    lines.append(f"change          {format_difference(summary['change'])}")
    return lines


def advice_on_kl(rows: list[dict[str, Any]]) -> str:
    """How the reverse KL changed, and what to try next; docs/running.md has the rules."""
    few = -(-len(rows) // 10)
    first, last = (fmean(float(row["reverse_kl"]) for row in part) for part in (rows[:few], rows[-few:]))
    steps = "step" if few == 1 else f"{few} steps"
    found = f"The reverse KL of the first and last {steps} is {first:.3f} and {last:.3f} nats a token"
    if math.isnan(first + last):
        return f"{found}: in a step no token had a loss."
    if len(rows) < 10:
        return f"{found}: too few steps to tell."
    if rows[0]["horizon"] != rows[-1]["horizon"]:
        return f"{found}, not comparable as the horizon changed: see positions.csv, if --show-every is not 0."
    if last > first:
        return f"{found}: it rose; lower --lr, or raise --batch-size."
    return f"{found}: it fell."


def advice_on_accuracy(summary: dict) -> list[str]:
    """What the evaluations show, and what to try next, in at most two lines."""
    found = []
    before, after, teacher = (summary[name] for name in ("before", "after", "teacher"))
    low, high = summary["change"]["interval"]
    p = summary["change"]["p"]
    if low == high == 0:
        found.append(f"No verdict changed on {before['n']} problems: raise --eval-limit, or train longer.")
    elif p >= 0.05 and (low > 0 or high < 0):  # few verdicts changed: the interval is too narrow
        what = f"The change of accuracy is not significant (sign test, p = {p:.2g})"
        found.append(f"{what}: raise --eval-limit.")
    elif low > 0:
        found.append("Accuracy rose: the interval of the change is above 0.")
    elif high < 0:
        found.append("Accuracy fell: lower --lr, and read the answers in eval_after.jsonl.")
    else:
        seen = f"with {before['n']} problems, only changes of about {(high - low) / 2:.0%} can be seen"
        found.append(f"The change of accuracy is within noise: {seen}; raise --eval-limit.")
    if teacher["accuracy"] <= before["accuracy"]:
        found.append("The teacher is not better than the student was: check --instruction and --teacher.")
    elif after["truncated"] > 0.1:
        cut, cut_before = (f"{scores['truncated']:.0%}" for scores in (after, before))
        what = f"{cut} of the answers were cut, {cut_before} before training"
        found.append(f"{what}: raise --max-new-tokens, or lower --lr if they no longer end.")
    return found


def draw_curve(rows: list[dict[str, Any]], summary: dict, folder: Path) -> None:
    """curve.png: reverse KL, accuracy with 95 % intervals, horizon and length, cut rollouts, by step."""
    from matplotlib.figure import Figure

    steps = range(len(rows))
    names = ("reverse_kl", "horizon", "response_length", "truncated")
    reverse_kl, horizon, length, truncated = ([float(row[name]) for row in rows] for name in names)
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].plot(steps, reverse_kl, color="#0072b2")
    axes[0].set(title="reverse KL, nats per token", ylim=(0, None))
    if summary["before"]:
        before, after, teacher = (summary[name]["accuracy"] for name in ("before", "after", "teacher"))
        axes[1].axhline(before, color="#999999", linestyle=":", label="student before")
        axes[1].axhline(teacher, color="#009e73", linestyle=":", label="teacher")
        along = [(step + 1, float(row["accuracy"])) for step, row in zip(steps, rows) if row["accuracy"]]
        seen = [(0, before), *along, (len(rows), after)]
        intervals = [wilson(p, summary["before"]["n"]) for _, p in seen]
        size = [[p - low for (_, p), (low, _) in zip(seen, intervals)]]
        size += [[high - p for (_, p), (_, high) in zip(seen, intervals)]]
        axes[1].errorbar(*zip(*seen), yerr=size, color="#d55e00", marker="o", capsize=3, label="student")
        axes[1].legend(loc="center right")
    axes[1].set(title="held-out accuracy", ylim=(-0.02, 1.02))
    axes[2].step(steps, horizon, color="#0072b2", label="horizon")
    axes[2].plot(steps, length, color="#cc79a7", label="mean length")
    axes[2].set(title="response tokens", ylim=(0, None))
    axes[2].legend()
    axes[3].plot(steps, truncated, color="#000000")
    axes[3].set(title="fraction of rollouts cut by the horizon", ylim=(-0.02, 1.02))
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with replaced(folder / "curve.png") as part:
        figure.savefig(part, dpi=110, format="png")
