"""What a run shows: an answer with the teacher's gap on each token, a table, what it means, and a curve.

python -m support.report RUN_FOLDER      draws the curve again
"""

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
from support.cli import BadInput, printable, run_main
from support.run_folder import PLACES, append_csv, atomic_rename, read_csv, write_json
from support.scores import difference, format_difference


def in_short(row: dict[str, Any]) -> dict[str, Any]:
    """What the progress bar shows of a step's row."""
    seconds = sum(value for name, value in row.items() if name.endswith("_s"))
    return {
        "horizon": row["horizon"],
        "reverse_kl": f"{row['reverse_kl']:.4f}",
        "length": f"{row['response_length']:.0f}",
        "tokens/s": f"{row['response_tokens'] / seconds:.0f}",
    }


def show_rollout(
    folder: Path, bar: tqdm, step: int, tokenizer, rollouts, statistics: dict[str, Tensor]
) -> None:
    """Print the step's first answer with the teacher's gap on each token.

    Appends it to rollouts.jsonl, and the statistics by position to positions.csv.
    """
    of_first = statistics["row"] == 0
    place = statistics["position"][of_first]
    gap = (statistics["teacher_logp"] - statistics["student_logp"])[of_first]
    colour = sys.stdout.isatty()
    text = gap_text(tokenizer, rollouts.tokens[0][place], gap, colour)
    bar.write(f"step {step}, log p_teacher - log p_student {'in red' if colour else 'in brackets'}: {text}")
    record = {"step": step, "prompt": rollouts.prompts[0], "response": rollouts.tokens[0][place].tolist()}
    record["text"] = gap_text(tokenizer, rollouts.tokens[0][place], gap, colour=False)
    with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    length = rollouts.tokens.shape[1]
    names = [name for name in statistics if name not in PLACES]
    means = {}
    for name in names:
        means[name] = mean_by_position(statistics[name], statistics["position"], length).tolist()
    counts = torch.bincount(statistics["position"], minlength=length).tolist()
    rows = []
    for i, count in enumerate(counts):
        row = {"step": step, "position": i, "tokens": count}
        rows.append(row | {name: means[name][i] for name in names})
    append_csv(folder / "positions.csv", rows)


def offending_rows(tokenizer, rollouts, statistics: dict[str, Tensor]) -> dict[str, Any]:
    """The texts of a batch with a non-finite loss or gradient, and the numbers and texts of the bad rows."""
    texts = []
    for prompt, ids, mask in zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask):
        texts.append(tokenizer.decode(prompt + ids[mask].tolist()))
    bad = sorted(set(statistics["row"][~statistics["reverse_kl"].isfinite()].tolist()))
    return {"bad_rows": bad, "bad": [texts[i] for i in bad], "batch": texts}


def finish(folder: Path, summary: dict) -> None:
    """summary.json, curve.png, the table, and what it means."""
    rows = read_csv(folder / "metrics.csv")
    summary |= {"response_tokens": sum(int(row["response_tokens"]) for row in rows), "steps": len(rows)}
    if summary["before"]:
        answers = [data.read_jsonl(folder / f"eval_{name}.jsonl") for name in ("before", "after")]
        summary["change"] = difference(*answers)
    write_json(folder / "summary.json", summary)
    draw_curve(folder)
    print(table(summary))
    print("\n".join(advice(rows, summary)))
    if (folder / "rollouts.jsonl").exists():
        shown = data.read_jsonl(folder / "rollouts.jsonl")
        for record in (shown[0], shown[-1]) if len(shown) > 1 else ():
            print(f"step {record['step']}, log p_teacher - log p_student in brackets: {record['text']}")
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


def mean_by_position(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Mean of (N,) values at each response position: (length,), NaN where no row has a token."""
    total = values.new_zeros(length).index_add(0, positions, values)
    return total / values.new_zeros(length).index_add(0, positions, torch.ones_like(values))


def table(summary: dict) -> str:
    """Three rows: student before, student after, teacher; and what it cost."""
    tokens, minutes = summary["response_tokens"], summary["seconds"] / 60
    cost = f"{tokens:,} tokens sampled in {summary['steps']} steps, {minutes:.1f} minutes"
    if not summary["before"]:
        return cost
    lines = [f"{'':16}{'accuracy':>10}{'+- se':>8}{'truncated':>11}{'length':>8}{'n':>6}"]
    for name, key in (("student before", "before"), ("student after", "after"), ("teacher", "teacher")):
        s = summary[key]
        row = f"{name:16}{s['accuracy']:>10.1%}{s['se']:>8.1%}{s['truncated']:>11.1%}"
        lines.append(row + f"{s['mean_length']:>8.0f}{s['n']:>6}")
    if "change" in summary:
        lines.append(f"change          {format_difference(summary['change'])}")
    return "\n".join([*lines, cost])


def advice(rows: list[dict[str, Any]], summary: dict) -> list[str]:
    """What happened and what to try next, in at most three lines; docs/running.md has the rules."""
    few = -(-len(rows) // 10)
    first, last = (fmean(float(row["reverse_kl"]) for row in part) for part in (rows[:few], rows[-few:]))
    found = [f"The reverse KL of the first and last {few} steps is {first:.3f} and {last:.3f} nats a token"]
    if len(rows) < 10:
        found[0] += ": too few steps to tell."
    elif rows[0]["horizon"] != rows[-1]["horizon"]:
        found[0] += ", of other tokens, as the horizon changed: positions.csv has it by position."
    else:
        found[0] += ": it rose; lower --lr, or raise --batch-size." if last > first else ": it fell."
    before, after, teacher = (summary[name] for name in ("before", "after", "teacher"))
    if not before:
        return found
    low, high = summary["change"]["interval"]
    if low == high == 0:
        found.append(f"No verdict changed on {before['n']} problems: raise --eval-limit, or train longer.")
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
        found.append(f"{after['truncated']:.0%} of the answers were cut: raise --max-new-tokens.")
    return found


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict]:
    """The rows of a run with numbers for what is drawn, and its summary, if it has one. Raises BadInput."""
    path = folder / "metrics.csv"
    if not path.is_file():
        raise BadInput(f"{folder} has no metrics.csv: name the folder of a run")
    drawn = {"step": int, "horizon": int}
    drawn |= dict.fromkeys(("reverse_kl", "response_length", "truncated"), float)
    summary = {}
    try:
        rows = [row | {name: kind(row[name]) for name, kind in drawn.items()} for row in read_csv(path)]
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder} is not a run folder ({error!r}): name the folder of a run") from error
    if not rows:
        raise BadInput(f"{path} has no rows: name the folder of a run that has made a step")
    return rows, summary


def draw_curve(folder: Path) -> Path:
    """curve.png: reverse KL, accuracy with 95 % intervals, horizon and length, truncated rollouts, by step.

    Raises BadInput if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    rows, summary = read_run(folder)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].plot(steps, [row["reverse_kl"] for row in rows], color="#0072b2")
    axes[0].set(title="reverse KL, nats per token", ylim=(0, None))
    seen = [(row["step"] + 1, float(row["accuracy"])) for row in rows if row["accuracy"]]
    if summary.get("after"):
        seen.append((len(steps), summary["after"]["accuracy"]))
    if summary.get("before"):
        seen = [(0, summary["before"]["accuracy"]), *seen]
        ends = (("student before", "before", "#999999"), ("teacher", "teacher", "#009e73"))
        for label, key, colour in ends:
            if summary.get(key):
                axes[1].axhline(summary[key]["accuracy"], color=colour, linestyle=":", label=label)
    if seen:
        n = summary["before"]["n"] if summary.get("before") else math.inf  # of a stopped run: no intervals
        half = [1.96 * math.sqrt(p * (1 - p) / n) for _, p in seen]
        axes[1].errorbar(*zip(*seen), yerr=half, color="#d55e00", marker="o", capsize=3, label="student")
        axes[1].legend(loc="center right")
    axes[1].set(title="held-out accuracy", ylim=(-0.02, 1.02))
    axes[2].step(steps, [row["horizon"] for row in rows], color="#0072b2", label="horizon")
    axes[2].plot(steps, [row["response_length"] for row in rows], color="#cc79a7", label="mean length")
    axes[2].set(title="response tokens", ylim=(0, None))
    axes[2].legend()
    axes[3].plot(steps, [row["truncated"] for row in rows], color="#000000")
    axes[3].set(title="fraction of rollouts cut by the horizon", ylim=(-0.02, 1.02))
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curve.part", dpi=110, format="png")
    atomic_rename(folder / "curve.part", folder / "curve.png")
    return folder / "curve.png"


def main() -> None:
    folders = sys.argv[1:]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise BadInput(f"one folder is needed, not {folders}: python -m support.report RUN_FOLDER")
    print(draw_curve(Path(folders[0])))


if __name__ == "__main__":
    run_main(main)
