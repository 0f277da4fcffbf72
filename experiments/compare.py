"""Horizons compared, with the controls that tell what truncation does: same steps, same data, several seeds.

    python experiments/compare.py                       the toy world, every arm, 5 seeds: 12 minutes
    python experiments/compare.py --world closing       the world in which truncation has to fail
    python experiments/compare.py --report              table, claims and figures of what is there already
    python experiments/compare.py --student A --teacher B --data FILE --arms full --arms topd-0.1 --minutes 30

A row of the CSV is a finished run, one arm with one seed, scored after its last step. A run whose row is
there is not made again: the same command goes on with a stopped comparison. The arms are in arms.py. Seconds
are those of sampling, selecting and training, not of scoring; `..._curves.csv` has the accuracy on the way.
Left out: checkpoints within a run (a stop costs one run), several answers to a problem (seeds give them).
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import claims
import figures
from arms import ARMS, GROUPS, SHARE, token_values

import data
import fast
import memory
import models
import prepare
import report
import train
from cli import BadInput, Stopped, knob, parse, run
from eval_math import evaluate
from scores import score

# Knobs of a single run that mean nothing here.
WITHOUT = ("schedule", "horizon", "popd_growth", "popd_interval", "eval_every", "show_every", "save_every")
WITHOUT += ("resume", "out", "seed", "dry_run")


@dataclass(frozen=True)
class Knobs(train.Knobs):
    arms: tuple[str, ...] = knob((), "may be given several times; default: those of --group", choices=ARMS)
    group: str = knob("", "default: closing in that world, all elsewhere", choices=GROUPS)
    seeds: int = knob(5, "runs of each arm, with seeds 0, 1, ...", 1)
    minutes: float = knob(0.0, "of training a run, --steps and all schedules spread over them; 0: --steps", 0)
    esr_tokens: int = knob(100, "ESR's horizon; in the toy world 20, as its answers have 120 tokens", 1)
    curve_points: int = knob(8, "scores along a run, the last included; 1: that alone", 1)
    eval_limit: int = knob(64, "held-out problems, the same for all", 2)
    eval_temperature: float = knob(1.0, "of the sampled score; there is a greedy one too", 0.01)
    keep: str = knob(
        "", "folder in which each run's student is kept, as ARM-SEED: what probe.py --trained takes"
    )
    csv: str = knob("", "default: results/compare.csv, compare_closing.csv, compare_STUDENT.csv")
    report: bool = knob(False, "run nothing: table, claims and figures of what the CSV holds")


# In these, and in the hardware, all rows of a file agree.
SETTINGS = ("student", "teacher", "data", "eval_data", "instruction", "system_prompt", "max_new_tokens")
SETTINGS += ("steps", "minutes", "batch_size", "rollouts_per_prompt", "esr_tokens", "divergence")
SETTINGS += ("temperature", "lr", "warmup", "decay", "beta2", "clip", "dtype", "low_memory")
SETTINGS += ("eval_limit", "eval_temperature", "curve_points")


def choose(given: dict) -> tuple[Knobs, Path]:
    """The knobs, and the CSV file. The toy world unless models or data are named. Raises BadInput."""
    if useless := [f"--{name.replace('_', '-')}" for name in WITHOUT if name in given]:
        raise BadInput(f"{', '.join(useless)} says nothing here, where --arms and --seeds do: drop it")
    preset = given.get("preset") or ("qwen" if given.keys() & {"student", "teacher", "data"} else "toy")
    of_toy = {"esr_tokens": 20} if preset == "toy" else {}
    knobs, _ = prepare.settings(Knobs, of_toy | given | {"preset": preset})
    name = Path(knobs.student).name
    if preset == "toy":
        name = "" if knobs.world == "opening" else knobs.world
    path = Path(knobs.csv or ROOT / "results" / f"{f'compare_{name}'.rstrip('_')}.csv")
    arms = knobs.arms or GROUPS[knobs.group or ("closing" if name == "closing" else "all")]
    return replace(knobs, arms=tuple(dict.fromkeys(arms))), path


def settings_of(knobs: Knobs) -> dict[str, str]:
    """The columns in which all rows agree. Of a folder, the last two parts of its path."""
    found = {name: " ".join(str(getattr(knobs, name)).split()) for name in SETTINGS}
    for name in ("student", "teacher", "data", "eval_data"):
        found[name] = "/".join(Path(found[name]).parts[-2:])
    return found | {"hardware": report.environment(models.find_device(knobs.device))["hardware"]}


def examiner(pair: models.Pair, knobs: Knobs) -> Callable:
    """ask(model, temperature, seed) -> a record of each held-out problem, in their order."""
    _, problems = data.train_and_test(knobs.data, knobs.eval_data, knobs.eval_limit, knobs.seed)
    asked = data.render(pair.tokenizer, problems, knobs.instruction, knobs.system_prompt)

    def ask(model, temperature: float, seed: int) -> list[dict]:
        size = memory.batch_that_fits(model, asked, knobs.max_new_tokens, knobs.eval_batch)
        with tempfile.TemporaryDirectory() as folder:
            how = Path(folder, "answers.jsonl"), knobs.max_new_tokens, size, 1, seed
            law = {"temperature": temperature}
            records = evaluate(model, pair.tokenizer, asked, problems, pair.ends, *how, **law)
        return sorted(records, key=lambda record: record["index"])

    return ask


def marks(records: list[dict]) -> str:
    """A digit per problem, 1 where the answer is right: what paired differences need."""
    return "".join("01"[record["correct"]] for record in records)


def train_arm(pair: models.Pair, prompts: list, name: str, knobs: Knobs, bar: tqdm, look_in) -> dict:
    """One run: what it cost. `look_in(part, cost)` is called along the way, `curve_points` - 1 times."""
    arm, size, device = ARMS[name], max(1, round(SHARE * knobs.max_new_tokens)), pair.student.device
    optimizer = torch.optim.AdamW(pair.masters.values(), betas=(0.9, knobs.beta2), weight_decay=0, fused=True)
    rng, chance = (torch.Generator(device).manual_seed(s) for s in (knobs.seed, knobs.seed + 1_000_003))
    knobs, sampler = replace(knobs, lr=knobs.lr * arm.rate), fast.sampler(knobs.sampler, pair.student)
    cost = {"steps_done": 0, "response_tokens": 0, "loss_tokens": 0, "seconds": 0.0, "rollout_s": 0.0}
    place, part, seen = 0, 0, []
    while place < knobs.steps:
        started, horizon = time.perf_counter(), arm.horizon(place, knobs, seen)
        ids = data.batch(len(prompts), knobs.batch_size, cost["steps_done"], knobs.seed)
        asked = [prompts[i] for i in ids for _ in range(knobs.rollouts_per_prompt)]
        ro = sampler(pair.student, asked, horizon, pair.ends, knobs.temperature, pair.vocab_size, rng)
        cost["rollout_s"] += pair.seconds_since(started)
        mask = arm.mask and arm.mask(ro, size, chance, partial(token_values, pair, ro, knobs))
        row, stats = train.update(pair, optimizer, ro, knobs, place, mask)
        cost["seconds"] += pair.seconds_since(started)
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            where = f"arm {name}, seed {knobs.seed}, step {cost['steps_done']}"
            raise Stopped(1, f"{where} has loss {row['loss']}: use a lower --lr and another --csv")
        cost["steps_done"] += 1
        cost["response_tokens"] += int(ro.response_mask.sum())
        cost["loss_tokens"] += len(stats["row"])
        seen.append((horizon, stats["reverse_kl"][stats["position"] >= horizon // 2].mean().item()))
        place = cost["steps_done"]
        if knobs.minutes:  # learning rate and horizons follow the clock, so that each arm comes to its end
            place = int(cost["seconds"] / 60 / knobs.minutes * knobs.steps)
        bar.set_postfix({"arm": name, "seed": knobs.seed, "step": f"{place}/{knobs.steps}"})
        before, part = part, place * knobs.curve_points // knobs.steps
        if before < part < knobs.curve_points:
            look_in(part / knobs.curve_points, cost)
    return cost


def run_once(pair: models.Pair, prompts: list, ask, name: str, knobs: Knobs, bar: tqdm) -> tuple[dict, list]:
    """A row for the CSV, and the rows of its curve. Arms that mask have none: their ends are compared."""
    model, cost, curve = pair.teacher if name == "teacher" else pair.student, {}, []

    def look_in(part: float, cost: dict) -> None:
        records = ask(model, knobs.eval_temperature, knobs.seed)
        accuracy = {"accuracy": score(records)["accuracy"], "correct": marks(records)}
        spent = {key: cost[key] for key in ("steps_done", "response_tokens", "seconds")}
        curve.append({"arm": name, "seed": knobs.seed, "part": part} | spent | accuracy)

    if name in ARMS:
        points = 1 if ARMS[name].mask else knobs.curve_points
        cost = train_arm(pair, prompts, name, replace(knobs, curve_points=points), bar, look_in)
    sampled, greedy = (ask(model, temperature, knobs.seed) for temperature in (knobs.eval_temperature, 0.0))
    found = {key: score(sampled)[key] for key in ("accuracy", "last_box", "truncated", "mean_length")}
    found |= {"greedy": score(greedy)["accuracy"], "n": len(sampled)}
    found |= {"correct": marks(sampled), "correct_greedy": marks(greedy)}
    return {"arm": name, "seed": knobs.seed} | {key: cost.get(key, 0) for key in claims.COSTS} | found, curve


def compare(knobs: Knobs, path: Path) -> None:
    """Make the runs that are missing, seed by seed, so that a part of them is a comparison too."""
    shared, curves = settings_of(knobs), claims.curves_of(path)
    if curves.exists() and not path.exists():
        raise BadInput(f"{curves} belongs to a {path} that is gone: remove it too, or name another --csv")
    results = claims.read(path) if path.exists() else {}
    claims.check_settings(path, results, shared)
    names = (*claims.ENDS, *knobs.arms)
    wanted = [(n, s) for s in range(knobs.seeds) for n in names if s not in results.get(n, {})]
    for name in knobs.arms:
        ARMS[name].horizon(0, knobs, [])  # raises BadInput where the settings make no schedule
    if not wanted:
        print(f"all of it is in {path} already")
        return
    make_folder(path.parent, "csv")
    make_folder(Path(knobs.keep), "keep")
    pair, prompts, _ = prepare.load(knobs, Path())
    ask, start = examiner(pair, knobs), {n: p.detach().clone() for n, p in pair.masters.items()}
    with tqdm(total=len(wanted), unit="run", mininterval=0.5) as bar:
        for name, seed in wanted:
            with torch.no_grad():
                for weight, values in pair.masters.items():
                    values.copy_(start[weight])
            pair.publish()
            row, curve = run_once(pair, prompts, ask, name, replace(knobs, seed=seed), bar)
            if curve:  # first: a stop in between leaves a curve without a run, and that one is ignored
                report.append_csv(curves, curve)
            report.append_csv(path, [row | shared])
            if knobs.keep and name in ARMS:
                keep(pair, Path(knobs.keep, f"{name}-{seed}"))
            told = f"{name}, seed {seed}: {row['accuracy']:.0%} after {row['seconds']:.1f} s"
            bar.write(told, file=sys.stdout)
            bar.update()


def make_folder(path: Path, flag: str) -> None:
    """Before the first run, not after it. Raises BadInput."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path} ({error}): name another one with --{flag}") from error


def keep(pair: models.Pair, folder: Path) -> None:
    """After the run's row is written: that one is not lost with the student. Raises Stopped."""
    try:
        pair.save_student(folder)
    except (OSError, SafetensorError) as error:
        what = f"cannot keep the student in {folder} ({error}), the run's row is written"
        raise Stopped(1, f"{what}: make room, or name another --keep") from error


def main() -> None:
    knobs, path = choose(parse(Knobs, __doc__, None))
    if not knobs.report:
        compare(knobs, path)
    results, curves = claims.read(path), claims.read_curves(path)
    closing = knobs.preset == "toy" and knobs.world == "closing"
    print(claims.tell(results, curves, knobs.arms, knobs.seeds, closing))
    for figure in figures.draw(path, results, curves, knobs.arms, knobs.seeds):
        print(f"figure: {figure}")


if __name__ == "__main__":
    run(main)
