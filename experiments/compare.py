"""Compare horizons, with controls that show what truncation does: same steps, same data, several seeds.

    python experiments/compare.py                       the toy world, every arm, 5 seeds: 15 minutes or more
    python experiments/compare.py --world closing       the world in which truncation has to fail
    python experiments/compare.py --report              table, claims and figures of the existing rows
    python experiments/compare.py --student A --teacher B --data FILE --arms full --arms topd-0.1 --minutes 30

A row of the CSV is a finished run, one arm with one seed, scored after its last step. Runs whose rows exist
are not repeated: the same command continues a stopped comparison. Rows of other settings are refused. What is
in the files that they name is not compared: if data or a model changes, name another --csv. The arms are in
arms.py. Seconds are those of sampling, choosing tokens and training, without evaluation; `..._curves.csv` has
the accuracy during the runs.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import claims
import figures
import torch
from arms import ARMS, GROUPS, Arm
from root import RESULTS
from safetensors import SafetensorError
from tqdm import tqdm

import train
from eval_math import HeldOut, evaluate
from rollout import rollout
from support import data, models, run_folder
from support.cli import BadInput, Stopped, flag_of, knob, parse, run_main
from support.run import Run
from support.scores import score_answers

# Flags of train.py that do not apply to a comparison.
WITHOUT = ("schedule", "horizon", "popd_growth", "popd_interval", "eval_every", "show_every", "save_every")
WITHOUT += ("resume", "out", "seed", "dry_run", "sampler")


CHOICES = tuple(name for name, arm in ARMS.items() if not arm.low_memory)  # --low-memory is for all arms


@dataclass(frozen=True)
class Knobs(train.Knobs):
    eval_limit: int = knob(64, "held-out problems, the same for all runs", least=2)
    eval_temperature: float = knob(1.0, "of the sampled score; there is a greedy one too", least=0.01)

    arms: tuple[str, ...] = knob(
        (), "may be repeated; default: those of GROUPS in arms.py", choices=CHOICES, group="the comparison"
    )
    seeds: int = knob(5, "runs of each arm, with seeds 0, 1, ...", least=1)
    minutes: float = knob(
        0.0,
        "of training per run; schedules and learning rate spread over them: after each step the step number "
        "advances by the clock, by at least 1, so a run takes at most --steps steps; 0: all --steps",
        least=0,
    )
    esr_tokens: int = knob(100, "ESR's horizon; toy and words: 20, as their answers are short", least=1)
    curve_points: int = knob(8, "scores along a run, the last included; 1: the last alone", least=1)
    keep: str = knob("", "folder for the student of each run, ARM-SEED, as probe.py --trained takes it")
    csv: str = knob(
        "", "default: results/compare.csv, compare_closing.csv, compare_words.csv, compare_STUDENT.csv"
    )
    report: bool = knob(False, "train nothing: table, claims and figures of the rows in the CSV")


# All rows of a file have the same values of these, and the same hardware.
SETTINGS = ("student", "teacher", "data", "eval_data", "instruction", "system_prompt", "max_new_tokens")
SETTINGS += ("steps", "minutes", "batch_size", "rollouts_per_prompt", "esr_tokens", "divergence")
SETTINGS += ("temperature", "lr", "warmup", "decay", "beta2", "clip", "dtype", "low_memory")
SETTINGS += ("eval_limit", "eval_temperature", "curve_points")


def choose(given: dict) -> tuple[Knobs, Path]:
    """The settings, and the CSV file. The toy world unless models or data are named. Raises BadInput."""
    unused = [flag_of(name) for name in WITHOUT if name in given]
    if unused:
        raise BadInput(f"{', '.join(unused)} does not apply here, --arms and --seeds decide: drop it")
    preset = run_folder.preset_of(given, default="toy")
    defaults = {"esr_tokens": 20} if preset in ("toy", "words") else {}
    knobs, _ = run_folder.settings(Knobs, defaults | given | {"preset": preset})
    names = {"toy": "" if knobs.world == "opening" else knobs.world, "words": "words"}
    name = names.get(preset, Path(knobs.student).name)
    path = Path(knobs.csv or RESULTS / f"{f'compare_{name}'.rstrip('_')}.csv")
    arms = knobs.arms or GROUPS["closing" if name == "closing" else "all"]
    return replace(knobs, arms=tuple(dict.fromkeys(arms)), eval_every=0), path


def settings_of(knobs: Knobs) -> dict[str, str]:
    """The columns in which all rows agree. Of a folder, the last two parts of its path."""
    found = {name: " ".join(str(getattr(knobs, name)).split()) for name in SETTINGS}
    for name in ("student", "teacher", "data", "eval_data"):
        found[name] = "/".join(Path(found[name]).parts[-2:])
    return found | {"hardware": run_folder.environment(models.find_device(knobs.device))["hardware"]}


class Setup(NamedTuple):
    """What a run needs: the models, the prompts to train on, the held-out problems, and the settings."""

    pair: train.Pair
    prompts: list[list[int]]
    held_out: HeldOut
    knobs: Knobs

    def answers(self, model, temperature: float) -> list[dict]:
        """A graded answer of `model` to each held-out problem, in their order."""
        length = self.knobs.max_new_tokens
        how = {"seed": self.knobs.seed, "temperature": temperature}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "answers.jsonl")
            records = evaluate(model, self.held_out, path, length, self.knobs.eval_batch, **how)
        return sorted(records, key=lambda record: record["index"])

    def scores(self, model, *more: str) -> dict:
        """Columns: scores of sampled and greedy answers to the same problems; `more` are of the sampled."""
        sampled = self.answers(model, self.knobs.eval_temperature)
        greedy = self.answers(model, 0.0)
        scores = score_answers(sampled)
        row = {key: scores[key] for key in ("accuracy", "last_box", "truncated", "mean_length", *more)}
        row |= {"greedy": score_answers(greedy)["accuracy"], "n": len(sampled)}
        return row | {"correct": correct_digits(sampled), "correct_greedy": correct_digits(greedy)}


def correct_digits(records: list[dict]) -> str:
    """A digit per problem, 1 if the answer is correct: what paired differences need."""
    return "".join("01"[record["correct"]] for record in records)


def load(knobs: Knobs) -> Setup:
    """Build the toy world if it is needed, and load models and problems. Raises BadInput."""
    run_folder.build_world(knobs, rollout)
    device = models.find_device(knobs.device)
    problems, test = data.problems_of(knobs)
    pair = train.load_pair(knobs, device)
    if pair.teacher_tokenizer:
        what = f"{knobs.student} and {knobs.teacher} have different tokenizers"
        raise BadInput(f"{what}, with which train.py alone works: name a teacher of the student's family")
    configs = [pair.student.config, pair.teacher.config]
    prompts = models.render_prompts(pair.tokenizer, problems, knobs, configs)
    test_prompts = models.render_prompts(pair.tokenizer, test, knobs, configs)
    return Setup(pair, prompts, HeldOut(test, test_prompts, pair.tokenizer, pair.eos_ids), knobs)


class ArmRun(Run):
    """One run of an arm: its rows, its costs, and the looks along the way."""

    def __init__(self, setup: Setup):
        super().__init__(setup.pair.student.device)
        self.setup = setup
        self.looks: list[dict] = []
        self.next_step = 0

    def steps(self, total: int) -> Iterator[int]:
        """With --minutes increasing numbers by the clock: schedules and learning rate come to their ends."""
        with tqdm(total=total, unit="step", leave=False) as bar:
            while self.next_step < total:
                yield self.next_step
                bar.update(self.next_step - bar.n)

    def costs(self) -> dict[str, float]:
        sums = {name: sum(row[name] for row in self.rows) for name in claims.COSTS[1:]}
        return {"steps_done": len(self.rows)} | sums

    def log(self, rollouts, tokens: dict[str, torch.Tensor], **columns) -> dict:
        row = super().log(rollouts, tokens, **columns)
        row["seconds"] = row["rollout_s"] + row["score_s"] + row["update_s"]  # without evaluation
        row["loss_tokens"] = len(tokens["row"])
        late = tokens["position"] >= row["horizon"] // 2
        row["late_kl"] = tokens["reverse_kl"][late].mean().item()  # in the second half of the horizon
        knobs = self.setup.knobs
        self.next_step = row["step"] + 1
        if knobs.minutes:
            by_clock = int(self.costs()["seconds"] / (60 * knobs.minutes) * knobs.steps)
            self.next_step = max(self.next_step, by_clock)
        point = self.next_step * knobs.curve_points // knobs.steps
        if row["step"] * knobs.curve_points // knobs.steps < point < knobs.curve_points:
            self.look(point / knobs.curve_points)  # a curve point lies between the two steps
        return row

    def look(self, part: float) -> None:
        """Score the student after this part of the run."""
        records = self.setup.answers(self.setup.pair.student, self.setup.knobs.eval_temperature)
        all_costs = self.costs()
        costs = {name: all_costs[name] for name in ("steps_done", "response_tokens", "seconds")}
        scores = {"accuracy": score_answers(records)["accuracy"], "correct": correct_digits(records)}
        self.looks.append({"part": part} | costs | scores)


def train_arm(setup: Setup, arm: Arm) -> ArmRun:
    """Train the student as the arm says."""
    run = ArmRun(setup)
    arm.train(setup.pair, setup.prompts, setup.knobs, run)
    return run


def run_once(setup: Setup, name: str) -> tuple[dict, list[dict]]:
    """Train an arm, or only score the student or the teacher: a row for the CSV, and those of the curve."""
    run = {"arm": name, "seed": setup.knobs.seed}
    costs, looks = dict.fromkeys(claims.COSTS, 0), []
    if name in ARMS:
        found = train_arm(setup, ARMS[name])
        costs, looks = found.costs(), found.looks
    model = setup.pair.teacher if name == "teacher" else setup.pair.student
    return run | costs | setup.scores(model), [run | look for look in looks]


def compare(knobs: Knobs, path: Path) -> None:
    """Make the runs that the file lacks, seed by seed. Raises BadInput for other settings."""
    run_folder.prepare_file(path, "--csv")
    curves = claims.curves_path(path)
    if curves.exists() and not path.exists():
        raise BadInput(f"{curves} belongs to {path}, which does not exist: remove it, or name another --csv")
    shared = settings_of(knobs)
    results = claims.read(path, shared) if path.exists() else {}
    runs = product(range(knobs.seeds), (*claims.ENDS, *knobs.arms))
    wanted = [(name, seed) for seed, name in runs if seed not in results.get(name, {})]
    for name in knobs.arms:
        ARMS[name].horizon(knobs, [])  # raises BadInput before minutes of loading
    if not wanted:
        print(f"all runs are in {path} already")
        return
    if knobs.keep:
        run_folder.check_creatable(Path(knobs.keep, "full-0"), "--keep")
    setup = load(knobs)
    start = {name: weight.detach().clone() for name, weight in setup.pair.masters.items()}
    for name, seed in tqdm(wanted, unit="run"):
        for weight_name, weight in setup.pair.masters.items():
            weight.data.copy_(start[weight_name])
        setup.pair.copy_masters_to_weights()
        row, curve = run_once(setup._replace(knobs=replace(knobs, seed=seed)), name)
        if curve:  # first: a curve without its run, which a stop in between leaves, is ignored
            run_folder.append_csv(curves, curve)
        if knobs.keep and name in ARMS:  # before the row: a run that has one is not repeated
            setup.pair.save_student(Path(knobs.keep, f"{name}-{seed}"))
        run_folder.append_csv(path, [row | shared])
        tqdm.write(f"{name}, seed {seed}: {row['accuracy']:.0%} after {row['seconds']:.1f} s")


def main() -> None:
    knobs, path = choose(parse(Knobs, __doc__))
    if not knobs.report:
        try:
            compare(knobs, path)
        except (OSError, SafetensorError) as error:
            what = f"cannot write ({error}), finished rows are kept"
            raise Stopped(1, f"{what}: free some space, or name another --csv or --keep") from error
    results = claims.read(path)
    curves = claims.read_curves(path)
    closing = knobs.preset == "toy" and knobs.world == "closing"
    print(claims.format_results(results, curves, knobs.arms, knobs.seeds, closing))
    for figure in figures.draw(path, results, curves, knobs.arms, knobs.seeds):
        print(f"figure: {figure}")


if __name__ == "__main__":
    run_main(main)
