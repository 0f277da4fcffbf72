"""The measurements behind the papers' claims, each with the control that the papers lack.

    python experiments/probe.py decay     the teacher continues what the student began, and what it began
    python experiments/probe.py cascade   reverse KL by position, before and after training on N tokens
    python experiments/probe.py swap      one model writes the first k tokens, another one finishes
    python experiments/probe.py submode   how the teacher ranks the student's choice where the two differ most
    python experiments/probe.py profile   where 45 % of the gap lies: ESR's rule of thumb for N
    python experiments/probe.py draw results/probe_decay.csv       the figure again, without a model

On the toy world by default, where a student is trained on the spot. On real models: --student --teacher
--data, and --trained RUN/student with --horizon for what came out of training. A probe prints its reading,
and writes results/probe_NAME.csv, a row a point, and a figure beside it. Intervals are of 95 %; problems are
what luck drew, however many answers each got. `python experiments/probe.py NAME --help` lists the knobs.
Shapes: N tokens, C of them in a chunk, T positions, V vocabulary.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from probe_figures import draw
from probe_setup import PrefixKnobs, ProfileKnobs, Setup, SwapKnobs, TrainedKnobs, check_results, load, settle

import models
import report
import scores
from cli import BadInput, Stopped, parse, run
from grading import Grader
from opd import reverse_kl
from profile_horizon import horizon_of_profile, in_batches, measure
from rollout import Rollout
from train import Knobs as TrainKnobs
from train import score


def decay(setup: Setup, knobs: PrefixKnobs) -> Iterator[dict]:
    """Off-policy teacher decay (ESR): the student writes k tokens, the teacher goes on, the whole is graded.

    Control: the teacher continues k tokens of its own. Without it nobody knows how much of a fall is due to
    the student's tokens. An answer counts where neither prefix has ended yet.
    """
    (which, texts), pair, ks = asked(setup, knobs), setup.before, [int(k) for k in knobs.prefixes.split()]
    heads = {"student's prefix": pair.student, "own prefix": pair.teacher}
    heads = {who: ids_of(sampled(setup, m, texts, max(ks), knobs, who)) for who, m in heads.items()}
    for k in ks:
        begun = {who: [tokens[:k] for tokens in heads[who]] for who in heads}
        going = [i for i in range(len(which)) if not any(ended(begun[who][i], pair) for who in begun)]
        still, records = [which[i] for i in going], {}
        if len(set(still)) < 2:
            return  # the figure says which k are missing
        for who in begun:
            part = [begun[who][i] for i in going]
            records[who] = finish(setup, pair.teacher, still, part, k, knobs, f"{who}, k = {k}")
            yield accuracy(who, k, records[who])
        yield gain("difference", k, records["own prefix"], records["student's prefix"])


def swap(setup: Setup, knobs: SwapKnobs) -> Iterator[dict]:
    """Prefix swap (ESR): of the base and the trained student one writes k tokens, the other one finishes.

    If training changed nothing but how answers begin, the trained beginning alone brings all of the gain, and
    the trained end, after a beginning by the base, none. Answers that end within k tokens stay as they are.
    """
    (which, texts), length = asked(setup, knobs), knobs.max_new_tokens
    writers = {"base": setup.before.student, "trained": setup.after.student}
    heads = {who: ids_of(sampled(setup, m, texts, length, knobs, who)) for who, m in writers.items()}
    for who in writers:
        yield accuracy(f"{who} alone", length, graded(setup, which, heads[who]))
    for k in map(int, knobs.prefixes.split()):
        records = {}
        for first, then in (("trained", "base"), ("base", "trained")):
            begun, name = [tokens[:k] for tokens in heads[first]], f"{first}, then {then}"
            records[name] = finish(setup, writers[then], which, begun, k, knobs, f"{name}, k = {k}")
            yield accuracy(name, k, records[name])
        gap = gain("difference", k, records["base, then trained"], records["trained, then base"])
        yield gap
        if k == knobs.window():
            yield gap | {"curve": "at N"}


def cascade(setup: Setup, knobs: TrainedKnobs) -> Iterator[dict]:
    """Cascading alignment (ESR): training on the first N tokens lowers the gap beyond N too.

    Exact reverse KL, of the student before and after, on the same fixed rollouts of the base student, and on
    each model's own. Caution: on the fixed ones, what lies beyond N follows a beginning by the base student,
    which the trained one may write no longer; on own ones, the two are compared on different texts.
    """
    (_, texts), length, n, found = asked(setup, knobs), knobs.max_new_tokens, knobs.window(), {}
    if n >= length:
        raise BadInput(f"training saw all {length} tokens, none is beyond: lower --horizon")
    pairs = {"before": setup.before, "after": setup.after}
    own = {who: sampled(setup, pair.student, texts, length, knobs, who) for who, pair in pairs.items()}
    for kind, who in (("fixed", "before"), ("fixed", "after"), ("own", "before"), ("own", "after")):
        tokens = scored(pairs[who], own["before" if kind == "fixed" else who], knobs)
        kl, there = found[kind, who] = by_place(tokens, len(texts), length)
        count = there.sum(0)  # (T,)
        mean = kl.sum(0) / count
        se = (((kl - mean) ** 2 * there).sum(0) / (count - 1) / count).sqrt()
        for at in (count > 1).nonzero()[:, 0].tolist():  # one row has no standard error
            yield point(f"{kind}, {who}", at, mean[at], [mean[at] - se[at], mean[at] + se[at]], count[at])
        if who == "after":
            yield change(f"{kind}, change", n, found[kind, "before"], found[kind, "after"], knobs.samples)


def submode(setup: Setup, knobs: TrainedKnobs) -> Iterator[dict]:
    """Sub-mode commitment (ESR): how the teacher ranks the student's choice where the two differ most.

    Of the tenth of the tokens with the highest reverse KL, on each model's own rollouts. Controls: the
    student before training, all tokens, and the gap in nats. Intervals hold the choice of tokens fixed.
    """
    _, texts = asked(setup, knobs)
    for who, pair in (("before", setup.before), ("after", setup.after)):
        own = sampled(setup, pair.student, texts, knobs.max_new_tokens, knobs, who)
        tokens = scored(pair, own, knobs)
        kl, rank, problem = tokens["reverse_kl"], tokens["rank"], tokens["row"] // knobs.samples
        highest = kl.argsort(descending=True)[: -(-len(kl) // 10)]
        seen = {"nats": kl, "outside": rank > 5, "2-5": (rank > 1) & (rank <= 5), "1": rank == 1}
        for name, some in (("highest tenth", highest), ("all tokens", torch.arange(len(kl)))):
            for at, values in seen.items():
                yield mean_of_tokens(f"{who}, {name}", at, values[some], problem[some], len(setup.problems))


def profile(setup: Setup, knobs: ProfileKnobs) -> Iterator[dict]:
    """The share of all reverse KL that the first tokens hold, before training; ESR reads N off at 45 %.

    The plain sum over all tokens of all rollouts, see profile_horizon.py. Here rollouts are what luck drew.
    """
    names, rows = ("max_new_tokens", "temperature", "seed", "micro_batch"), len(setup.prompts) * knobs.samples
    how = TrainKnobs(**{name: getattr(knobs, name) for name in names})
    stats = measure(score, setup.before, setup.prompts, how, rows, knobs.sample_batch)
    kl, there = by_place(stats, rows, int(stats["position"].max()) + 1)  # (rollouts, T)
    every, places = torch.arange(rows), torch.arange(kl.shape[1])

    def horizon(drawn: Tensor) -> int:
        return horizon_of_profile(kl[drawn].sum(0), places, knobs.share)

    def cumulative(drawn: Tensor) -> Tensor:
        total = kl[drawn].sum(0).cumsum(0)
        return total / total[-1]

    n = horizon(every)
    low, high = resampled(cumulative, rows)
    for i, value in enumerate(cumulative(every)):
        yield point("cumulative", i + 1, value, [low[i], high[i]], there[:, i].sum())
    yield point("horizon", knobs.share, n, resampled(horizon, rows), rows)


# name: (probe, its knobs). A new probe is one function above, an entry here, one in probe_figures.FIGURES.
PROBES = {"decay": (decay, PrefixKnobs), "cascade": (cascade, TrainedKnobs), "swap": (swap, SwapKnobs)}
PROBES |= {"submode": (submode, TrainedKnobs), "profile": (profile, ProfileKnobs)}


def asked(setup: Setup, knobs) -> tuple[list[int], list[list[int]]]:
    """The problem of each answer, by its number, those to one problem together; and the prompt."""
    which = [i for i in range(len(setup.problems)) for _ in range(knobs.samples)]
    return which, [setup.prompts[i] for i in which]


def sampled(setup: Setup, model, texts: list[list[int]], horizon: int, knobs, stream: str) -> list[Rollout]:
    """Rollouts of `model` after each text, in batches; every `stream` has random numbers of its own."""
    seed = random.Random(f"{knobs.seed}/{stream}").getrandbits(48)
    found = in_batches(model, setup.before, texts, horizon, knobs.temperature, seed, knobs.sample_batch)
    return list(tqdm(found, stream, -(-len(texts) // knobs.sample_batch), leave=False, unit="batch"))


def ids_of(found: list[Rollout]) -> list[list[int]]:
    """What was written after each text, the end token included."""
    return [tokens[mask].tolist() for ro in found for tokens, mask in zip(ro.tokens, ro.response_mask)]


def ended(tokens: list[int], pair: models.Pair) -> bool:
    return bool(tokens) and tokens[-1] in pair.ends


def finish(setup: Setup, model, which: list[int], heads: list[list[int]], k: int, knobs, stream: str) -> list:
    """Let `model` go on where heads of k tokens stop, up to T in all, and grade: records of scores.py."""
    whole = list(heads)  # a head that has ended stays
    going = [i for i, head in enumerate(heads) if not ended(head, setup.before)]
    texts = [setup.prompts[which[i]] + heads[i] for i in going]
    tails = ids_of(sampled(setup, model, texts, knobs.max_new_tokens - k, knobs, stream))
    for i, tail in zip(going, tails):
        whole[i] = heads[i] + tail
    return graded(setup, which, whole)


def graded(setup: Setup, which: list[int], answers: list[list[int]]) -> list[dict]:
    pair = setup.before
    texts = [pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    verdicts = setup.grader.grade(texts, [setup.problems[i].answer for i in which])
    found = zip(which, texts, map(len, answers), [ended(ids, pair) for ids in answers], verdicts)
    keys = "index", "response", "length", "finished"
    return [dict(zip(keys, values)) | verdict | {"seconds": 0.0} for *values, verdict in found]


def loop_start(tokens: list[int], width: int = 12, times: int = 3) -> int:
    """From which position on a text repeats itself: where its last `width` tokens stood `times` times before.

    The first `times` turns of the loop stay. Of a text that never loops, its length.
    """
    seen: Counter = Counter()
    for end in range(width, len(tokens) + 1):
        stretch = tuple(tokens[end - width : end])
        if seen[stretch] == times:
            return end - width
        seen[stretch] += 1
    return len(tokens)


def rank_of_choice(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """How the teacher ranks the student's likeliest token, 1 its own first choice: (C, V) twice -> (C,)."""
    theirs = teacher_logp.gather(-1, student_logp.argmax(-1, keepdim=True))  # (C, 1)
    return 1 + (teacher_logp > theirs).sum(-1)


@torch.no_grad()
def scored(pair: models.Pair, found: list[Rollout], knobs) -> dict[str, Tensor]:
    """Row, position, exact reverse KL and rank of choice of each token, (N,) each; loops are left out.

    `train.score` has no ranks, hence a loop of its own, with 256 tokens' logits at a time.
    """
    parts, done = [], 0
    sides = (pair.student, pair.student_head.cut()), (pair.teacher, pair.teacher_head.cut())
    for ro in found:
        mask = ro.response_mask.clone()  # nothing follows an end token as it is
        for row, start in enumerate(map(loop_start, ids_of([ro]))):
            mask[row, start:] = False
        for rows in models.micro_batches(ro, knobs.micro_batch):
            ids, predicts = models.sequences(ro, rows, mask)  # (b, L) both
            row, position = mask[rows].nonzero().T
            parts.append({"row": row.new_tensor(rows)[row] + done, "position": position})  # (N,) both
            hidden = [models.hidden_states(model, ids, predicts).split(256) for model, _ in sides]
            of_chunks = []
            for states in zip(*hidden):
                logp = [h.logp(h.logits(s), knobs.temperature) for (_, h), s in zip(sides, states)]  # (C, V)
                of_chunks.append((reverse_kl(*logp, None), rank_of_choice(*logp)))
            parts[-1]["reverse_kl"], parts[-1]["rank"] = map(torch.cat, zip(*of_chunks))
        done += len(ro.prompts)
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def by_place(tokens: dict[str, Tensor], rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Reverse KL of every token, 0 where there is none, and whether there is one: (rows, length) both."""
    kl, there = torch.zeros(rows, length, dtype=torch.double), torch.zeros(rows, length, dtype=torch.bool)
    place = tokens["row"].cpu(), tokens["position"].cpu()
    kl[place], there[place] = tokens["reverse_kl"].cpu().double(), True
    return kl, there


def resampled(statistic: Callable[[Tensor], Tensor | float], units: int, draws: int = 1000) -> list[Tensor]:
    """95 % percentile bootstrap: `statistic` gets the numbers of units drawn with replacement.

    Draws that hold none of the tokens in question, where it is NaN, do not count.
    """
    rng = torch.Generator().manual_seed(0)
    found = [torch.as_tensor(statistic(torch.randint(units, (units,), generator=rng))) for _ in range(draws)]
    found = torch.stack(found)
    known = ~found.reshape(draws, -1).isnan().any(1)
    found = (found[known] if known.any() else found).sort(0).values
    return [found[len(found) // 40], found[-1 - len(found) // 40]]


def change(curve: str, n: int, before: tuple, after: tuple, samples: int) -> dict:
    """By which share the reverse KL a token from position n on grew; (rows, T) tensors."""
    sums = [x[:, n:].sum(1).view(-1, samples).sum(1) for x in (*before, *after)]  # of each problem
    if not sums[1].sum() or not sums[3].sum():
        raise BadInput(f"no answer goes on beyond the {n} trained tokens: lower --horizon")

    def statistic(drawn: Tensor) -> Tensor:
        kl, tokens, kl_after, tokens_after = (x[drawn].sum() for x in sums)
        return kl_after / tokens_after / (kl / tokens) - 1

    units = len(sums[0])
    return point(curve, n, statistic(torch.arange(units)), resampled(statistic, units), units)


def mean_of_tokens(curve: str, at: str, values: Tensor, problem: Tensor, problems: int) -> dict:
    """Mean of (N,) values of tokens, and how far other problems could have moved it; problem: (N,)."""
    zero, values = torch.zeros(problems, dtype=torch.double), values.double()
    total, count = zero.index_add(0, problem, values), zero.index_add(0, problem, torch.ones_like(values))
    interval = resampled(lambda drawn: total[drawn].sum() / count[drawn].sum(), problems)
    return point(curve, at, values.mean(), interval, len(values))


def accuracy(curve: str, at: int, records: list[dict]) -> dict:
    found = scores.score(records)
    return point(curve, at, found["accuracy"], found["interval"], found["n"])


def gain(curve: str, at: int, first: list[dict], second: list[dict]) -> dict:
    """second - first on the same problems."""
    found = scores.difference(first, second)
    return point(curve, at, found["difference"], found["interval"], len(scores.by_problem(first)))


def point(curve: str, at: int | str, value, interval, n) -> dict:
    """A row of a probe's CSV: a value and its 95 % interval, along cascade's curves +- one standard error.

    n: problems, in submode tokens, in profile and along cascade's curves rollouts.
    """
    low, high = map(float, interval)
    return {"curve": curve, "at": at, "value": float(value), "low": low, "high": high, "n": int(n)}


def measure_and_draw(name: str, argv: list[str]) -> str:
    """Rows are written as they come, so that what a stopped probe has measured can be drawn."""
    probe, knobs_class = PROBES[name]
    knobs = settle(knobs_class, parse(knobs_class, __doc__, argv))
    path, settings = Path(knobs.out or ROOT / "results" / f"probe_{name}.csv"), knobs.settings(name)
    check_results(path, settings)
    hardware = {"hardware": report.environment(models.find_device(knobs.device))["hardware"]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Grader() as grader:
            for number, row in enumerate(probe(load(knobs, grader), knobs)):
                if number == 0:
                    path.unlink(missing_ok=True)  # it has the same settings
                report.append_csv(path, [row | settings | hardware])
        return draw(path)
    except OSError as error:
        raise Stopped(1, f"cannot write {path} ({error}): mend that, or name another --out") from error
    except (MemoryError, RuntimeError) as error:
        if not report.is_out_of_memory(error):
            raise
        raise Stopped(1, "out of memory: lower --sample-batch, --micro-batch or --max-new-tokens") from error


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__)
    elif name in PROBES:
        print(measure_and_draw(name, argv))
    elif name != "draw" or not argv:
        what = "draw what" if name == "draw" else f"there is no probe {name!r}"
        raise BadInput(f"{what}: give one of {', '.join(PROBES)}, or draw and a CSV file that a probe wrote")
    else:
        print("\n".join(draw(Path(path)) for path in argv))


if __name__ == "__main__":
    run(main)
