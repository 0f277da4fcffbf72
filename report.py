"""What comes out of a run: its folder, a rollout to look at, a table and a curve.

config.json     every knob, library versions, git commit, hardware
metrics.csv     a row per step
positions.csv   now and then, the statistics of the tokens by their position in the response
eval_*.jsonl    every answer of an evaluation with its verdict: before, after, teacher, step_N
summary.json    before, after, teacher, and the change on the same problems
curve.png       drawn from metrics.csv; `python report.py RUN` draws it again
student/        an ordinary Hugging Face folder
"""

import csv
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

import data
from cli import BadInput, Stopped, run
from rollout import Rollout
from scores import difference, difference_text


def new_folder(out: str, default: str) -> Path:
    """`out`, or the first free runs/`default`-N. Raises BadInput rather than write into another run."""
    if out:
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise BadInput(f"output {out} already holds a run or a file: name another folder with --out")
        return Path(out)
    number = 1
    while Path("runs", f"{default}-{number}").exists():
        number += 1
    return Path("runs", f"{default}-{number}")


def environment(device: torch.device) -> dict[str, str]:
    """What it takes to run the same again: libraries, commit, hardware."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "datasets", "math-verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
        found["git_commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git_commit"] = "not a git checkout"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    found["hardware"] = f"{name}, {torch.get_num_threads()} CPU threads"
    return found


@contextmanager
def only_run(folder: Path, fresh: bool) -> Iterator[None]:
    """Makes the folder and holds its lock; a dead process holds none. A disk that fails ends in one line.

    Raises BadInput if another run is there or, where this one is `fresh`, was there; Stopped.
    """
    parent_is_new = not folder.parent.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make {folder} ({error}): name another --out") from error
    try:
        with FileLock(folder / ".lock", timeout=0):
            if fresh and (folder / "config.json").exists():
                raise BadInput(f"another run took {folder} meanwhile: start again, or name another --out")
            yield
    except Timeout as error:
        raise BadInput(f"another run is writing to {folder}: wait for it, or name another --out") from error
    except OSError as error:
        raise Stopped(1, f"cannot write {folder} ({error}): mend that, then --resume {folder}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory; what was written stays in {folder}"
        raise Stopped(1, f"{what}: start anew with smaller batches or a lower --max-new-tokens") from error
    finally:
        if fresh and {path.name for path in folder.glob("*")} <= {".lock"}:
            shutil.rmtree(folder, ignore_errors=True)  # nothing came of it
            if parent_is_new:
                shutil.rmtree(folder.parent, ignore_errors=True)


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python, or of a CPU, where torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def write_config(folder: Path, knobs: dict, device: torch.device) -> None:
    """config.json, and a line that says where the run goes."""
    content = knobs | {"environment": environment(device)}
    write_json(folder / "config.json", content)
    print(f"{content['environment']['hardware']}, {knobs['dtype']}; run folder {folder}", flush=True)


def resumed(knobs_class: type, given: dict, safe: Iterable[str] = ()) -> dict:
    """The knobs in the config.json of the run folder given["resume"], with those of `safe` that are given.

    Raises BadInput if it is not there or not of such a run, and for a flag that would change the run.
    """
    path = Path(given["resume"], "config.json")
    if not path.is_file():
        raise BadInput(f"there is no {path}: name the folder of a run that was started")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        knobs = {field.name: found[field.name] for field in dataclasses.fields(knobs_class)}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not of such a run ({error!r}): start a new one") from error
    knobs = {name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}
    for name in given.keys() - {"resume"}:
        if name not in safe and given[name] != knobs[name]:
            flag = f"--{name.replace('_', '-')} {given[name]}"
            raise BadInput(
                f"{flag} would change the run, which has {knobs[name]}: drop it, or start a new run"
            )
    if "steps" in given and given["steps"] < knobs["steps"]:
        raise BadInput(f"--steps {given['steps']} is below the run's {knobs['steps']}: a run can only grow")
    return knobs | given


def settle(part: Path, path: Path) -> None:
    """Give a file that is whole its name, so that after a power cut there is the old one or the new one."""
    sync(part)
    part.replace(path)


def sync(path: Path) -> None:
    """Wait until the disk has what was written."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def forget(folder: Path, step: int, total: int) -> None:
    """Drop what a run of `total` steps wrote after `step`, from where it goes on: it is written again."""
    for path in (folder / "metrics.csv", folder / "positions.csv"):
        if path.exists():
            rows = [row for row in read_csv(path) if None not in row.values() and int(row["step"]) < step]
            part = path.with_suffix(".part")
            part.unlink(missing_ok=True)
            if rows:
                append_csv(part, rows)
                settle(part, path)
            else:
                path.unlink()
    for path in folder.glob("eval_step_*.jsonl"):
        if int(path.stem.rpartition("_")[2]) > step:
            path.unlink()
    if step < total:
        (folder / "eval_after.jsonl").unlink(missing_ok=True)


COLUMNS = (
    *("step", "horizon", "reverse_kl", "loss", "response_tokens", "response_length", "truncated"),
    *("grad_norm", "lr", "rollout_s", "score_s", "update_s", "seconds", "accuracy"),
    *("student_entropy", "teacher_entropy", "agreement"),
)


def log_step(folder: Path, bar: tqdm, row: dict, ro: Rollout, stats: dict[str, Tensor]) -> None:
    """A row of metrics.csv, and the same in short on the bar; reverse_kl is exact, whatever the loss."""
    row = row | {name: values.float().mean().item() for name, values in stats.items()}
    tokens = len(stats["reverse_kl"])
    row |= {"response_tokens": tokens, "response_length": tokens / len(ro.prompts)}
    row |= {"truncated": 1 - ro.finished.float().mean().item()}
    append_csv(folder / "metrics.csv", [{name: row.get(name, "") for name in COLUMNS}])
    speed = tokens / (row["rollout_s"] + row["score_s"] + row["update_s"])
    shown = {"horizon": row["horizon"], "reverse_kl": f"{row['reverse_kl']:.4f}"}
    shown |= {"length": f"{row['response_length']:.0f}", "tokens/s": f"{speed:.0f}"}
    bar.set_postfix(shown, refresh=False)


def show_rollout(
    folder: Path, bar: tqdm, step: int, tokenizer, ro: Rollout, stats: dict[str, Tensor]
) -> None:
    """The step's first answer with the teacher's gap on each token, and a block of positions.csv."""
    gap = (stats["teacher_logp"] - stats["student_logp"])[stats["row"] == 0]  # one row: already in order
    colour = sys.stdout.isatty()
    text = gap_text(tokenizer, ro.tokens[0], gap, colour)
    bar.write(f"step {step}, teacher's gap {'in red' if colour else 'in brackets'}: {text}")
    names, length = ("reverse_kl", "student_entropy", "teacher_entropy", "agreement"), ro.tokens.shape[1]
    means = {name: mean_by_position(stats[name], stats["position"], length).tolist() for name in names}
    count = ro.response_mask.sum(0).tolist()
    keys = [{"step": step, "position": i, "tokens": count[i]} for i in range(length)]
    append_csv(
        folder / "positions.csv", [key | {n: means[n][i] for n in names} for i, key in enumerate(keys)]
    )


def stop_not_finite(folder: Path, row: dict, ids: list[int], ro: Rollout, stats: dict, tokenizer) -> None:
    """Save the batch whose loss or gradient is no number, its bad rows first; raises Stopped."""
    texts = [tokenizer.decode(p + t[m].tolist()) for p, t, m in zip(ro.prompts, ro.tokens, ro.response_mask)]
    bad = sorted(set(stats["row"][~stats["reverse_kl"].isfinite()].tolist()))
    content = {name: str(value) for name, value in row.items()} | {"problems": ids, "bad_rows": bad}
    write_json(folder / "not_finite.json", content | {"bad": [texts[i] for i in bad], "batch": texts})
    what = f"step {row['step']} gave loss {row['loss']} and gradient norm {row['grad_norm']}"
    where = f"its batch is in {folder / 'not_finite.json'}"
    raise Stopped(1, f"{what}: {where}; start anew with a lower --lr, or look for odd data there")


def finish(folder: Path, summary: dict) -> None:
    """summary.json, curve.png and the table."""
    rows = read_csv(folder / "metrics.csv")
    summary |= {"response_tokens": sum(int(row["response_tokens"]) for row in rows), "steps": len(rows)}
    if summary["before"]:
        answers = [data.read_jsonl(folder / f"eval_{name}.jsonl") for name in ("before", "after")]
        summary["change"] = difference(*answers)
    write_json(folder / "summary.json", summary)
    draw_curve(folder)
    print(table(summary))
    print(f"curve: {folder / 'curve.png'}, student: {folder / 'student'}")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_csv(path: Path, rows: list[dict]) -> None:
    """Add rows, and a header to a new file. Floats keep 6 digits."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def write_json(path: Path, content: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    settle(part, path)


def gap_text(tokenizer, tokens: Tensor, gap: Tensor, colour: bool, most: int = 120) -> str:
    """A response with the teacher's gap log p_T(y) - log p_S(y) on each token: (R,), (R,) -> text.

    The redder a token, the less the teacher would have said it, at 3 nats (a factor of 20) full red. Without
    colour the gap stands in brackets where it is beyond half a nat. After `most` tokens the text is cut.
    """
    pieces, before = [], ""
    for i, nats in enumerate(gap[:most].tolist()):
        text = tokenizer.decode(tokens[: i + 1])  # of the whole prefix: a character may span two tokens,
        text = before if text.endswith("\ufffd") else text  # and is shown with the last of them
        piece, before = text[len(before) :], text
        if colour:
            light = 255 - int(min(max(-nats, 0.0), 3.0) * 60)
            piece = f"\033[38;2;0;0;0;48;2;255;{light};{light}m{piece}\033[0m"
        elif abs(nats) > 0.5:
            piece += f"[{nats:+.1f}]"
        pieces.append(piece)
    return "".join(pieces) + (" ..." if len(gap) > most else "")


def mean_by_position(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Mean of (N,) values at each response position: (length,), NaN where no row has a token."""
    total = values.new_zeros(length).index_add(0, positions, values)
    return total / values.new_zeros(length).index_add(0, positions, torch.ones_like(values))


def table(summary: dict) -> str:
    """Three rows: student before, student after, teacher; and what it cost."""
    lines = [f"{'':16}{'accuracy':>10}{'+- se':>8}{'truncated':>11}{'length':>8}{'n':>6}"]
    for name, key in (("student before", "before"), ("student after", "after"), ("teacher", "teacher")):
        s = summary[key]
        if s is None:
            lines.append(f"{name:16}{'-':>10}")
        else:
            row = f"{name:16}{s['accuracy']:>10.1%}{s['se']:>8.1%}{s['truncated']:>11.1%}"
            lines.append(row + f"{s['mean_length']:>8.0f}{s['n']:>6}")
    if "change" in summary:
        lines.append(f"change          {difference_text(summary['change'])}")
    tokens, minutes = summary["response_tokens"], summary["seconds"] / 60
    lines.append(f"{tokens:,} tokens sampled in {summary['steps']} steps, {minutes:.1f} minutes")
    return "\n".join(lines)


def draw_curve(folder: Path) -> Path:
    """curve.png: reverse KL, accuracy and horizon by step. Raises BadInput if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    path = folder / "metrics.csv"
    if not path.is_file():
        raise BadInput(f"{folder} has no metrics.csv: name the folder of a run")
    rows = read_csv(path)
    steps = [int(row["step"]) for row in rows]
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    axes[0].plot(steps, [float(row["reverse_kl"]) for row in rows], color="#0072b2")
    axes[0].set(title="reverse KL, nats per token", ylim=(0, None))
    seen = [(int(r["step"]) + 1, float(r["accuracy"])) for r in rows if r["accuracy"]]
    if summary.get("after"):
        seen.append((len(steps), summary["after"]["accuracy"]))
    if summary.get("before"):
        seen = [(0, summary["before"]["accuracy"]), *seen]
        ends = (("student before", "before", "#999999"), ("teacher", "teacher", "#009e73"))
        for label, key, colour in ends:
            if summary.get(key):
                axes[1].axhline(summary[key]["accuracy"], color=colour, linestyle=":", label=label)
    if seen:
        axes[1].plot(*zip(*seen), color="#d55e00", marker="o", label="student")
        axes[1].legend(loc="center right")
    axes[1].set(title="held-out accuracy", ylim=(-0.02, 1.02))
    axes[2].step(steps, [int(row["horizon"]) for row in rows], color="#0072b2", label="horizon")
    axes[2].plot(steps, [float(row["response_length"]) for row in rows], color="#cc79a7", label="mean length")
    axes[2].set(title="response tokens", ylim=(0, None))
    axes[2].legend()
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curve.part", dpi=110, format="png")
    plt.close(figure)
    settle(folder / "curve.part", folder / "curve.png")
    return folder / "curve.png"


def main() -> None:
    if len(sys.argv) != 2:
        raise BadInput(f"{len(sys.argv) - 1} arguments where one is needed: python report.py RUN_FOLDER")
    print(draw_curve(Path(sys.argv[1])))


if __name__ == "__main__":
    run(main)
