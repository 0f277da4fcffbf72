"""The measurements behind the papers' claims, each with the control that the papers lack.

    python experiments/probe.py decay     the teacher continues the student's beginnings, and its own
    python experiments/probe.py cascade   reverse KL by position, before and after training on N tokens
    python experiments/probe.py swap      one model writes the first k tokens, another one the rest
    python experiments/probe.py draw results/probe_decay.csv       the figure again, without a model

The default is the toy world, where a student is trained first if one is needed. For real models give
--student, --teacher and --data, and --trained RUN/student with --horizon for the student after training. A
probe prints its reading, and writes results/probe_NAME.csv, a row per point, and a figure next to it.
Intervals are 95 % over problems, however many answers each has. `python experiments/probe.py NAME --help`
lists the settings.
Shapes: N tokens, T positions.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from claims import check_settings
from figures import draw_probe
from root import RESULTS
from torch import Tensor
from tqdm import tqdm

import train
from eval_math import INSTRUCTION, boxed, extract
from extras.profile_horizon import in_batches, scored
from rollout import Rollout
from schedules import make_schedule
from support import data, models, run_folder, scores, toy
from support.batch_size import batch_that_fits
from support.cli import BadInput, Stopped, knob, parse, run_main
from support.prompts import render
from support.run import Run
from support.workers import Grader


@dataclass(frozen=True)
class Knobs:
    student: str = knob("", "hub name or folder, before training; default, also of the next two: the toy's")
    teacher: str = knob("", "hub name or folder; same tokenizer as the student's")
    data: str = knob("", "hub name[:config], folder or file: its test split")
    world: str = knob("opening", "the toy's world", choices=toy.WORLDS)
    problems: int = knob(100, "a random subset drawn by the seed", least=2)
    samples: int = knob(4, "answers to each problem", least=1)
    instruction: str = knob(INSTRUCTION, "text after each problem; the toy: none")
    system_prompt: str = knob("", "system message; the chat template's own if empty")
    max_new_tokens: int = knob(1024, "T, the full response length; the toy: 128", least=2)
    temperature: float = knob(1.0, "of the sampling, and of both models' distributions", least=0.01)
    sample_batch: int = knob(100, "answers sampled together", least=1)
    micro_batch: int = knob(8192, "tokens scored together", least=1)
    seed: int = knob(0, "of problems, sampling and the toy's training", least=0, most=2**32)
    dtype: str = knob("", "default: the faster one here", choices=("bfloat16", "float32"))
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    out: str = knob("", "CSV file, its figure is written next to it; default: results/probe_NAME.csv")

    def settings(self, probe: str) -> dict[str, str]:
        """What all rows of a CSV file have, as text. Of a folder, the last two parts of its path."""
        found = {"probe": probe} | {name: value for name, value in asdict(self).items() if name != "out"}
        for name, value in found.items():
            text = "" if value is None else str(value).replace(f"{toy.CACHE}/", "toy/")
            found[name] = "/".join(Path(text).parts[-2:]) if Path(text).is_absolute() else text
        return found


@dataclass(frozen=True)
class PrefixKnobs(Knobs):
    prefixes: str = knob("0 0.05 0.1 0.2 0.4 0.6", "values of k: below 1 a fraction of T, otherwise tokens")


@dataclass(frozen=True)
class TrainedKnobs(Knobs):
    samples: int = knob(
        16, "answers to each problem: a few degenerate ones hold most of the reverse KL", least=1
    )
    trained: str = knob("", "the student after training, RUN/student; default: the toy's, trained first")
    horizon: float | None = knob(None, "N of that training, as train.py's --horizon; the toy: 20")

    def window(self) -> int:
        """N in tokens: training reached the positions 0 to N - 1. Raises BadInput."""
        return make_schedule("esr", self.max_new_tokens, steps=1, horizon=self.horizon)(0)


@dataclass(frozen=True)
class SwapKnobs(PrefixKnobs, TrainedKnobs):
    samples: int = knob(4, "answers to each problem", least=1)


class Setup(NamedTuple):
    """A problem and its prompt stand here once for each of its answers, which are neighbours."""

    before: train.Pair
    after: train.Pair | None  # the same teacher, the student after training
    problems: list[data.Problem]
    prompts: list[list[int]]
    grader: Grader | None
    knobs: Knobs


def complete(knobs_class: type, given: dict) -> Knobs:
    """The given settings over the toy's, or over the defaults if models are given. Raises BadInput."""
    real = given.keys() & {"student", "teacher", "data"}
    if real and (len(real) < 3 or "world" in given):
        raise BadInput("--student, --teacher and --data go together: give all three, or none and --world")
    known = knobs_class.__dataclass_fields__
    defaults = {"world": ""} if real else toy.preset(given.get("world", Knobs.world))
    if issubclass(knobs_class, TrainedKnobs):
        if (real or "trained" in given) and not {"trained", "horizon"} <= given.keys():
            what = "a student that is trained already needs --trained RUN/student and --horizon, its N"
            raise BadInput(f"{what}: give both")
        defaults |= {"horizon": 20.0}
    knobs = knobs_class(**({name: value for name, value in defaults.items() if name in known} | given))
    if isinstance(knobs, TrainedKnobs):
        knobs.window()  # raises BadInput before minutes of loading
    if isinstance(knobs, PrefixKnobs):
        knobs = replace(knobs, prefixes=prefix_lengths(knobs))
    return replace(knobs, dtype=models.dtype_name(knobs.dtype, models.find_device(knobs.device)))


def prefix_lengths(knobs: PrefixKnobs) -> str:
    """--prefixes in tokens, sorted, with N if there is one. Raises BadInput."""
    try:
        numbers = [float(k) for k in knobs.prefixes.split()]
        lengths = {int(k) if k >= 1 else round(k * knobs.max_new_tokens) for k in numbers}
    except (ValueError, OverflowError) as error:
        raise BadInput(
            f"--prefixes {knobs.prefixes!r} ({error}): give numbers such as '0 0.1 100'"
        ) from error
    flags = f"--prefixes {knobs.prefixes!r}"
    if isinstance(knobs, SwapKnobs):
        lengths.add(knobs.window())
        flags += " and --horizon"
    if not lengths or not 0 <= min(lengths) <= max(lengths) < knobs.max_new_tokens or max(lengths) == 0:
        limit = f"below --max-new-tokens {knobs.max_new_tokens}, one of them above 0"
        raise BadInput(f"{flags} give the lengths {sorted(lengths)}: give some {limit}")
    return " ".join(map(str, sorted(lengths)))


def load(knobs: Knobs, grader: Grader | None) -> Setup:
    """Models, problems and prompts; trains the toy's student if the probe needs it. Raises BadInput."""
    if knobs.world:
        toy.build(knobs.world)
    problems = data.subset(data.read_problems(knobs.data, "test"), knobs.problems, knobs.seed)
    if len(problems) < 2:
        raise BadInput(f"{knobs.data} has one problem: it needs two or more")
    problems = [problem for problem in problems for _ in range(knobs.samples)]
    device = models.find_device(knobs.device)
    names = {"student": knobs.student, "teacher": knobs.teacher}
    pair = train.load_pair(train.Knobs(**names, checkpointing=False, dtype=knobs.dtype), device)
    prompts = render(pair.tokenizer, problems, knobs.instruction, knobs.system_prompt)
    models.check_context([pair.student.config, pair.teacher.config], prompts, knobs.max_new_tokens)
    batch_that_fits(pair.teacher, prompts, knobs.max_new_tokens, knobs.sample_batch)
    after = after_training(pair, knobs, device) if isinstance(knobs, TrainedKnobs) else None
    return Setup(pair, after, problems, prompts, grader, knobs)


def after_training(pair: train.Pair, knobs: TrainedKnobs, device: torch.device) -> train.Pair:
    """The pair with the student of --trained, or with the toy's student, which is trained here."""
    name = knobs.trained or knobs.student
    models.tokenizers_differ(name, knobs.teacher, allowed=False)
    student = models.load_model(name, torch.float32, device).requires_grad_(not knobs.trained)
    dtype = getattr(torch, knobs.dtype)
    after = train.make_pair(student, pair.teacher, pair.tokenizer, pair.vocab_size, pair.eos_ids, dtype)
    if not knobs.trained:  # as train.py does with the toy's preset, this horizon and this seed
        changes = {"seed": knobs.seed, "max_new_tokens": knobs.max_new_tokens, "eval_every": 0}
        settings = train.Knobs(**(toy.preset(knobs.world) | changes))
        prompts = render(pair.tokenizer, data.read_problems(knobs.data, "train"), settings.instruction)
        run = RunWithBar(device)
        train.train(after, train.adamw(after, settings), prompts, lambda _: knobs.window(), settings, run)
    return after


class RunWithBar(Run):
    def steps(self, total: int) -> Iterator[int]:
        yield from tqdm(super().steps(total), "training", total, leave=False)


# The probes.


def decay(setup: Setup) -> Iterator[dict]:
    """Off-policy teacher decay (ESR): the student writes k tokens, the teacher the rest; answers are graded.

    Control: the teacher continues k tokens of its own, which shows how much of a decline is due to the
    student's tokens. An answer counts if neither prefix has ended yet.
    """
    pair, knobs = setup.before, setup.knobs
    lengths = [int(k) for k in knobs.prefixes.split()]
    writers = {"student's prefix": pair.student, "own prefix": pair.teacher}
    heads = {who: ids_of(sampled(setup, m, setup.prompts, lengths[-1], who)) for who, m in writers.items()}
    for k in lengths:
        pairs = enumerate(zip(*heads.values()))
        unfinished = [i for i, both in pairs if not any(ended(head[:k], pair) for head in both)]
        if len({i // knobs.samples for i in unfinished}) < 2:
            return  # too few answers are that long
        records = {}
        for who in writers:
            part = {i: heads[who][i][:k] for i in unfinished}
            records[who] = finish(setup, pair.teacher, part, k, f"{who}, k = {k}")
            yield accuracy(who, k, records[who])
        yield gain("difference", k, records["own prefix"], records["student's prefix"])


def swap(setup: Setup) -> Iterator[dict]:
    """Prefix swap (ESR): of the base and the trained student one writes k tokens, the other one the rest.

    If training changed only how answers begin, a trained beginning has the whole gain, and a trained rest
    after the base student's beginning has none. Answers that end within k tokens are kept as they are.
    """
    knobs, length = setup.knobs, setup.knobs.max_new_tokens
    writers = {"base": setup.before.student, "trained": setup.after.student}
    heads = {who: ids_of(sampled(setup, m, setup.prompts, length, who)) for who, m in writers.items()}
    for who in writers:
        yield accuracy(f"{who} alone", length, graded(setup, dict(enumerate(heads[who]))))
    for k in map(int, knobs.prefixes.split()):
        records = {}
        for first, then in (("trained", "base"), ("base", "trained")):
            name = f"{first}, then {then}"
            part = {i: tokens[:k] for i, tokens in enumerate(heads[first])}
            records[name] = finish(setup, writers[then], part, k, f"{name}, k = {k}")
            yield accuracy(name, k, records[name])
        gap = gain("difference", k, records["base, then trained"], records["trained, then base"])
        yield gap
        if k == knobs.window():
            yield gap | {"curve": "at N"}


def cascade(setup: Setup) -> Iterator[dict]:
    """Cascading alignment (ESR): training on the first N tokens lowers the reverse KL beyond N too.

    Exact reverse KL of the student before and after, on the same fixed rollouts of the base student, and on
    each student's own. Caution: in the fixed ones the text beyond N follows a beginning by the base student,
    which the trained one may no longer write; on their own rollouts they are compared on different texts.
    """
    knobs, length = setup.knobs, setup.knobs.max_new_tokens
    n = knobs.window()
    if n >= length:
        raise BadInput(f"training reached all {n} tokens, none is beyond: lower --horizon")
    pairs = {"before": setup.before, "after": setup.after}
    own = {who: sampled(setup, pair.student, setup.prompts, length, who) for who, pair in pairs.items()}
    for kind in ("fixed", "own"):
        found = {}
        for who, pair in pairs.items():
            found[who] = kl_by_position(pair, own["before" if kind == "fixed" else who], knobs)
            yield from position_means(f"{kind}, {who}", *found[who])
        yield change(f"{kind}, change", n, found["before"], found["after"], knobs.samples)


# name: (probe, its settings). A new probe is a function above, an entry here, one in figures.PROBE_FIGURES.
PROBES = {"decay": (decay, PrefixKnobs), "cascade": (cascade, TrainedKnobs), "swap": (swap, SwapKnobs)}


def sampled(setup: Setup, model, texts: list[list[int]], horizon: int, stream: str) -> list[Rollout]:
    """Rollouts of `model` after each text, in batches; every `stream` has random numbers of its own."""
    knobs = setup.knobs
    key = f"{knobs.seed}/{stream}"
    batches = in_batches(model, setup.before, texts, horizon, knobs.temperature, key, knobs.sample_batch)
    return list(tqdm(batches, stream, -(-len(texts) // knobs.sample_batch), leave=False, unit="batch"))


def ids_of(found: list[Rollout]) -> list[list[int]]:
    """The ids of each response, the eos token included."""
    return [tokens[mask].tolist() for part in found for tokens, mask in zip(part.tokens, part.response_mask)]


def ended(tokens: list[int], pair: train.Pair) -> bool:
    return bool(tokens) and tokens[-1] in pair.eos_ids


def finish(setup: Setup, model, heads: dict[int, list[int]], k: int, stream: str) -> list[dict]:
    """Let `model` continue heads of k tokens, by number of the answer, up to T in all: graded records."""
    unfinished = {i: head for i, head in heads.items() if not ended(head, setup.before)}
    texts = [setup.prompts[i] + head for i, head in unfinished.items()]
    tails = ids_of(sampled(setup, model, texts, setup.knobs.max_new_tokens - k, stream))
    whole = {i: head + tail for (i, head), tail in zip(unfinished.items(), tails)}
    return graded(setup, heads | whole)


def graded(setup: Setup, answers: dict[int, list[int]]) -> list[dict]:
    """Records as in scores.py."""
    texts = [setup.before.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.values()]
    verdicts = setup.grader.grade(texts, [setup.problems[i].answer for i in answers])
    records = []
    for (i, ids), text, verdict in zip(answers.items(), texts, verdicts):
        about = {"index": i // setup.knobs.samples, "response": text, "length": len(ids), "seconds": 0.0}
        records.append(about | {"finished": ended(ids, setup.before)} | verdict)
    return records


def loop_start(tokens: list[int], width: int = 12, times: int = 3) -> int:
    """The position at which a text starts to repeat itself; its length if it does not.

    That is where its next `width` tokens have occurred `times` times before.
    """
    counts: Counter = Counter()
    for end in range(width, len(tokens) + 1):
        stretch = tuple(tokens[end - width : end])
        if counts[stretch] == times:
            return end - width
        counts[stretch] += 1
    return len(tokens)


def kl_by_position(pair: train.Pair, found: list[Rollout], knobs) -> tuple[Tensor, Tensor]:
    """Reverse KL of every token but those of loops, else 0, and whether there is one: (rows, T) each."""
    how = {"temperature": knobs.temperature, "micro_batch": knobs.micro_batch}
    tokens = scored(train.score, pair, found, **how)
    answers = ids_of(found)
    kl = torch.zeros(len(answers), knobs.max_new_tokens, dtype=torch.double)
    present = torch.zeros_like(kl, dtype=torch.bool)
    place = tokens["row"].cpu(), tokens["position"].cpu()
    kl[place] = tokens["reverse_kl"].cpu().double()
    present[place] = True
    for row, answer in enumerate(answers):
        present[row, loop_start(answer) :] = False
    return kl * present, present


def position_means(curve: str, kl: Tensor, present: Tensor) -> Iterator[dict]:
    """A point for each position that two rows or more have: mean +- one standard error; (rows, T) each."""
    count = present.sum(0)  # (T,)
    mean = kl.sum(0) / count
    se = (((kl - mean) ** 2 * present).sum(0) / (count - 1) / count).sqrt()
    for at in (count > 1).nonzero()[:, 0].tolist():
        yield point(curve, at, mean[at], [mean[at] - se[at], mean[at] + se[at]], count[at])


def bootstrap(statistic: Callable[[Tensor], Tensor], units: int, draws: int = 1000) -> Tensor:
    """95 % percentile interval of `statistic`, which gets the numbers of units drawn with replacement: (2,).

    Draws without any of the tokens in question give NaN, and do not count.
    """
    rng = torch.Generator().manual_seed(0)
    values = [statistic(torch.randint(units, (units,), generator=rng)) for _ in range(draws)]
    return torch.stack(values).double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.double))


def change(curve: str, n: int, before: tuple, after: tuple, samples: int) -> dict:
    """The relative change of the reverse KL per token from position n on, from two `kl_by_position`."""
    sums = [x[:, n:].sum(1).view(-1, samples).sum(1) for x in (*before, *after)]  # of each problem
    if not sums[1].sum() or not sums[3].sum():
        raise BadInput(f"no answer is longer than the {n} trained tokens: lower --horizon")

    def statistic(drawn: Tensor) -> Tensor:
        kl, tokens, kl_after, tokens_after = (x[drawn].sum() for x in sums)
        return kl_after / tokens_after / (kl / tokens) - 1

    units = len(sums[0])
    return point(curve, n, statistic(torch.arange(units)), bootstrap(statistic, units), units)


def mean_of_tokens(curve: str, at: str, values: Tensor, problem: Tensor, problems: int) -> dict:
    """The mean over tokens, with an interval over problems: (N,) values, (N,) the problem of each."""
    values = values.double()
    zero = torch.zeros(problems, dtype=torch.double)
    total = zero.index_add(0, problem, values)
    count = zero.index_add(0, problem, torch.ones_like(values))
    interval = bootstrap(lambda drawn: total[drawn].sum() / count[drawn].sum(), problems)
    return point(curve, at, values.mean(), interval, len(values))


def accuracy(curve: str, at: int, records: list[dict]) -> dict:
    found = scores.score_answers(records)
    return point(curve, at, found["accuracy"], found["interval"], found["n"])


def gain(curve: str, at: int, first: list[dict], second: list[dict]) -> dict:
    """second - first on the same problems."""
    found = scores.difference(first, second)
    return point(curve, at, found["difference"], found["interval"], len(scores.by_problem(first)))


def point(curve: str, at: int | str, value, interval, n) -> dict:
    """A row of a probe's CSV: a value and its 95 % interval, in curves by position +- one standard error.

    n is the number of problems, in means over tokens that of tokens, in curves by position that of rollouts.
    """
    low, high = map(float, interval)
    return {"curve": curve, "at": at, "value": float(value), "low": low, "high": high, "n": int(n)}


def run_probe(name: str, argv: list[str]) -> str:
    """Write the rows of a probe, and draw them; returns the reading. Raises BadInput, Stopped."""
    probe, knobs_class = PROBES[name]
    knobs = complete(knobs_class, parse(knobs_class, __doc__, argv))
    path = Path(knobs.out or RESULTS / f"probe_{name}.csv")
    settings = knobs.settings(name)
    if path.suffix != ".csv":
        raise BadInput(f"--out {path} is not a .csv file: name one, the figure is written next to it")
    run_folder.prepare_file(path, "--out")
    check_settings(path, run_folder.read_csv(path) if path.exists() else [], settings)
    settings |= {"hardware": run_folder.environment(models.find_device(knobs.device))["hardware"]}
    try:
        with Grader(extract, boxed) as grader:
            rows = [row | settings for row in probe(load(knobs, grader))]
        if not rows:
            raise BadInput("all answers end within the shortest prefix: lower --prefixes")
        run_folder.write_csv(path, list(rows[0]), rows)
        return draw_probe(path)
    except OSError as error:
        raise Stopped(1, f"cannot write {path} ({error}): fix that, or name another --out") from error
    except (MemoryError, RuntimeError) as error:
        if not run_folder.is_out_of_memory(error):
            raise
        raise Stopped(1, "out of memory: lower --sample-batch, --micro-batch or --max-new-tokens") from error


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__)
    elif name in PROBES:
        print(run_probe(name, argv))
    elif name == "draw" and argv:
        print("\n".join(draw_probe(Path(path)) for path in argv))
    else:
        what = "draw needs a file" if name == "draw" else f"there is no probe {name!r}"
        raise BadInput(f"{what}: give one of {', '.join(PROBES)}, or draw and a CSV file that a probe wrote")


if __name__ == "__main__":
    run_main(main)
