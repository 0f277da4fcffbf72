"""What surrounds the training loop: steps, timers and rows; on disk, checkpoints, resume, signals and faults.

RUN/checkpoint-000040.safetensors holds the state after 40 steps: the student's trained weights in fp32 and
AdamW's state. Data order, sampling noise and schedules follow from the step. A file gets its name only when
it is complete; the last two are kept, so that a damaged one can be skipped.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from support import models, report, run_folder
from support.cli import BadInput, ProcessEnded, Stopped

# Ctrl-C, a scheduler's request, a closed terminal
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Run:
    """The steps, timers and rows of a training loop; the rows are kept in memory, and nothing is written."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.timings: dict[str, float] = {}  # of the current step
        self.began = time.perf_counter()

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that remain."""
        yield from range(total)

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @contextmanager
    def timed(self, column: str) -> Iterator[None]:
        """Add the wall time of the block to a column of the step's row."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings[column] = self.timings.get(column, 0.0) + time.perf_counter() - started

    def log(self, rollouts, statistics: dict[str, Tensor], **columns: Any) -> dict[str, Any]:
        """Keep the step's row: the given columns, the timings, and the means of the token statistics.

        Raises ValueError if a column has two values.
        """
        given = {name: x.item() if isinstance(x, Tensor) else x for name, x in columns.items()}
        means = {name: x.float().mean().item() for name, x in statistics.items() if name not in report.PLACES}
        sampled = int(rollouts.response_mask.sum())
        counts = {"response_tokens": sampled, "response_length": sampled / len(rollouts.prompts)}
        counts |= {"truncated": 1 - rollouts.finished.float().mean().item()}
        row: dict[str, Any] = {}
        for part in (given, means, counts, self.timings, {"seconds": self.seconds()}):
            if twice := sorted(row.keys() & part.keys()):
                raise ValueError(f"two values for the column {', '.join(twice)} of metrics.csv: rename one")
            row |= part
        self.timings = {}
        self.rows.append(row)
        return row

    def non_finite(
        self, step: int, loss: float, grad_norm: float, rollouts, statistics: dict[str, Tensor]
    ) -> Stopped:
        """The error that ends the run, whose weights have not moved in this step."""
        return Stopped(1, f"step {step} has loss {loss} and gradient norm {grad_norm}: lower --lr")


def digest(facts: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the facts and of each tensor's name, dtype, shape and bytes, in the given order."""
    found = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class CheckpointedRun(Run):
    """A training run in a folder."""

    def __init__(
        self,
        folder: Path,
        pair,  # train.Pair
        optimizer: torch.optim.Optimizer,
        knobs,  # train.Knobs
    ):
        super().__init__(pair.student.device)
        self.folder = folder
        self.pair = pair
        self.optimizer = optimizer
        self.knobs = knobs
        self.run_id: str | None = None
        self.step = 0  # steps that are done
        self.updating = False  # whether the optimizer has begun to change the weights in the current step
        optimizer.register_step_pre_hook(self.note_update)
        self.track: Callable[[int, dict[str, Any]], None] = lambda step, row: None
        self.bar: tqdm | None = None
        self.handlers: dict[int, Any] = {}  # of signals, from before `steps`

    @contextmanager
    def open(self, horizon_at: Callable[[int], int], inputs: dict[str, str | None]) -> Iterator[None]:
        """Hold the folder's lock; turn errors of memory, disk and processes into a one-line Stopped.

        Writes config.json. Raises BadInput if the student cannot be saved, or if a resumed run had other
        inputs.
        """
        knobs = self.knobs
        with run_folder.exclusive(self.folder, fresh=not knobs.resume):
            if (self.folder / "summary.json").exists() and not self.checkpoints():
                what = f"{self.folder} has finished, and has no checkpoint to continue from"
                raise BadInput(f"{what}: start a new run")
            self.check_saving()
            run_folder.write_config(self.folder, asdict(knobs), self.device, inputs)
            try:
                yield
            except Exception as error:
                longest = max(map(horizon_at, range(knobs.steps)))
                rows = f"{knobs.batch_size} x {knobs.rollouts_per_prompt} rollouts"
                self.stop_on_fault(error, f"{rows} of at most {longest} tokens")
                raise
            finally:
                self.release_signals()

    def check_saving(self) -> None:
        """Save the student, read it back and remove it again. Raises BadInput if that fails.

        So a student that cannot be saved is refused before it is trained.
        """
        trial = self.folder / ".trial"
        shutil.rmtree(trial, ignore_errors=True)  # of a run that was killed here
        try:
            trial.mkdir()
            self.save_student(trial / "student")
            models.load_tokenizer(str(trial / "student"))
            models.load_model(str(trial / "student"), self.pair.student.dtype, torch.device("cpu"))
        except models.LOADING_ERRORS as error:
            if run_folder.is_out_of_memory(error):
                raise
            what = f"the student cannot be saved ({type(error).__name__}: {models.first_line(error)})"
            raise BadInput(f"{what}: make room, name another --student, or drop --low-memory") from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def steps(self, total: int) -> Iterator[int]:
        """The steps that remain. Saves between them, and after a signal ends the run by raising Stopped."""
        signals: list[int] = []

        def note(number: int, frame) -> None:
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):  # standard error may be closed
                os.write(2, b"\nfinishing and saving this step; repeat to stop at once\n")

        self.run_id = run_folder.run_id_of(self.folder)
        if self.knobs.resume:
            self.load(total)
        self.bar = tqdm(total=total, initial=self.step, mininterval=0.5)
        handled = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        self.handlers = {number: signal.signal(number, note) for number in handled}
        try:
            while self.step < total:
                yield self.step
                # Execution continues here when the body of the loop has finished: the step is done.
                self.step += 1
                self.updating = False
                self.bar.update()
                every = self.knobs.save_every
                if signals or (every and (self.step % every == 0 or self.step == total)):
                    self.save()
                if signals:
                    self.save_student(self.folder / "student")
                    raise Stopped(128 + signals[0], f"stopped after step {self.step - 1}: {self.remedy()}")
        finally:
            self.bar.close()
        self.release_signals()  # after an error `open` does so: until then a signal must not end the process

    def release_signals(self) -> None:
        """Restore the handlers from before `steps`, but for signals that `stop_on_fault` ignores."""
        for number, handler in self.handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def note_update(self, *given: Any) -> None:
        self.updating = True

    def remedy(self) -> str:
        return f"continue with python {sys.argv[0]} --resume {self.folder}"

    def log(self, rollouts, statistics: dict[str, Tensor], **columns: Any) -> dict[str, Any]:
        """Append the step's row to metrics.csv, and show an answer every --show-every steps."""
        row = super().log(rollouts, statistics, **columns)
        self.rows.clear()  # the file keeps them
        run_folder.append_csv(self.folder / "metrics.csv", [row])
        self.track(self.step, row)
        shown = {name: row[name] for name in ("horizon", "reverse_kl", "response_length")}
        self.bar.set_postfix(shown, refresh=False)
        if self.knobs.show_every and self.step % self.knobs.show_every == 0:
            report.show_rollout(self.folder, self.bar, self.step, self.pair.tokenizer, rollouts, statistics)
        return row

    def non_finite(
        self, step: int, loss: float, grad_norm: float, rollouts, statistics: dict[str, Tensor]
    ) -> Stopped:
        """As `Run.non_finite`; also writes the offending rows to non_finite.json."""
        path = self.folder / "non_finite.json"
        facts = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
        run_folder.write_json(path, facts | report.offending_rows(self.pair.tokenizer, rollouts, statistics))
        what = f"step {step} has loss {loss} and gradient norm {grad_norm}"
        return Stopped(1, f"{what}: start a new run with a lower --lr, or look for odd data in {path}")

    def save_student(self, folder: Path) -> None:
        self.pair.save_student(folder)

    def stop_on_fault(self, error: Exception, workload: str) -> None:
        """Raise Stopped with one line if memory, disk or another process is the cause; else return.

        After a BadInput, which has its own line (a sampler that fails, for example), the state is saved.
        """
        if isinstance(error, BadInput):
            self.save_last()
        if isinstance(error, ProcessEnded):  # torchrun will end this one as well
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self.save_last()
            raise Stopped(1, f"{error} at step {self.step}: {self.remedy()}") from error
        if isinstance(error, (OSError, SafetensorError)):
            raise Stopped(1, f"cannot write the run ({error}): fix that, then {self.remedy()}") from error
        if run_folder.is_out_of_memory(error):
            self.save_last()
            what = f"out of memory at step {self.step}, {workload}: lower --micro-batch or --eval-batch"
            remedy = f"{self.remedy()}; or start again with a lower --horizon or --batch-size"
            raise Stopped(1, f"{what} and {remedy}") from error

    def save_last(self) -> None:
        """Save the state after the last step, unless the update of the next step has begun to replace it."""
        self.optimizer.zero_grad()
        if self.step > 0 and not self.updating:  # before the first update there is nothing to save
            self.save()

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights and AdamW's state of each, by name: the tensors themselves, not copies."""
        found = {}
        for name, weight in self.pair.masters.items():
            found[f"weight/{name}"] = weight.detach()
            found |= {f"{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    def save(self) -> None:
        """Write the state after `self.step` steps; the file gets its name when it is complete."""
        path = self.folder / f"checkpoint-{self.step:06d}.safetensors"
        tensors = self.tensors()
        facts = {"step": self.step, "seconds": self.seconds(), "run_id": self.run_id}
        facts["optimizer"] = type(self.optimizer).__name__
        state = facts | {"digest": digest(facts, sorted(tensors.items()))}
        with run_folder.replaced(path) as part:
            save_file(tensors, part, {"state": json.dumps(state)})
            run_folder.sync(self.folder / "metrics.csv")  # its rows up to this step are on the disk first
        for old in self.checkpoints()[2:]:
            old.unlink()

    def checkpoints(self) -> list[Path]:
        """The checkpoint files of the folder, the newest first."""
        return sorted(self.folder.glob(f"checkpoint-{'[0-9]' * 6}.safetensors"), reverse=True)

    def load(self, total: int) -> None:
        """Restore the newest intact checkpoint, if there is one.

        Raises BadInput if all are damaged, or if one belongs to another run.
        """
        for path in self.checkpoints():
            try:
                self.read_checkpoint(path)
                break
            except BadInput:
                raise
            except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
                print(f"{path} is damaged ({error}): using the one before", file=sys.stderr, flush=True)
        else:
            if self.checkpoints():
                raise BadInput(f"no checkpoint in {self.folder} is intact: restore one, or start a new run")
            print(f"{self.folder} has no checkpoint: starting at step 0", flush=True)
        self.check_rows()
        run_folder.drop_rows_after(self.folder, self.step, total)

    def check_rows(self) -> None:
        """Raises BadInput unless metrics.csv has the rows of all steps that are done."""
        path = self.folder / "metrics.csv"
        rows = run_folder.read_csv(path) if path.is_file() else []
        if [row.get("step") for row in rows[: self.step]] != [str(step) for step in range(self.step)]:
            what = f"{path} lacks rows of the {self.step} steps that are done"
            raise BadInput(f"{what}: restore the file, or start a new run")

    def read_checkpoint(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["state"])
            names = sorted(file.keys())
            expected = facts.pop("digest", None)
            if expected != digest(facts, ((name, file.get_tensor(name)) for name in names)):
                raise ValueError("its hash differs")
            if facts.get("run_id") != self.run_id:
                raise BadInput(f"{path} is of another run: move it out of the folder")
            optimizer = facts.get("optimizer", "AdamW")
            if optimizer != type(self.optimizer).__name__:
                raise BadInput(f"{path} has the state of {optimizer}: continue with that optimizer")
            for name in self.pair.masters:
                keys = [n.split("/", 1)[0] for n in names if n.split("/", 1)[1] == name]
                self.restore(name, {key: file.get_tensor(f"{key}/{name}") for key in {*keys, "weight"}})
        self.pair.copy_masters_to_weights()
        self.step = facts["step"]
        self.began = time.perf_counter() - facts["seconds"]

    def restore(self, name: str, values: dict[str, Tensor]) -> None:
        """Set a trained weight and AdamW's state of it; `values` as in a checkpoint, by key."""
        master = self.pair.masters[name]
        master.data.copy_(values["weight"])
        state = {key: value.to(master.device) for key, value in values.items() if key != "weight"}
        self.optimizer.state[master] = state
