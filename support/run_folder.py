"""The run folder: its settings, its lock, and its files.

config.json     every setting, hashes of settings, data and models, library versions, git commit, hardware
metrics.csv     one row per step
positions.csv   at some steps, the token statistics by position in the response
rollouts.jsonl  at the same steps, one answer: its ids, and its text with the teacher's gap
eval_*.jsonl    every answer of an evaluation with its verdict: before, after, teacher, step_N
summary.json    scores before and after, the teacher's, and the change on the same problems
curve.png       drawn from metrics.csv
student/        an ordinary Hugging Face folder
"""

import csv
import dataclasses
import hashlib
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoConfig

from support import data, models, toy
from support.cli import BadInput, Stopped, flag_of

LOW_MEMORY = {"lr": 5e-5}  # ESR's learning rate for LoRA
FACTS = ("run_id", "inputs", "environment", "digests")  # of config.json, beside the settings
# The flags that --resume accepts. A run that grows has its learning rate and POPD's growth recomputed.
SAFE = (
    "steps",
    "save_every",
    "eval_every",
    "show_every",
    "micro_batch",
    "checkpointing",
    "eval_batch",
    "device",
    "teacher_device",
    "dry_run",
    "tracker",
    "shard",
)


def settings(knobs_class: type, given: dict[str, Any]) -> tuple[Any, Path]:
    """The settings of a new or resumed training run, and its folder. Raises BadInput.

    Given flags take precedence over the preset's, and these over the defaults. Without --preset the toy is
    chosen only if no model and no data are named: its settings would ruin a real model within a few steps.
    """
    if "resume" in given:
        knobs = resumed(knobs_class, given, SAFE)
        folder = Path(given["resume"])
    else:
        preset = preset_of(given, default="qwen" if torch.cuda.is_available() else "toy")
        print(f"preset {preset}", flush=True)
        of_preset = world_preset(preset, given.get("world", knobs_class.world))
        low_memory = LOW_MEMORY if given.get("low_memory") else {}
        knobs = knobs_class(**(low_memory | of_preset | given | {"preset": preset}))
        folder = new_folder(knobs.out, f"{preset}-{knobs.schedule}")
    if knobs.student == world_preset(knobs.preset, knobs.world).get("student"):
        # An operation of so small a model takes microseconds. After each one, several threads would wait for
        # the slowest: if another program uses a core, a step takes up to ten times as long.
        torch.set_num_threads(1)
    device = models.find_device(knobs.device)
    check_device_flags(knobs, device)
    dtype = models.dtype_name(knobs.dtype, device)
    return dataclasses.replace(knobs, dtype=dtype), folder


def evaluation_settings(knobs_class: type, given: dict[str, Any]) -> tuple[Any, Path]:
    """The settings of a new or resumed evaluation, and its folder. Raises BadInput."""
    knobs = resumed(knobs_class, given) if "resume" in given else knobs_class(**given)
    if not knobs.model or not knobs.benchmark + knobs.data:
        raise BadInput("nothing to evaluate: give a --model, and a --benchmark or --data")
    if len(knobs.model) > len(ascii_uppercase):
        raise BadInput(f"{len(knobs.model)} models are too many for one comparison: give at most 26")
    if knobs.temperature == 0 and (knobs.samples > 1 or knobs.top_p < 1):
        what = "greedy answers to a problem are all the same, and --top-p does not change them"
        raise BadInput(f"{what}: add --temperature 0.7, for example")
    folder = Path(knobs.resume) if knobs.resume else new_folder(knobs.out, "eval")
    dtype = models.dtype_name(knobs.dtype, models.find_device(knobs.device))
    return dataclasses.replace(knobs, dtype=dtype), folder


def check_device_flags(knobs, device: torch.device) -> None:
    """Raises BadInput for a flag that needs what is not available here."""
    if knobs.sampler == "graphs" and device.type not in ("cuda", "cpu"):
        raise BadInput(f"--sampler graphs does not run on {device}: drop it, or use --device cuda")
    if knobs.teacher_device:
        models.find_device(knobs.teacher_device)
    if knobs.teacher_bits and not knobs.dry_run:  # which loads no model
        models.check_bits(knobs.teacher_bits)
    if knobs.shard and os.environ.get("WORLD_SIZE", "1") == "1":
        raise BadInput("--shard needs several processes: start with torchrun, or give --no-shard")


def preset_of(given: dict[str, Any], default: str) -> str:
    """--preset, or `default` if no model and no data are named. Raises BadInput for --world without toy."""
    named = given.keys() & {"student", "teacher", "data", "eval_data"}
    preset = given.get("preset") or ("qwen" if named else default)
    if "world" in given and preset != "toy":
        raise BadInput(f"--world {given['world']} applies to the toy only: drop it, or add --preset toy")
    return preset


def resumed(knobs_class: type, given: dict, safe: Iterable[str] = ()) -> Any:
    """The settings in the config.json of the folder given["resume"], and those of `safe` that are given.

    A setting that is newer than the run takes its default, and a line says so. Raises BadInput if the file is
    missing or is not that of such a run, if a setting was edited, whose hash it records, and for a flag that
    would change the run.
    """
    path = Path(given["resume"], "config.json")
    if not given["resume"] or not path.is_file():
        raise BadInput(f"there is no {path}: name the folder of a run that was started")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        recorded = {name: value for name, value in found.items() if name not in FACTS}
        digests = found["digests"]
        names = {field.name for field in dataclasses.fields(knobs_class)}
        if unknown := sorted(recorded.keys() - names):
            raise ValueError(f"other settings: {', '.join(unknown)}")
        changed = [name for name in digests | recorded if hash_of_json(found.get(name)) != digests.get(name)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        what = f"{path} is not the config of such a run ({type(error).__name__}: {error})"
        raise BadInput(f"{what}: restore it, or start a new one") from error
    if changed:
        what = f"{', '.join(changed)} in {path} changed since the run was started"
        raise BadInput(f"{what}: restore what changed, or start a new run")
    recorded |= {name: tuple(value) for name, value in recorded.items() if isinstance(value, list)}
    knobs = knobs_class(**recorded)
    if newer := sorted(names - recorded.keys()):
        defaults = ", ".join(f"{flag_of(name)} {getattr(knobs, name)!r}" for name in newer)
        print(f"{path} is of an earlier version: continuing with the defaults {defaults}", flush=True)
    for name in given.keys() - {"resume"}:
        value = getattr(knobs, name)
        if name not in safe and given[name] != value:
            has = "none" if value in ("", None, ()) else value
            what = f"{flag_of(name)} {given[name]} would change the run, which has {has}"
            raise BadInput(f"{what}: drop it, or start a new run")
    if "steps" in given and given["steps"] < knobs.steps:
        raise BadInput(f"--steps {given['steps']} is below the run's {knobs.steps}: a run can only grow")
    return dataclasses.replace(knobs, **given)


def new_folder(out: str, default: str) -> Path:
    """`out`, or the first free runs/`default`-N. Raises BadInput rather than write into another run."""
    if out:
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise BadInput(f"output {out} already holds a run or a file: name another folder with --out")
        check_creatable(Path(out), "--out")
        return Path(out)
    numbered = (Path("runs", f"{default}-{number}") for number in count(1))
    return next(path for path in numbered if not path.exists())


def check_creatable(path: Path, flag: str) -> None:
    """Raises BadInput if a file or folder `path` cannot be created, as far as can be seen without trying."""
    path = path.absolute()
    above = next(folder for folder in (path.parent, *path.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"cannot create {path} ({above} is not a folder or is read-only): name another {flag}")


def prepare_file(path: Path, flag: str) -> None:
    """Create the folder of a file that will be written.

    Raises BadInput if the file cannot be written, as far as can be seen without trying.
    """
    check_creatable(path, flag)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise BadInput(f"{path} is not a writable file: name another {flag}")
    path.parent.mkdir(parents=True, exist_ok=True)


def world_preset(preset: str, world: str) -> dict[str, Any]:
    """The settings of a preset whose models are built here; empty for another preset."""
    if preset == "toy":
        return toy.preset(world)
    if preset == "words":
        from support import words

        return words.preset()
    return {}


def build_world(knobs, sampler: Callable) -> None:
    """Build the world of the preset, if it has one that does not exist yet.

    It takes minutes, so the other data and models that are named are read first, to find errors in them.
    `sampler` is `rollout.rollout`, with which the preset words samples what its teacher learns from.
    """
    own = world_preset(knobs.preset, knobs.world)
    if not own or Path(own["data"]).exists():
        return
    if knobs.data != own["data"]:
        data.problems_of(knobs)
    elif knobs.eval_data:
        data.read_problems(knobs.eval_data, "test", data.layout_of(knobs))
    for name in {knobs.student, knobs.teacher} - set(own.values()):
        models.load_tokenizer(name)
        models.load(AutoConfig, name)
    try:
        if knobs.preset == "toy":
            toy.build(knobs.world)
        else:
            from support import words

            words.build(sampler)
    except SafetensorError as error:  # such as a full disk, for which safetensors raises no OSError
        raise Stopped(1, f"cannot write the models ({error}): free some space, then start again") from error


@contextmanager
def exclusive(folder: Path, fresh: bool) -> Iterator[None]:
    """Create the folder, and hold its lock within the block.

    Raises BadInput if another run holds it or, with `fresh`, if a run was ever started there. If a fresh run
    has an error before it has written anything, nothing is left of it; if the error is a BadInput, the same
    holds for a run that has written config.json alone. Errors of disk and memory, and Ctrl-C in a run that
    can be resumed, become a Stopped.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot create {folder} ({error}): name another --out") from error
    try:
        with FileLock(folder / ".lock", timeout=0):
            if fresh and (folder / "config.json").exists():
                raise BadInput(f"another run was started in {folder}: start again, or name another --out")
            try:
                yield
            except BaseException as error:
                written = {path.name for path in folder.glob("*")} - {".lock"}
                if isinstance(error, BadInput):
                    written.discard("config.json")  # the run could not begin
                if fresh and not written:  # while the lock is held: afterwards another run may use the folder
                    remove_unbegun(folder, created)
                raise
    except KeyboardInterrupt as error:
        if not (folder / "config.json").exists():
            raise
        raise Stopped(130, f"stopped: continue with --resume {folder}") from error
    except Timeout as error:
        raise BadInput(f"another run is writing to {folder}: wait for it, or name another --out") from error
    except OSError as error:
        what = f"cannot write {folder} ({error})"
        raise Stopped(1, f"{what}: fix that, then --resume {folder}, or start again if it is gone") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory; what was written stays in {folder}"
        raise Stopped(1, f"{what}: start again with smaller batches or a lower --max-new-tokens") from error


def remove_unbegun(folder: Path, created: list[Path]) -> None:
    """Remove the files of a run that could not begin, then those of the folders `created` that are empty."""
    with suppress(OSError):  # another run uses one of them
        for name in ("config.json", ".lock"):
            (folder / name).unlink(missing_ok=True)
        for path in created:
            path.rmdir()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU, Python, or a CPU is out of memory; for a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def environment(device: torch.device) -> dict[str, str]:
    """What is needed to repeat a run: library versions, git commit, hardware."""
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
    if os.environ.get("WORLD_SIZE", "1") != "1":  # processes that torchrun started
        found["hardware"] = f"{os.environ['WORLD_SIZE']} x {found['hardware']}"
    return found


def write_config(folder: Path, knobs: dict, device: torch.device, inputs: dict[str, str]) -> None:
    """Write config.json, and print a line with hardware, dtype and folder.

    `inputs` are its `input_hashes`. Raises BadInput if the run was started with others.
    """
    path = folder / "config.json"
    run_id = secrets.token_hex(8)
    if path.exists():
        check_inputs(folder, inputs)
        run_id = run_id_of(folder)
    digests = {name: hash_of_json(value) for name, value in knobs.items()}
    content = knobs | {"run_id": run_id, "inputs": inputs, "digests": digests}
    content |= {"environment": environment(device)}
    write_json(path, content)
    print(f"{content['environment']['hardware']}, {knobs['dtype']}; run folder {folder}", flush=True)


def run_id_of(folder: Path) -> str | None:
    """The random id of the run in `folder`; None if there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("run_id") if path.exists() else None


def input_hashes(contents: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """A hash of each of `contents`, which JSON can express, and of each model's tokenizer and weights.

    Raises BadInput if a tokenizer or a config cannot be loaded.
    """
    found = {what: hash_of_json(content) for what, content in contents.items()}
    for name in dict.fromkeys(names):
        tokenizer = models.load_tokenizer(name)
        vocabulary = sorted(tokenizer.get_vocab().items())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else {}  # merges and normalisation, among others
        rules = {part: rule for part, rule in rules.items() if part not in ("truncation", "padding")}
        found[f"tokenizer of {name}"] = hash_of_json([vocabulary, tokenizer.chat_template, rules])
        found[f"weights of {name}"] = hash_of_weights(name)
    return found


def training_inputs(knobs, problems: list, test: list) -> dict[str, str]:
    """The `input_hashes` of a training run. Of the `problems` to train on it uses the questions alone."""
    contents = {f"training problems of {knobs.data}": [problem.question for problem in problems]}
    contents |= {f"held-out problems of {knobs.eval_data or knobs.data}": test}
    return input_hashes(contents, (knobs.student, knobs.teacher))


def describe_functions(**functions: Callable | None) -> str | None:
    """ "scorer first_half" for example, with the arguments of a `partial`; None if all are None.

    Arguments that JSON cannot express are described by their name if they have one, else by their type.
    """
    found = [f"{part} {description(function)}" for part, function in functions.items() if function]
    return ", ".join(found) or None


def description(value: Any) -> str:
    """The name of a function or class, else that of the value's type; with the arguments of a `partial`."""
    if isinstance(value, partial):
        arguments = json.dumps([value.args, value.keywords], default=description, skipkeys=True)
        return description(value.func) + arguments
    return getattr(value, "__qualname__", type(value).__qualname__)


def hash_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def hash_of_weights(name: str) -> str | None:
    """A hash of configs and weights in the folder `name`, or the commit of the hub model `name`."""
    folder = Path(name)
    if not folder.is_dir():
        return models.load(AutoConfig, name)._commit_hash
    found = hashlib.sha256()
    for path in [*sorted(folder.glob("*config.json")), *sorted(folder.glob("*.safetensors"))]:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
    return found.hexdigest()


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Raises BadInput, naming what changed, if the run in `folder` was started with other inputs."""
    before = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("inputs")
    known = before if isinstance(before, dict) else {}
    changed = [what for what in inputs if known.get(what) != inputs[what]]
    if changed:
        what = f"{', '.join(changed)} changed since the run was started"
        remedy = "restore them, or the version of transformers, or start a new run"
        if changed == ["functions of the script"]:
            remedy = "resume with the script that started the run, unchanged"
        raise BadInput(f"{what}: {remedy}")


def sync(path: Path) -> None:
    """Wait until what was written is on the disk."""
    if path.exists():
        with path.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write in the block, which then gets the name `path`; after an error it is removed.

    After a power cut there is the old file or the new one.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises BadInput if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror}): restore it, or name another file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is not a CSV file ({error}): restore it, or name another file") from error


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows; floats keep 6 digits. A file that lacks a column of theirs is rewritten with it."""
    if not path.exists():
        write_csv(path, list(rows[0]), rows)
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    columns = list(dict.fromkeys([*header, *rows[0]]))
    if columns != header:
        old = [{name: row.get(name) for name in columns} for row in read_csv(path)]
        write_csv(path, columns, old)  # the cells of a new column are empty
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns).writerows(map(rounded, rows))


def write_csv(path: Path, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write the whole file; floats keep 6 digits."""
    # `resolve` keeps a symbolic link.
    with replaced(path.resolve()) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(map(rounded, rows))


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}


def drop_rows_after(folder: Path, step: int, total: int) -> None:
    """Drop what a run of `total` steps wrote after `step`, from which it continues and writes again."""
    for path in (folder / "metrics.csv", folder / "positions.csv"):
        if path.exists():
            whole = [row for row in read_csv(path) if None not in row.values() and row["step"].isdecimal()]
            rows = [row for row in whole if int(row["step"]) < step]
            if rows:
                write_csv(path, list(rows[0]), rows)
            else:
                path.unlink()
    path = folder / "rollouts.jsonl"
    if path.exists():
        whole = [row for _, row in data.jsonl_rows(path) if isinstance(row, dict)]
        write_jsonl(path, [row for row in whole if row.get("step", step) < step])
    for path in folder.glob("eval_step_*.jsonl"):
        number = path.stem.removeprefix("eval_step_")
        if number.isdecimal() and int(number) > step:
            path.unlink()
    if step < total:
        for name in ("eval_after.jsonl", "summary.json"):
            (folder / name).unlink(missing_ok=True)


def whole_batches(path: Path, indices: list[int]) -> list[dict[str, Any]]:
    """What a stopped evaluation left: the records of the batches that it finished.

    `indices` has the index of each answer's problem, in order. An incomplete line, and the batch that it
    belongs to, are removed from the file: that batch is sampled again. Raises BadInput if a line is not the
    answer that belongs there.
    """
    content = path.read_bytes() if path.exists() else b""
    lines, _, _ = content.rpartition(b"\n")
    if not lines.strip():
        path.unlink(missing_ok=True)
        return []
    os.truncate(path, len(lines) + 1)
    records = data.read_jsonl(path)
    size = records[0].get("batch_size")
    found = [record.get("index") for record in records]
    if found != indices[: len(found)] or not isinstance(size, int) or size < 1:
        pairs = enumerate(zip(found, [*indices, None]), 1)
        line = next((number for number, (index, right) in pairs if index != right), 1)
        what = f"answer {line} of {path} is not the one that the evaluation wrote there"
        raise BadInput(f"{what}: restore it, or start a new evaluation")
    if len(records) < len(indices):
        records = records[: len(records) // size * size]
    write_jsonl(path, records)
    return records
