"""Three pictures that explain the method, drawn with the project's own functions.

    python -m extras.pictures RUN      RUN is a finished run, such as runs/toy-topd-1

results/one_step.png     an answer of the student before and after RUN, as the teacher scores it
results/reverse_kl.png   one Gaussian fitted to two modes, by reverse and by forward KL
results/schedules.png    the horizon of the four schedules
"""

import sys
from itertools import cycle
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import train
from opd import forward_kl, reverse_kl
from rollout import rollout, sampling_noise
from schedules import SCHEDULES, make_schedule
from support import data, run_folder
from support.cli import BadInput, run_main
from support.prompts import render

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHOWN = 17  # tokens of an answer in the picture
RESULTS = Path(__file__).parents[1] / "results"


@torch.no_grad()
def scored_answer(student: str, knobs: train.Knobs) -> tuple[list[str], Tensor, Tensor]:
    """The tokens of an answer to the first held-out problem, their reverse KL, and log q(y) - log p(y)."""
    names = {"student": student, "teacher": knobs.teacher}
    pair = train.load_pair(train.Knobs(**names, checkpointing=False, dtype="float32"), torch.device("cpu"))
    # One problem at least, also of a run without evaluation.
    limit = knobs.eval_limit or 1
    _, problems = data.train_and_test(knobs.data, knobs.eval_data, limit, knobs.seed, data.layout_of(knobs))
    prompts = render(pair.tokenizer, problems[:1], knobs.instruction, knobs.system_prompt)
    noise = sampling_noise([(knobs.seed, "picture", 0)], SHOWN)
    rollouts = rollout(pair.student, prompts, SHOWN, pair.eos_ids, noise, vocab_size=pair.vocab_size)
    _, tokens = train.score(pair, rollouts)
    texts = [pair.tokenizer.decode([token]) for token in rollouts.tokens[0].tolist()]
    return texts, tokens["reverse_kl"], tokens["teacher_logp"] - tokens["student_logp"]


def draw_step(run: Path) -> Path:
    """The student writes, the teacher scores each token, the horizon cuts: before and after a run."""
    knobs = run_folder.resumed(train.Knobs, {"resume": str(run)})
    horizon = train.schedule_of(knobs)(0)
    steps = len(run_folder.read_csv(run / "metrics.csv"))  # a stopped run has fewer than its settings say
    rows = {"before": knobs.student, f"after {steps} steps": str(run / "student")}
    figure, axis = plt.subplots(figsize=(12, 2.6))
    for line, (name, student) in enumerate(rows.items()):
        texts, kl, gap = scored_answer(student, knobs)
        axis.text(
            -0.2, -1.6 * line - 0.3, f"the student writes,\n{name}", ha="right", va="center", fontsize=9
        )
        axis.text(-0.2, -1.6 * line - 1, "log q(y) - log p(y)", ha="right", va="center", fontsize=9)
        for i, text in enumerate(texts):
            seen = i < horizon
            shade = plt.cm.Oranges(min(0.75, kl[i].item() / 12)) if seen else "#eeeeee"
            axis.add_patch(
                plt.Rectangle((i, -1.6 * line - 0.6), 0.94, 0.6, facecolor=shade, edgecolor="none")
            )
            ink = "black" if seen else "#999999"
            how = {"ha": "center", "va": "center", "fontsize": 8}
            # A token such as $$ is not a formula.
            axis.text(i + 0.47, -1.6 * line - 0.3, text.strip(), color=ink, parse_math=False, **how)
            if seen:
                axis.text(i + 0.47, -1.6 * line - 1, f"{gap[i]:+.1f}", **how)
    axis.axvline(horizon - 0.03, color="#0072b2", linestyle="--")
    axis.text(horizon + 0.1, 0.35, f"the horizon, {horizon} tokens", color="#0072b2")
    axis.text(0, 0.35, "colour: reverse KL to the teacher, which scores every token")
    axis.set(xlim=(-2.5, SHOWN), ylim=(-2.8, 0.7))
    axis.axis("off")
    return save(figure, RESULTS / "one_step.png")


def fitted(divergence, teacher_logp: Tensor, grid: Tensor, start: float) -> Tensor:
    """The log-probabilities, (1, V), of the Gaussian on the grid with the least divergence."""
    mean = torch.tensor(start, requires_grad=True)
    log_width = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_width], lr=0.02)
    for _ in range(1500):
        student_logp = (-0.5 * ((grid - mean) / log_width.exp()) ** 2).log_softmax(-1)[None]
        optimizer.zero_grad()
        divergence(student_logp, teacher_logp, None).sum().backward()
        optimizer.step()
    return student_logp.detach()


def draw_divergences() -> Path:
    """Reverse KL chooses a mode of the teacher; forward KL covers both, and what lies between them."""
    grid = torch.linspace(-6, 6, 241)
    modes = [0.6 * torch.exp(-((grid + 2) ** 2) / 0.5), 0.4 * torch.exp(-((grid - 2.5) ** 2) / 0.5)]
    teacher_logp = (sum(modes) + 1e-12).log().log_softmax(-1)[None]
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.3), sharey=True, layout="constrained")
    for axis, divergence, name in zip(axes, (reverse_kl, forward_kl), ("reverse", "forward")):
        student_logp = fitted(divergence, teacher_logp, grid, start=-1.0)
        value = divergence(student_logp, teacher_logp, None).item()
        axis.fill_between(grid, teacher_logp[0].exp(), color="#bbbbbb", label="teacher q")
        axis.plot(grid, student_logp[0].exp(), color="#d55e00", label="student p")
        axis.set_title(f"least {name} KL: {value:.2f} nats", fontsize=10)
        axis.set(xticks=[], yticks=[])
        axis.legend(fontsize=8)
    return save(figure, RESULTS / "reverse_kl.png")


def draw_schedules(budget: int = 1024, steps: int = 200) -> Path:
    """The horizon at each step, with the default settings."""
    figure, axis = plt.subplots(figsize=(5, 2.3), layout="constrained")
    for name, line in zip(SCHEDULES, cycle(["-", "-", "-", "--"])):  # by default topd and esr almost agree
        horizon_at = make_schedule(name, budget, steps)
        horizons = [horizon_at(step) for step in range(steps)]
        axis.step(range(steps), horizons, line, label=name, where="post", linewidth=2)
    axis.set(xlabel="step", ylabel="horizon H in tokens", ylim=(0, 1.1 * budget))
    axis.legend(fontsize=8, ncols=2)
    return save(figure, RESULTS / "schedules.png")


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def main() -> None:
    if len(sys.argv) != 2:
        raise BadInput(f"{len(sys.argv) - 1} arguments instead of one: python -m extras.pictures RUN_FOLDER")
    print(draw_step(Path(sys.argv[1])))
    print(draw_divergences())
    print(draw_schedules())


if __name__ == "__main__":
    run_main(main)
