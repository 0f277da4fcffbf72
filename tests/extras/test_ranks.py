"""Several processes against one: the same tokens, the same student; faults and signals end all of them.

The processes are forked from a server that has imported everything, and meet as those of torchrun do.
"""

import atexit
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CONTEXT, END, pair_of, run_program, tiny
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

import opd
import train
from extras import ranks, shard
from rollout import rollout, sampling_noise
from support import cli, data, run_folder

ROOT = Path(train.__file__).parent
FLAGS = "--preset toy --steps 5 --batch-size 7 --max-new-tokens 8 --horizon 5 --decay constant --warmup 0"
FLAGS += " --eval-limit 0 --save-every 2 --show-every 2"


def process(rank, size, port, flags, output, fault, main):
    """One process of torchrun, with its output in a file."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
    os.environ |= {"LOCAL_WORLD_SIZE": f"{size}", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    if fault:
        fault(rank)
    try:
        run_program(main or train.main, flags.split(), output)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def run(size, flags, folder, fault=None, main=None):
    """The exit codes, and what each process wrote; a loaded machine takes long."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"output-{rank}" for rank in range(size)]
    processes = []
    for rank, output in enumerate(outputs):
        processes.append(CONTEXT.Process(target=process, args=(rank, size, port, flags, output, fault, main)))
        processes[-1].start()
    deadline = time.time() + 180
    for each in processes:
        each.join(max(deadline - time.time(), 0))
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    assert None not in codes, "a process did not end"
    return codes, [output.read_text() for output in outputs]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *f"{FLAGS} --eval-limit 5 --out {folder}".split()])
        train.main()
    return folder


def assert_same_student(one, other):
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() <= 1e-5, name


def assert_same_metrics(one, other):
    """To 4 digits, without the columns that depend on the clock."""
    clocks = ("rollout_s", "score_s", "update_s", "seconds")
    rows, others = (run_folder.read_csv(folder / "metrics.csv") for folder in (one, other))
    assert len(rows) == len(others)
    for row, again in zip(rows, others):
        assert row.keys() == again.keys()
        for name in row.keys() - {*clocks, "accuracy"}:
            assert float(row[name]) == pytest.approx(float(again[name]), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "size, flags", [(3, "--sampler graphs"), (2, "--shard --micro-batch 40 --checkpointing")]
)
def test_processes_train_the_student_of_one(alone, tmp_path, size, flags):
    """Neither 2 nor 3 divides the 7 answers of a step, nor the 5 of the evaluation."""
    codes, written = run(size, f"{FLAGS} {flags} --eval-limit 5 --out {tmp_path}/run", tmp_path)
    assert codes == [0] * size, written
    assert not any(written[1:])
    assert_same_student(alone, tmp_path / "run")
    assert_same_metrics(alone, tmp_path / "run")
    for name in ("eval_before", "eval_teacher", "eval_after", "rollouts"):
        one, other = (data.read_jsonl(folder / f"{name}.jsonl") for folder in (alone, tmp_path / "run"))
        assert [row["response"] for row in one] == [row["response"] for row in other], name
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in alone.iterdir()}


def test_a_script_of_its_own_runs_in_one_process(tmp_path):
    """One process says so, and both end."""
    codes, written = run(2, FLAGS, tmp_path, main=partial(train.main, scorer=train.score))
    assert codes == [2, 0]
    what = "the script's scorer score needs one process: start it without torchrun"
    assert written == [f"error: {what}\n", ""]


@pytest.mark.slow
def test_settings_with_two_processes(world, tmp_path, monkeypatch):
    flags = "--low-memory --horizon auto --micro-batch 60 --rollouts-per-prompt 2 --temperature 0.7"
    flags = f"{FLAGS} --steps 3 {flags} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["train.py", *f"{flags}/one".split()])
    train.main()
    codes, written = run(2, f"{flags}/two", tmp_path)
    assert codes == [0, 0], written
    assert_same_student(tmp_path / "one", tmp_path / "two")
    assert_same_metrics(tmp_path / "one", tmp_path / "two")


class At:
    """Replaces train.score in one process: at a call, the fourth, it does what `action` names."""

    def __init__(self, rank, action, call=4):
        self.rank, self.action, self.call, self.calls = rank, action, call, 0

    def __call__(self, rank):
        if self.rank in (rank, "all"):
            self.process = rank
            self.score, train.score = train.score, self.faulty

    def faulty(self, *args, **options):
        self.calls += 1
        loss, statistics = self.score(*args, **options)
        if self.calls < self.call:
            return loss, statistics
        if self.action == "memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        if self.action == "bug":
            return 1 / 0
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.action == "interrupt":  # in an evaluation; the loop finishes its step instead
            os.kill(os.getpid(), signal.SIGINT)
            if self.process == 0:
                raise KeyboardInterrupt
        return float("nan") if self.action == "nan" else loss, statistics


@pytest.mark.slow
def test_a_signal_to_all_saves_and_another_number_of_processes_continues(alone, tmp_path):
    signal_to_all = At("all", "terminate", call=2)
    for size, flags in ((2, f"{FLAGS} --out"), (3, "--shard --resume")):
        codes, written = run(size, f"{flags} {tmp_path}/run", tmp_path, signal_to_all)
        assert codes == [143, 0, 0][:size] and not any(written[1:]), written
        assert written[0].count("error: stopped after step") == 1
    assert len(run_folder.read_csv(tmp_path / "run" / "metrics.csv")) == 4
    codes, written = run(2, f"--resume {tmp_path}/run --no-shard", tmp_path)
    assert codes == [0, 0], written
    assert_same_student(alone, tmp_path / "run")
    assert_same_metrics(alone, tmp_path / "run")


RESUME = "continue with python program --resume"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, rank, action, codes, line, newest",
    [
        ("", 1, "memory", [1, 0], f"error: out of memory at step 3, .*{RESUME}", 3),
        ("", 1, "kill", [1, -9, 0], f"error: process 1 has ended, .* at step 3: {RESUME}", 3),
        ("", 0, "kill", [-9, 1, 1], "error: process 0 has ended, .*: continue with --resume", 2),
        ("", 1, "nan", [1, 0], "error: step 3 has loss nan", 2),
        ("", 1, "bug", [1, 0], "ZeroDivisionError: division by zero", 2),
        ("", "all", "interrupt", [130, 1], "error: stopped: continue with --resume", 2),
        ("--shard", 1, "kill", [1, -9], f"error: .*process.* has ended, .* at step 3: {RESUME}", 2),
        ("--shard", 0, "memory", [1, 1], f"error: out of memory at step 3, .*{RESUME}", 2),
    ],
)
def test_a_fault_of_one_process_ends_all(world, tmp_path, flags, rank, action, codes, line, newest):
    """With one line, unless it is a bug, and with the state of the last whole step where one can be saved."""
    found, written = run(len(codes), f"{FLAGS} {flags} --out {tmp_path}/run", tmp_path, At(rank, action))
    assert found == codes, written
    errors = [
        row for text in written for row in text.splitlines() if re.match("error:|stopped|.*Error: ", row)
    ]
    assert re.match(line, errors[-1] if action == "bug" else errors[0]), errors
    assert len(errors) == (2 if action == "bug" else 1) or flags, errors  # with shards, rank 1 may add a line
    assert ("Traceback" in written[0]) == (action == "bug")
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint*"))
    assert names[-1] == f"checkpoint-00000{newest}.safetensors"


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--teacher {other}", "have different tokenizers"),
    ],
)
def test_wrong_input_is_one_line_of_the_first_process(world, tmp_path, flags, line):
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    tokenizer.add_tokens(["another"])
    shutil.copytree(world / "teacher", tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    flags = f"{FLAGS} {flags.format(other=tmp_path / 'other')}"
    codes, written = run(2, f"{flags} --out {tmp_path}/run", tmp_path)
    assert codes == [2, 0] and not written[1]
    assert re.fullmatch(f"(preset toy\\n)?error: .*{line}.*\\n", written[0]), written[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"batch_size": 1, "rollouts_per_prompt": 2}, "a step of 2 answers cannot be divided among 3"),
        ({"teacher_bits": "4"}, "--teacher-bits 4 works in a single process: drop it"),
        ({"device": "cpu:0"}, "--device cpu:0 cannot be divided among 3 processes: name cuda"),
        ({"shard": True, "low_memory": True}, "--shard does not work with --low-memory: drop one"),
        ({"shard": True, "horizon": "auto"}, "--shard does not work with --horizon auto: drop one"),
        ({"shard": True, "sampler": "graphs"}, "--shard does not work with --sampler graphs: drop one"),
    ],
)
def test_settings_that_do_not_work_with_several_processes(monkeypatch, settings, line):
    leader = ranks.Leader.__new__(ranks.Leader)
    leader.size = 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(cli.BadInput, match=line):
        leader.start(train.Knobs(**({"device": "cpu"} | settings)), rollout)


def test_until_the_last_state_is_saved_a_signal_does_not_end_the_process(world, tmp_path, monkeypatch):
    """torchrun sends one when another process has ended: 0.1 s later, so in the middle of the handling."""
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def sampler(*given, **options):
        if found:
            raise cli.ProcessEnded("process 1 has ended")
        found.append("sampled")
        return rollout(*given, **options)

    def stop_on_fault(run, error, workload):
        found.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(train.CheckpointedRun, "stop_on_fault", stop_on_fault)
    monkeypatch.setattr(sys, "argv", ["train.py", *f"{FLAGS} --out {tmp_path}/run".split()])
    with pytest.raises(cli.ProcessEnded):
        train.main(sampler=sampler)
    assert found[1].__name__ == "note" and signal.getsignal(signal.SIGTERM) is before


def test_all_processes_get_the_sampler(monkeypatch):
    leader = ranks.Leader.__new__(ranks.Leader)
    leader.size = 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    leader.worker = SimpleNamespace(pair=SimpleNamespace(teacher=None))
    options = {}
    monkeypatch.setattr(leader, "everywhere", lambda *given, **named: options.update(named) or [])
    monkeypatch.setattr(ranks, "interleaved", lambda prompts, parts: parts)
    monkeypatch.setattr(ranks, "moved", lambda parts, device: parts)
    leader.start(train.Knobs(device="cpu"), sampler="a sampler")
    leader.rollout(SimpleNamespace(device="cpu"), [[5], [6]], 3, {END}, sampling_noise(range(2), 3))
    assert options["sampler"] == "a sampler"


def test_shards_need_one_tokenizer(monkeypatch):
    leader = shard.ShardedLeader.__new__(shard.ShardedLeader)
    monkeypatch.setattr(shard.models, "load_tokenizers", lambda *given: ("one", "another"))
    with pytest.raises(cli.BadInput, match="--shard needs one tokenizer, and the teacher has another: drop"):
        leader.load_pair(train.Knobs(), torch.device("cpu"))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_shards_need_one_dtype(which, monkeypatch):
    leader = shard.ShardedLeader.__new__(shard.ShardedLeader)
    pair = pair_of(tiny(), tiny(), torch.bfloat16)
    model = getattr(pair, which)
    model.__class__ = type("Kept", (type(model),), {})
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    monkeypatch.setattr(shard.models, "load_tokenizers", lambda *given: ("one", None))
    monkeypatch.setattr(ranks.Leader, "load_pair", lambda *given: pair)
    match = "Kept keeps model.norm.weight in float32, .*: add --dtype float32, or drop --shard"
    with pytest.raises(cli.BadInput, match=match):
        leader.load_pair(train.Knobs(dtype="bfloat16"), torch.device("cpu"))


def test_a_divergence_that_cannot_be_sent_is_refused(monkeypatch):
    monkeypatch.setattr(ranks.dist, "send_object_list", lambda objects, *_: pickle.dumps(objects))
    messages = object.__new__(ranks.Messages)
    messages.group = None
    messages.send(1, {"divergence": partial(opd.jsd, beta=0.1)})
    with pytest.raises(cli.BadInput, match="write a divergence with `def`"):
        messages.send(1, {"divergence": lambda student_logp, teacher_logp, tokens: student_logp})


def test_a_world_size_without_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="2"):
        cli.run_main(train.main)
    assert "start them with torchrun, or unset WORLD_SIZE" in capsys.readouterr().err


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4], [5, 6], [7, 7, 7, 7], [30]]
ENDS = {END, *range(20, 30)}


def load(knobs, device):
    return pair_of(tiny(), tiny(seed=1), getattr(torch, knobs.dtype), ENDS)


def take_gradient(worker):
    """The whole gradient of rank 0's masters, or of their shards on all ranks, which is then forgotten."""
    found = []
    for master in worker.pair.masters.values():
        gradient, master.grad = master.grad, None
        if gradient is not None:
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            assert gradient.dtype == torch.float32
            found.append(gradient.flatten())
    return torch.cat(found) if found else None


def in_order(statistics):
    order = (1000 * statistics["row"] + statistics["position"]).argsort()
    return {name: values[order] for name, values in statistics.items()}


def compare_with_one(dtype, tolerance):
    ranks.Worker.take_gradient = take_gradient
    shard.models.load_tokenizers = lambda *given: (None, None)  # these models have none
    leader = ranks.join(load, train.score, train.adamw)
    for divided in (False, True):
        compare(leader, dtype, divided, tolerance)
    print("compared")


def compare(leader, dtype, divided, tolerance):
    """Rollouts and scores of all processes against those of this one."""
    knobs = train.Knobs(batch_size=7, clip=1e9, dtype=dtype, shard=divided, device="cpu")
    leader = leader.start(knobs, rollout)
    pair = leader.load_pair(knobs, torch.device("cpu"))
    one = load(knobs, torch.device("cpu"))
    noise = sampling_noise(range(len(PROMPTS)), 9)
    alone = rollout(one.student, PROMPTS, 9, ENDS, noise, temperature=0.7)
    for name in ("teacher", "student") if dtype == "float32" else ("student",):
        answers = rollout(getattr(one, name), PROMPTS, 9, ENDS, noise, top_p=0.9)
        shared = leader.rollout(getattr(pair, name), PROMPTS, 9, ENDS, noise, top_p=0.9)
        for part in ("tokens", "response_mask", "logp", "finished") if dtype == "float32" else ():
            assert torch.allclose(getattr(shared, part), getattr(answers, part), atol=1e-5), part
    first = torch.arange(alone.tokens.shape[1]) < 2
    no_row_0 = alone.response_mask & (torch.arange(len(PROMPTS)) > 0)[:, None]
    for divergence in (opd.reverse_kl, opd.sampled_reverse_kl):
        for mask in (None, alone.response_mask & first, no_row_0):
            options = {"divergence": divergence, "loss_mask": mask, "temperature": 0.7, "micro_batch": 20}
            loss, statistics = train.score(one, alone, **options)
            expected = torch.cat([master.grad.flatten() for master in one.masters.values()])
            for master in one.masters.values():
                master.grad = None
            again, gathered = leader.score(pair, alone, **options)
            if divided:
                torch.nn.utils.clip_grad_norm_(pair.masters.values(), 1e9)
            found = leader.everywhere("take_gradient", [()] * leader.size)[0]
            assert again == pytest.approx(loss, rel=tolerance)
            assert (found - expected).norm() <= tolerance * expected.norm()
            statistics, gathered = in_order(statistics), in_order(gathered)
            assert torch.equal(gathered["row"], statistics["row"])
            gap = (gathered["student_logp"] - statistics["student_logp"]).abs()
            assert (gap <= 20 * tolerance).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance, size", [("float32", 1e-5, 3), ("bfloat16", 0.02, 2)])
def test_scores_and_gradients_are_those_of_one_process(tmp_path, dtype, tolerance, size):
    codes, written = run(size, "", tmp_path, main=partial(compare_with_one, dtype, tolerance))
    assert codes == [0] * size and written[0].endswith("compared\n"), written
