"""`torchrun --nproc-per-node N train.py ...`: N processes divide the answers of every step.

Rank 0 runs train.py as a single process would: it alone reads settings and data, prints, writes, saves, and
steps the optimizer. The other ranks load the same models and do what rank 0 asks. In each step a rank samples
some of the answers and then scores some of all, with the number of tokens of the whole step as the
normalizer. The gradients are summed in fp32 into rank 0's masters before they are clipped, and the weights
are broadcast before the next answers are sampled.

The noise of an answer depends on seed, step and row, and not on N: in fp32 any N samples the same tokens, and
trains the same student up to the order of sums. In bf16 logits depend on the other rows of a batch: the
distribution is the same, but the tokens differ.

Messages are pickled by torch.distributed and go over gloo, which notices at once that a process has ended.
Weights and gradients on GPUs go over NCCL.
"""

import atexit
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollout import Rollout, micro_batches
from support import models
from support.cli import BadInput, ProcessEnded, Stopped, flag_of
from support.run import SIGNALS, CheckpointedRun
from support.run_folder import is_out_of_memory

LONG = timedelta(days=30)  # rank 0 may evaluate or save for hours between two messages


class Messages:
    """Objects sent between rank 0 and the others. Raises ProcessEnded if the other process has ended."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=LONG)
        self.waiting = False  # whether another rank may be sending a result that will not be received

    def send(self, rank: int, message: Any) -> None:
        """Raises BadInput if a function in the message cannot be pickled, such as a divergence by lambda."""
        try:
            with connected(f"process {rank}"):
                dist.send_object_list([message], rank, self.group)
        except (pickle.PicklingError, AttributeError) as error:
            what = f"a function cannot be sent to the other processes ({models.first_line(error)})"
            raise BadInput(f"{what}: write a divergence with `def`, at the top of a module") from error

    def receive(self, rank: int) -> Any:
        message = [None]
        with connected(f"process {rank}"):
            dist.recv_object_list(message, rank, self.group)
        return message[0]

    def close(self) -> None:
        """Let the other ranks end; one that may be waiting for this rank notices that the connection ends."""
        if not self.waiting:
            for rank in range(1, dist.get_world_size()):
                with suppress(ProcessEnded):
                    self.send(rank, ("stop", (), {}))
        dist.destroy_process_group()


class Worker:
    """What every rank does, rank 0 included."""

    collective: tuple[str, ...] = ("prepare", "sum_gradients")  # here ranks wait for each other

    def __init__(self, load_pair: Callable, score: Callable, adamw: Callable):
        self.load_pair = load_pair  # train.load_pair
        self.score_rows = score  # train.score
        self.adamw = adamw  # train.adamw
        self.pair = None  # after `load`

    def load(self, knobs, device: torch.device) -> None:
        self.pair = self.load_pair(knobs, device)

    def prepare(self, model: str) -> None:
        """Before sampling, the student takes rank 0's trained weights, in the dtype of the matmuls."""
        if model == "teacher":
            return
        for name, weight in self.pair.student.named_parameters():
            if name in self.pair.masters:
                dist.broadcast(weight.detach(), 0)

    def sample(self, model: str, *arguments: Any, sampler: Callable, **options: Any) -> Rollout:
        return moved(sampler(getattr(self.pair, model), *arguments, **options), "cpu")

    def score(
        self, rollouts: Rollout, loss_mask: Tensor, training: bool, **options: Any
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and statistics of this rank's share."""
        device = self.pair.student.device
        with torch.set_grad_enabled(training):
            loss, statistics = self.score_rows(
                self.pair, moved(rollouts, device), loss_mask.to(device), **options
            )
        return loss, {name: values.cpu() for name, values in statistics.items()}

    def sum_gradients(self) -> None:
        """Add the fp32 gradients of all ranks into rank 0's masters."""
        for master in self.pair.masters.values():
            if master.grad is None:  # an expert that no token of this rank chose, for example
                master.grad = torch.zeros_like(master)
            dist.reduce(master.grad, 0)
            if dist.get_rank() > 0:
                master.grad = None


class Leader:
    """Rank 0's side: loads, samples and scores as `train` and `rollout` do, with the help of all ranks."""

    run = CheckpointedRun

    def __init__(self, worker: Worker, messages: Messages):
        self.worker = worker
        self.messages = messages
        self.size = dist.get_world_size()

    def start(self, knobs, sampler: Callable[..., Rollout]) -> "Leader":
        """The leader for these settings. Raises BadInput if they do not work with so many processes."""
        self.sampler = sampler
        rows = knobs.batch_size * knobs.rollouts_per_prompt
        if rows < self.size:
            what = f"a step of {rows} answers cannot be divided among {self.size} processes"
            raise BadInput(f"{what}: raise --batch-size, or lower --nproc-per-node")
        for name in ("teacher_device", "teacher_bits"):
            if value := getattr(knobs, name):
                what = f"{flag_of(name)} {value} works in a single process"
                raise BadInput(f"{what}: drop it, or start with python instead of torchrun")
        device = models.find_device(knobs.device)
        if device.index is not None or device.type not in ("cpu", "cuda"):
            what = f"--device {knobs.device} cannot be divided among {self.size} processes"
            raise BadInput(f"{what}: name cuda, which is one GPU for each, or cpu")
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if device.type == "cuda" and here > torch.cuda.device_count():
            what = f"{here} processes cannot share {torch.cuda.device_count()} GPUs"
            raise BadInput(f"{what}: lower --nproc-per-node, or add --device cpu")
        if not knobs.shard:
            return self
        others = {"--low-memory": knobs.low_memory, "--horizon auto": knobs.horizon == "auto"}
        others |= {"--sampler graphs": knobs.sampler == "graphs"}
        for other, given in others.items():
            if given:
                raise BadInput(f"--shard does not work with {other}: drop one of them")
        from extras.shard import ShardedLeader

        return ShardedLeader(self, knobs)

    def begin(self, method: str, *arguments: Any) -> None:
        """Let the other ranks call a method, whose result is not needed."""
        for rank in range(1, self.size):
            self.messages.send(rank, (method, arguments, None))

    def everywhere(self, method: str, shares: list[tuple], **options: Any) -> list[Any]:
        """Call a method of the first len(shares) workers, each with its arguments: the results, by rank.

        Raises the first error, when all have answered, or at once for a method of `collective`. A process
        that has ended is a ProcessEnded.
        """
        self.messages.waiting = True
        for rank, share in enumerate(shares[1:], 1):
            self.messages.send(rank, (method, share, options))
        results = [attempt(getattr(self.worker, method), *shares[0], **options)]
        if isinstance(results[0], Exception) and method in self.worker.collective:
            raise results[0]  # the others may be waiting for this rank forever
        results += [attempt(self.messages.receive, rank) for rank in range(1, len(shares))]
        self.messages.waiting = False
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def load_pair(self, knobs, device: torch.device):
        """As `train.load_pair`, in every rank. Raises Stopped if one ends."""
        try:
            self.everywhere("load", [(knobs, device)] * self.size)
        except ProcessEnded as error:
            raise Stopped(1, f"{error} while it loaded the models: start again") from error
        if self.worker.pair.teacher_tokenizer:
            print("the teacher has another tokenizer: process 0 alone scores the answers", flush=True)
        return self.worker.pair

    def rollout(
        self, model, prompts: list[list[int]], horizon: int, eos_ids: set[int], noise: Tensor, **options: Any
    ) -> Rollout:
        """As the sampler that was given to `start`, for the pair's student or teacher."""
        name = "teacher" if model is self.worker.pair.teacher else "student"
        self.everywhere("prepare", [(name,)] * self.size)
        size = min(self.size, len(prompts))
        shares = [(name, prompts[r::size], horizon, eos_ids, noise[r::size]) for r in range(size)]
        parts = self.everywhere("sample", shares, sampler=self.sampler, **options)
        return moved(interleaved(prompts, parts), model.device)

    def dealt(self, rollouts: Rollout) -> list[list[int]]:
        """The rows that each rank scores, dealt out from the longest to the shortest for similar shares."""
        order = [row for (row,) in micro_batches(rollouts, max_tokens=1)]  # the longest first
        return [order[r :: self.size] for r in range(min(self.size, len(order)))]

    def score(
        self, pair, rollouts: Rollout, loss_mask: Tensor | None = None, **options: Any
    ) -> tuple[float, dict[str, Tensor]]:
        """As `train.score`."""
        mask = rollouts.response_mask if loss_mask is None else loss_mask & rollouts.response_mask
        training = torch.is_grad_enabled()
        options |= {"training": training, "normalizer": int(mask.sum())}
        rows = self.dealt(rollouts)
        shares = [(moved(selected(rollouts, part), "cpu"), mask[part].cpu()) for part in rows]
        losses, statistics = zip(*self.everywhere("score", shares, **options))
        if training:
            self.everywhere("sum_gradients", [()] * self.size)
        for part, of_rank in zip(rows, statistics):
            of_rank["row"] = torch.tensor(part)[of_rank["row"]]  # of the step, not of the share
        device = rollouts.tokens.device
        return sum(losses), {n: torch.cat([part[n] for part in statistics]).to(device) for n in statistics[0]}

    def adamw(self, pair, knobs) -> torch.optim.Optimizer:
        return self.worker.adamw(pair, knobs)


def join(load_pair: Callable, score: Callable, adamw: Callable, functions: str | None = None) -> Leader:
    """Connect to the other processes that torchrun started. Returns on rank 0; the others work, and exit.

    Raises BadInput if this process was not started by torchrun, or if a script has given `functions` of its
    own, which are not sent to the other processes.
    """
    try:
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        dist.init_process_group()
        messages = Messages()
    except (KeyError, ValueError, RuntimeError) as error:
        what = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot meet ({error})"
        raise BadInput(f"{what}: start them with torchrun, or unset WORLD_SIZE") from error
    worker = Worker(load_pair, score, adamw)
    if rank > 0:
        work(worker, messages)
    atexit.register(messages.close)
    if functions:
        raise BadInput(f"the script's {functions} needs one process: start it without torchrun")
    return Leader(worker, messages)


def work(worker: Worker, messages: Messages) -> NoReturn:
    """Serve rank 0, silently, then exit. Signals reach all processes, and rank 0 handles them."""
    interrupts = []
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        serve(worker, messages)
    except ProcessEnded as error:
        if dist.get_rank() == 1 and not interrupts:  # one line is enough
            print(f"error: {error}: continue with --resume and the run folder", file=sys.stderr)
        raise SystemExit(1) from error
    except (MemoryError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    dist.destroy_process_group()
    raise SystemExit(0)


def serve(worker: Worker, messages: Messages) -> None:
    """Call the methods that rank 0 names, and send it their results, until it says stop."""
    while True:
        method, arguments, options = messages.receive(0)
        if method == "stop":
            return
        if method == "shard":
            from extras.shard import ShardedWorker

            worker = ShardedWorker(worker.load_pair, worker.score_rows, worker.adamw)
            continue
        result = portable(attempt(getattr(worker, method), *arguments, **(options or {})))
        if isinstance(result, Exception) and method in worker.collective:
            raise result  # other ranks may wait in the collective, which fails when this one ends
        if options is not None:
            messages.send(0, result)


@contextmanager
def connected(what: str) -> Iterator[None]:
    """Turn an error of gloo or NCCL into a ProcessEnded."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise ProcessEnded(f"{what} has ended, or cannot be reached any more") from error


def attempt(function: Callable, *arguments: Any, **options: Any) -> Any:
    """What the function returns, or the exception that it raises."""
    try:
        with connected("a process"):
            return function(*arguments, **options)
    except Exception as error:
        return error


def portable(result: Any) -> Any:
    """The result; an exception becomes one that can be pickled and that keeps its kind or its traceback."""
    if not isinstance(result, Exception) or isinstance(result, (BadInput, ProcessEnded)):
        return result
    where = f"process {dist.get_rank()}"
    if is_out_of_memory(result):
        return MemoryError(f"{where}: {models.first_line(result)}")
    return RuntimeError(f"{where} failed:\n{''.join(traceback.format_exception(result))}")


def moved(rollouts: Rollout, device: torch.device | str) -> Rollout:
    parts = (rollouts.tokens, rollouts.response_mask, rollouts.logp, rollouts.finished)
    return Rollout(rollouts.prompts, *(part.to(device) for part in parts))


def selected(rollouts: Rollout, rows: list[int]) -> Rollout:
    parts = (rollouts.tokens, rollouts.response_mask, rollouts.logp, rollouts.finished)
    return Rollout([rollouts.prompts[row] for row in rows], *(part[rows] for part in parts))


def interleaved(prompts: list[list[int]], parts: list[Rollout]) -> Rollout:
    """The rollouts of all prompts; part r of N has the rows r, r + N, r + 2N, ..."""
    rows = [(parts[i % len(parts)], i // len(parts)) for i in range(len(prompts))]
    tokens = pad_sequence([part.tokens[i] for part, i in rows], batch_first=True)
    response_mask = pad_sequence([part.response_mask[i] for part, i in rows], batch_first=True)
    logp = pad_sequence([part.logp[i] for part, i in rows], batch_first=True)
    finished = torch.stack([part.finished[i] for part, i in rows])
    return Rollout(prompts, tokens, response_mask, logp, finished)
