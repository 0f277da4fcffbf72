"""The measurements behind the papers' claims, each with the control that the papers lack.

    python experiments/probe.py decay     the teacher continues the student's beginnings, and its own
    python experiments/probe.py cascade   reverse KL beyond N tokens, before and after training on N tokens
    python experiments/probe.py swap      one model writes the first k tokens, another one the rest

The default is the toy world; for real models give --student, --teacher and --data. Cascade and swap also need
a student after training, and the N tokens of an answer that it was trained on:

    python train.py --preset toy --schedule esr --horizon 20 --out runs/esr20
    python experiments/probe.py swap --trained runs/esr20/student --horizon 20

A probe prints its reading, the result in a sentence, and writes a row per point to a new CSV file. Intervals
are 95 % over problems, however many answers each has. Shapes: N tokens.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import root  # noqa: F401  puts the project on the path
import torch
from torch import Tensor
from tqdm import tqdm

import train
from eval_math import INSTRUCTION, boxed, extract
from extras.profile_horizon import in_batches, scored
from rollout import Rollout
from support import data, models, run_folder, scores, toy
from support.cli import BadInput, knob, parse, run_main
from support.prompts import render
from support.workers import Grader


@dataclass(frozen=True)
class Knobs:
    student: str = knob("", "hub name or folder, before training; default, also of the next two: the toy's")
    teacher: str = knob("", "hub name or folder; same tokenizer as the student's")
    data: str = knob("", "hub name[:config], folder or file: its test split")
    trained: str = knob("", "the student after training, RUN/student: of cascade and swap")
    horizon: int = knob(0, "N, the tokens of an answer that it was trained on", least=0)
    prefixes: str = knob("0 0.05 0.1 0.2 0.4 0.6", "values of k: below 1 a fraction of T, otherwise tokens")
    problems: int = knob(100, "a random subset drawn by the seed", least=2)
    samples: int = knob(4, "answers to each problem", least=1)
    instruction: str = knob(INSTRUCTION, "text after each problem; the toy: none")
    max_new_tokens: int = knob(1024, "T, the full response length; the toy: 128", least=2)
    sample_batch: int = knob(100, "answers sampled together", least=1)
    micro_batch: int = knob(8192, "tokens scored together", least=1)
    seed: int = knob(0, "of problems and sampling", least=0, most=2**32)
    dtype: str = knob("", "default: the faster one here", choices=("bfloat16", "float32"))
    out: str = knob("", "CSV file, which must not exist; default: runs/probe_NAME.csv")


class Setup(NamedTuple):
    """A problem and its prompt stand here once for each of its answers, which are neighbours."""

    before: train.Pair
    after: train.Pair | None  # the same teacher, the student after training
    problems: list[data.Problem]
    prompts: list[list[int]]
    grader: Grader | None
    knobs: Knobs


def complete(name: str, given: dict) -> Knobs:
    """The given settings over the toy's, or over the defaults if models are given. Raises BadInput."""
    named = given.keys() & {"student", "teacher", "data"}
    if 0 < len(named) < 3:
        raise BadInput("--student, --teacher and --data go together: give all three, or none for the toy")
    preset = {} if named else toy.preset("opening")
    known = {field.name for field in fields(Knobs)}
    knobs = Knobs(**({key: value for key, value in preset.items() if key in known} | given))
    prefix_lengths(knobs)  # raises BadInput before minutes of loading
    if name != "decay" and not (knobs.trained and 0 < knobs.horizon < knobs.max_new_tokens):
        limit = f"from 1 to below --max-new-tokens {knobs.max_new_tokens}"
        raise BadInput(f"{name} needs --trained RUN/student, and its --horizon {limit}: give both")
    return replace(knobs, dtype=models.dtype_name(knobs.dtype, models.find_device("")))


def prefix_lengths(knobs: Knobs) -> list[int]:
    """--prefixes in tokens, in increasing order. Raises BadInput."""
    length = knobs.max_new_tokens
    try:
        numbers = [float(k) for k in knobs.prefixes.split()]
        lengths = sorted({int(k) if k >= 1 else round(k * length) for k in numbers})
    except (ValueError, OverflowError) as error:
        raise BadInput(f"--prefixes {knobs.prefixes!r} ({error}): give some such as '0 0.1 100'") from error
    if not lengths or lengths[0] < 0 or not 0 < lengths[-1] < length:
        limit = f"below --max-new-tokens {length}, one of them above 0"
        raise BadInput(f"--prefixes {knobs.prefixes!r} are {lengths} tokens: give some {limit}")
    return lengths


def load(name: str, knobs: Knobs, grader: Grader) -> Setup:
    """Models, problems and prompts. Raises BadInput."""
    if knobs.data == toy.preset("opening")["data"]:
        toy.build("opening")
    settings = train.Knobs(
        student=knobs.student, teacher=knobs.teacher, checkpointing=False, dtype=knobs.dtype
    )
    pair = train.load_pair(settings, models.find_device(""))
    after = None
    if name != "decay":
        models.load_tokenizers(knobs.trained, knobs.teacher)  # raises BadInput if they differ
        student = models.load_model(knobs.trained, getattr(torch, knobs.dtype), pair.student.device)
        head = models.OutputHead.of(student, pair.vocab_size)
        after = replace(pair, student=student, student_head=head, masters={})
    return set_up(pair, after, grader, knobs)


def set_up(pair: train.Pair, after: train.Pair | None, grader: Grader, knobs: Knobs) -> Setup:
    """Read the problems for these models, and render their prompts. Raises BadInput."""
    problems = data.subset(data.read_problems(knobs.data, "test"), knobs.problems, knobs.seed)
    problems = [problem for problem in problems for _ in range(knobs.samples)]
    prompts = render(pair.tokenizer, problems, knobs.instruction)
    models.check_context([pair.student.config, pair.teacher.config], prompts, knobs.max_new_tokens)
    return Setup(pair, after, problems, prompts, grader, knobs)


# The probes.


def decay(setup: Setup) -> Iterator[dict]:
    """Off-policy teacher decay (ESR): the student writes k tokens, the teacher the rest; answers are graded.

    Control: the teacher continues k tokens of its own, which shows how much of a decline is due to the
    student's tokens. An answer counts if neither prefix has ended yet.
    """
    pair, knobs = setup.before, setup.knobs
    lengths = prefix_lengths(knobs)
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
    for k in sorted({*prefix_lengths(knobs), knobs.horizon}):
        records = {}
        for first, then in (("trained", "base"), ("base", "trained")):
            name = f"{first}, then {then}"
            part = {i: tokens[:k] for i, tokens in enumerate(heads[first])}
            records[name] = finish(setup, writers[then], part, k, f"{name}, k = {k}")
            yield accuracy(name, k, records[name])
        gap = gain("difference", k, records["base, then trained"], records["trained, then base"])
        yield gap
        if k == knobs.horizon:
            yield gap | {"curve": "at N"}


def cascade(setup: Setup) -> Iterator[dict]:
    """Cascading alignment (ESR): training on the first N tokens lowers the reverse KL beyond N too.

    Exact reverse KL of the student before and after, on the same fixed rollouts of the base student, and on
    each student's own. Caution: in the fixed ones the text beyond N follows a beginning by the base student,
    which the trained one may no longer write; on their own rollouts they are compared on different texts.
    """
    length = setup.knobs.max_new_tokens
    pairs = {"before": setup.before, "after": setup.after}
    own = {who: sampled(setup, pair.student, setup.prompts, length, who) for who, pair in pairs.items()}
    for kind in ("fixed", "own"):
        texts = own | {"after": own["before"]} if kind == "fixed" else own
        sums = [kl_beyond(pair, texts[who], setup.knobs) for who, pair in pairs.items()]
        yield change(f"{kind}, change", setup.knobs.horizon, *sums)


# A new probe is a function above, an entry here, and one in READINGS.
PROBES = {"decay": decay, "cascade": cascade, "swap": swap}
READINGS = {  # {curve} is its value and interval, {at} the place of the last row of the curve named first
    "decay": (
        "difference",
        "the teacher's accuracy is {student's prefix} when it continues {at} tokens by the student, "
        "and {own prefix} when it continues as many of its own: difference {difference}",
    ),
    "cascade": (
        "fixed, change",
        "beyond the {at} trained tokens the reverse KL per token changes by {fixed, change} on the "
        "same fixed rollouts, and by {own, change} on each student's own rollouts",
    ),
    "swap": (
        "at N",
        "accuracy is {trained, then base} if the trained student writes the first {at} tokens and "
        "the base student the rest, and {base, then trained} the other way round: difference {at N}; the "
        "trained student alone {trained alone}, the base student alone {base alone}",
    ),
}
SIGNED = ("difference", "at N", "fixed, change", "own, change")  # in readings these have a sign


def reading(rows: list[dict]) -> str:
    """What the probe found, in a sentence, 95 % intervals in brackets."""
    last, text = READINGS[rows[0]["probe"]]
    at = [row["at"] for row in rows if row["curve"] == last][-1]
    shown = {"at": at}
    for row in rows:  # of several points of a curve, the one at the same place
        curve = row["curve"]
        if curve not in shown or row["at"] == at:
            form = "+.1%" if curve in SIGNED else ".1%"
            value, low, high = (format(float(row[name]), form) for name in ("value", "low", "high"))
            shown[curve] = f"{value} [{low} to {high}]"
    return text.format_map(shown)


def sampled(setup: Setup, model, texts: list[list[int]], horizon: int, stream: str) -> list[Rollout]:
    """Rollouts of `model` after each text, in batches; every `stream` has random numbers of its own."""
    size = setup.knobs.sample_batch
    batches = in_batches(model, setup.before, texts, horizon, 1.0, f"{setup.knobs.seed}/{stream}", size)
    return list(tqdm(batches, stream, -(-len(texts) // size), leave=False, unit="batch"))


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


def kl_beyond(pair: train.Pair, parts: list[Rollout], knobs: Knobs) -> tuple[Tensor, Tensor]:
    """Each problem's reverse KL of the tokens beyond N, without those of loops, and their number."""
    tokens = scored(train.score, pair, parts, micro_batch=knobs.micro_batch)
    row, position = tokens["row"].cpu(), tokens["position"].cpu()
    starts = torch.tensor([loop_start(answer) for answer in ids_of(parts)])  # of loops
    kept = (position >= knobs.horizon) & (position < starts[row])
    if not kept.any():
        raise BadInput(f"no answer is longer than the {knobs.horizon} trained tokens: lower --horizon")
    problems = len(starts) // knobs.samples
    return sums_by_problem(tokens["reverse_kl"].cpu()[kept], row[kept] // knobs.samples, problems)


def sums_by_problem(values: Tensor, problem: Tensor, problems: int) -> tuple[Tensor, Tensor]:
    """The sum over tokens and their number: (N,) values, (N,) the problem of each -> two of (problems,)."""
    values = values.double()
    zero = torch.zeros(problems, dtype=torch.double)
    return zero.index_add(0, problem, values), zero.index_add(0, problem, torch.ones_like(values))


def bootstrap(statistic: Callable[[Tensor], Tensor], units: int, draws: int = 1000) -> Tensor:
    """95 % percentile interval of `statistic`, which gets the numbers of units drawn with replacement: (2,).

    Draws without any of the tokens in question give NaN, and do not count.
    """
    rng = torch.Generator().manual_seed(0)
    values = [statistic(torch.randint(units, (units,), generator=rng)) for _ in range(draws)]
    return torch.stack(values).double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.double))


def change(curve: str, n: int, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict:
    """The relative change of a mean over tokens, from two `sums_by_problem`."""

    def statistic(drawn: Tensor) -> Tensor:
        kl, tokens, kl_after, tokens_after = (x[drawn].sum() for x in (*before, *after))
        return kl_after / tokens_after / (kl / tokens) - 1

    units = len(before[0])
    return point(curve, n, statistic(torch.arange(units)), bootstrap(statistic, units), units)


def ratio(curve: str, at: int | str, total: Tensor, count: Tensor) -> dict:
    """A sum over problems by another one, such as the mean over all their tokens: (problems,) each."""
    interval = bootstrap(lambda drawn: total[drawn].sum() / count[drawn].sum(), len(total))
    return point(curve, at, total.sum() / count.sum(), interval, count.sum())


def accuracy(curve: str, at: int, records: list[dict]) -> dict:
    found = scores.score_answers(records)
    return point(curve, at, found["accuracy"], found["interval"], found["n"])


def gain(curve: str, at: int, first: list[dict], second: list[dict]) -> dict:
    """second - first on the same problems."""
    found = scores.difference(first, second)
    return point(curve, at, found["difference"], found["interval"], len(scores.by_problem(first)))


def point(curve: str, at: int | str, value, interval, n) -> dict:
    """A row of a CSV: a value and its 95 % interval; n is the number of problems, of means that of tokens."""
    low, high = map(float, interval)
    return {"curve": curve, "at": at, "value": float(value), "low": low, "high": high, "n": int(n)}


def run_probe(name: str, argv: list[str]) -> str:
    """Write the rows of a probe to a new file; returns the reading. Raises BadInput."""
    knobs = complete(name, parse(Knobs, __doc__, argv))
    path = Path(knobs.out or f"runs/probe_{name}.csv")
    if path.exists():
        raise BadInput(f"{path} exists already: remove it, or name another --out")
    run_folder.check_creatable(path, "--out")
    settings = {"probe": name} | asdict(knobs)
    with Grader(extract, boxed) as grader:
        rows = [row | settings for row in PROBES[name](load(name, knobs, grader))]
    if not rows:
        raise BadInput("all answers end within the shortest prefix: lower --prefixes")
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_csv(path, list(rows[0]), rows)
    return f"{name}: {reading(rows)}"


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__)
    elif name in PROBES:
        print(run_probe(name, argv))
    else:
        raise BadInput(f"there is no probe {name!r}: give one of {', '.join(PROBES)}")


if __name__ == "__main__":
    run_main(main)
