"""Nothing lost: the state of a run in one file, and what signals, a full disk and a full card leave behind.

RUN/checkpoint-000040.safetensors holds the state after 40 steps: the student's trained weights in fp32,
AdamW's state and the random generators; data order and schedules follow from the step. A file has its name
only when it is whole; the last two are kept, so that a broken one can be passed over.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import report
from cli import BadInput, Stopped
from models import Pair

# Ctrl-C, a scheduler's request, a terminal that was closed
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def checksum(tensors: dict[str, Tensor]) -> int:
    """Changes with a byte that changes: what a disk gives back must be what was given to it."""
    flat = (
        t.detach().reshape(-1).view(torch.uint8 if t.itemsize == 1 else torch.int32) for t in tensors.values()
    )
    return sum(int(numbers.sum(dtype=torch.int64)) for numbers in flat)


@dataclass
class State:
    """All that a run is made of besides its knobs."""

    folder: Path
    pair: Pair
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the sampling
    save_every: int
    step: int = 0  # steps that are done
    began: float = field(default_factory=time.perf_counter)
    bar: tqdm | None = None
    _at_start: dict[str, Tensor] = field(default_factory=dict)  # generators as this step found them

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left; saves between them, and after a signal ends the run by raising Stopped."""
        came: list[int] = []

        def note(number: int, frame) -> None:
            came.append(number)
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nthis step comes to its end and is saved; once more to leave at once\n")

        self.load(total)
        self.bar = tqdm(total=total, initial=self.step, mininterval=0.5)
        listened = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, note) for number in listened}
        try:
            while self.step < total:
                self._at_start = self.generators()
                yield self.step
                # What follows runs when the body of the loop is over: the step is done.
                self.step, self._at_start = self.step + 1, {}
                self.bar.update()
                if came or (self.save_every and (self.step % self.save_every == 0 or self.step == total)):
                    self.save()
                if came:
                    self.pair.save_student(self.folder / "student")
                    raise Stopped(128 + came[0], f"stopped after step {self.step - 1}: {self.remedy()}")
        finally:
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def remedy(self) -> str:
        return f"go on with python train.py --resume {self.folder}"

    def explain(self, error: Exception, shape: str) -> None:
        """Raise Stopped, one line, for an error that is no bug: memory or disk; return for any other."""
        if isinstance(error, (OSError, SafetensorError)):
            raise Stopped(1, f"cannot write the run ({error}): mend that, then {self.remedy()}") from error
        if report.is_out_of_memory(error):
            self.optimizer.zero_grad()
            # Before the first update there is nothing to save; once a step has updated, its start is gone.
            updates = max((int(state.get("step", 0)) for state in self.optimizer.state.values()), default=0)
            if self._at_start and 0 < self.step == updates:
                self.save(self._at_start)
            what = f"out of memory at step {self.step}, {shape}: lower --micro-batch or --eval-batch"
            remedy = f"{self.remedy()}; or start anew with a lower --horizon or --batch-size"
            raise Stopped(1, f"{what} and {remedy}") from error

    def generators(self) -> dict[str, Tensor]:
        found = {"rng/sampling": self.generator.get_state(), "rng/torch": torch.get_rng_state()}
        if self.generator.device.type == "cuda":
            found["rng/cuda"] = torch.cuda.get_rng_state(self.generator.device)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights and AdamW's state of each, by name: the tensors themselves, not copies."""
        found = {}
        for name, weight in self.pair.masters.items():
            found[f"weight/{name}"] = weight.detach()
            found |= {f"{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    def save(self, generators: dict[str, Tensor] | None = None) -> None:
        """Write the state after `self.step` steps; it gets its name when it is whole."""
        path = self.folder / f"checkpoint-{self.step:06d}.safetensors"
        tensors = self.tensors() | (generators or self.generators())
        facts = {
            "step": self.step,
            "seconds": time.perf_counter() - self.began,
            "checksum": checksum(tensors),
        }
        part = path.with_suffix(".part")
        try:
            save_file(tensors, part, {"state": json.dumps(facts)})
            report.sync(self.folder / "metrics.csv")  # its rows up to this step are on the disk first
            report.settle(part, path)
        finally:
            part.unlink(missing_ok=True)  # of a disk that was full
        for old in sorted(self.folder.glob("checkpoint-*.safetensors"))[:-2]:
            old.unlink()

    def load(self, total: int) -> None:
        """Take up the newest whole checkpoint, if there is one. Raises BadInput if all are broken."""
        paths = sorted(self.folder.glob("checkpoint-*.safetensors"), reverse=True)
        for path in paths:
            try:
                self.take(path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                print(f"{path} is broken ({error}): taking the one before", file=sys.stderr, flush=True)
                continue
            report.forget(self.folder, self.step, total)
            return
        if paths:
            raise BadInput(f"no checkpoint in {self.folder} is whole: start a new run")
        report.forget(self.folder, 0, total)

    def take(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["state"])
            names = list(file.keys())
            if sum(checksum({name: file.get_tensor(name)}) for name in names) != facts["checksum"]:
                raise ValueError("its checksum differs")
            for name, weight in self.pair.masters.items():
                weight.data.copy_(file.get_tensor(f"weight/{name}"))
                keys = [n.split("/", 1)[0] for n in names if n.split("/", 1)[1] == name]
                state = {key: file.get_tensor(f"{key}/{name}") for key in keys if key != "weight"}
                self.optimizer.state[weight] = {k: v.to(weight.device) for k, v in state.items()}
            self.pair.publish()
            self.generator.set_state(file.get_tensor("rng/sampling"))
            torch.set_rng_state(file.get_tensor("rng/torch"))
            if "rng/cuda" in names:
                torch.cuda.set_rng_state(file.get_tensor("rng/cuda"), self.generator.device)
        self.step, self.began = facts["step"], time.perf_counter() - facts["seconds"]
