"""Wrong input of every kind: one line with value, reason and remedy, exit code 2, and no file changes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import four_schedules
import gpu
import parts
import phase
import probe
import pytest
import steps
import torch
import words
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3nTextConfig, MambaConfig, Qwen2VLConfig

import eval_math
import schedules
import train
from support import run_folder, toy
from support.cli import BadInput, run_main

ROOT = Path(train.__file__).parent
GOOD = '{"question": "x=3, then +4 fiftytwo times", "answer": "1"}\n'


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def broken_models(folder, world):
    """Model folders, each with one thing wrong."""
    names = ("pickled", "code", "cut", "nan", "lacking", "notemplate", "badconfig", "half", "notokens")
    at = {name: Path(shutil.copytree(world / "student", folder / name)) for name in names}
    weights = load_file(world / "student" / "model.safetensors")
    for name in ("pickled", "half"):
        (at[name] / "model.safetensors").unlink()
    torch.save(weights, at["pickled"] / "pytorch_model.bin")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(at["code"] / "config.json", model_type="evil", auto_map=code)
    (at["code"] / "evil.py").write_text(f"open({str(folder / 'evil_ran')!r}, 'w')")
    whole = (world / "student" / "model.safetensors").read_bytes()
    (at["cut"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    first, *_, last = weights
    nan = weights | {last: torch.full_like(weights[last], torch.nan)}
    save_file(nan, at["nan"] / "model.safetensors", {"format": "pt"})
    del weights[first if "layers" in first else last]
    save_file(weights, at["lacking"] / "model.safetensors", {"format": "pt"})
    for template in at["notemplate"].glob("*.jinja"):
        template.unlink()
    (at["notokens"] / "tokenizer.json").unlink()
    (at["badconfig"] / "config.json").write_text("{broken")


@pytest.fixture(scope="module")
def here(tmp_path_factory, world):
    """A folder of wrong inputs."""
    here = tmp_path_factory.mktemp("wrong inputs")  # the space is meant
    jsonl(here / "empty.jsonl")
    jsonl(here / "broken.jsonl", {"question": "x", "answer": "1"}, '{"question": "y", "answ')
    jsonl(here / "list.jsonl", "[1, 2]")
    jsonl(here / "noanswer.jsonl", {"question": "x", "gold": "1"})
    jsonl(here / "prompts.jsonl", *[{"prompt": f"x={i}"} for i in range(9)])
    jsonl(here / "noquestion.jsonl", {"text": "x", "answer": "1"})
    jsonl(here / "one.jsonl", {"question": "x=1, then +2 fiftyone times", "answer": "1"})
    jsonl(here / "long.jsonl", *[{"question": f"x={i} " * 300, "answer": "1"} for i in range(200)])
    jsonl(here / "twice.jsonl", *[GOOD.strip()] * 3)
    jsonl(here / "half.jsonl", {"index": 0, "response": 4, "gold": "4", "verdict": "right"})
    jsonl(here / "blank.jsonl", GOOD.strip(), {"question": " ", "answer": "1"})
    jsonl(here / "huge.jsonl", GOOD.strip(), {"question": "x" * 50_000_000, "answer": "1"})
    (here / "nul.jsonl").write_bytes(GOOD.encode() + b'{"question": "a\x00b", "answer": "1"}\n')
    (here / "latin.jsonl").write_bytes(GOOD.encode() + '{"question": "é", "answer": "1"}\n'.encode("latin-1"))
    jsonl(here / "test.jsonl", GOOD.strip())
    (here / "table.xlsx").write_text("x")
    (here / "nothing").mkdir()
    (here / "used").mkdir()
    (here / "used" / "metrics.csv").write_text("step\n")
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(here / "other")
    AutoModelForCausalLM.from_pretrained(world / "teacher").save_pretrained(here / "other")
    broken_models(here, world)
    for name, kind in UNSUPPORTED.items():
        shutil.copytree(world / "student", here / name)
        kind().save_pretrained(here / name)
    (here / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "x"}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (here / "folder.jsonl").mkdir()
    (here / "binary.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    write_configs(here, world)
    return here


UNSUPPORTED = {"mamba": MambaConfig, "gemma3n": Gemma3nTextConfig, "vision": Qwen2VLConfig}
CONFIGS = [  # script, a change of config.json as JSON, what the line names
    ("train", '{"steps": "many"}', "steps in"),
    ("train", '{"steps": 2.5}', "steps in"),
    ("train", '{"steps": null}', "steps in"),
    ("train", '{"lr": NaN}', "lr in"),
    ("train", '{"lr": [1]}', "lr in"),
    ("train", '{"data": {"train": "x"}}', "data in"),
    ("train", '{"instruction": "\\ud800"}', "instruction in"),
    ("train", '{"schedule": "sometimes", "seed": true}', "schedule, seed in"),
    ("train", '{"digests": {}, "steps": 0}', "changed since"),
    ("train", '{"digests": 5}', "not the config"),
    ("train", '{"speed": 9}', "other settings: speed"),
    ("train", '{"digests": null}', "not the config"),
    ("train", '{"digests": {"speed": "0"}}', "speed, schedule, "),
    ("train", "[" * 100_000, "not the config"),
    ("train", "[]", "not the config"),
    ("train", "null", "not the config"),
    ("train", "{", "not the config"),
    ("eval_math", '{"model": "x"}', "model in"),
    ("eval_math", '{"model": [1, null]}', "model in"),
    ("eval_math", '{"samples": 0}', "samples in"),
    ("eval_math", '{"digests": {}}', "changed since"),
]


def write_configs(here, world):
    """A folder config0, config1, ... for each row of CONFIGS."""
    of_train = vars(train.Knobs()) | toy.preset("opening") | {"preset": "toy"}
    of_eval = vars(eval_math.Knobs()) | {"model": [str(world / "teacher")], "data": [str(world)]}
    for number, (script, change, _) in enumerate(CONFIGS):
        folder = here / f"config{number}"
        folder.mkdir()
        if change.startswith('{"'):
            settings = of_train if script == "train" else of_eval
            digests = {name: run_folder.hash_of_json(value) for name, value in settings.items()}
            config = json.dumps(settings | {"digests": digests})
            change = f"{config[:-1]}, {change[1:]}"  # of two equal names the second counts
        (folder / "config.json").write_text(change)


ASK = "--model={world}/teacher --data={world}/test.jsonl"
BAD = [  # script, flags, what the line names
    ("train", "--shard", "needs several processes"),
    ("train", "--schedule sometimes", "sometimes"),
    ("train", "--horizon 0", "horizon 0"),
    ("train", "--horizon -1", "horizon -1"),
    ("train", "--horizon 500", "horizon 500"),
    ("train", "--horizon nan", "horizon nan"),
    ("train", "--horizon x", "'x'"),
    ("train", "--schedule popd --popd-interval 1000", "never grows"),
    ("train", "--schedule popd --popd-growth 0", "never grows"),
    ("train", "--popd-growth 5", "popd"),
    ("train", "--steps 0", "--steps: 0 is below 1"),
    ("train", "--batch-size -4", "--batch-size: -4"),
    ("train", "--temperature 0", "--temperature: 0"),
    ("train", "--lr nan", "--lr: nan"),
    ("train", "--stepz 3", "--stepz"),
    ("train", "--sched full", "--sched"),
    ("train", "--preset huge", "huge"),
    ("train", "--world middle", "middle"),
    ("train", "--device abacus", "abacus"),
    ("train", "--dtype int8", "int8"),
    ("train", "--teacher-device abacus", "abacus"),
    ("train", "--teacher-device cuda:7", "'cuda:7' is not available"),
    ("train", "--teacher-device hpu", "'hpu' is not available"),
    ("train", "--teacher-bits 3", "'3'"),
    ("train", "--data {here}/empty.jsonl", "is empty"),
    ("train", "--data {here}/broken.jsonl", "line 2"),
    ("train", "--data {here}/list.jsonl", "line 1"),
    ("train", "--eval-data {here}/noanswer.jsonl", "no column answer"),
    ("train", "--data {here}/prompts.jsonl --eval-limit 4", "only 0 problems with an answer"),
    (
        "train",
        "--data {here}/prompts.jsonl --eval-limit 0 --question-column text",
        "no column text, only prompt",
    ),
    ("train", "--data {here}/noquestion.jsonl", "no column question"),
    ("train", "--data {here}/one.jsonl", "none left"),
    ("train", "--data {here}/long.jsonl", "longest prompt"),
    ("train", "--data {here}/table.xlsx", "table.xlsx"),
    ("train", "--data {here}/nothing", "has no train"),
    ("train", "--data {here}/missing.jsonl", "does not exist"),
    ("train", "--student {here}/missing", "does not exist"),
    ("train", "--teacher {here}/nothing", "cannot load"),
    ("train", "--student nobody/nothing", "cannot load nobody/nothing"),
    ("train", "--data nobody/nothing", "cannot read data nobody/nothing"),
    ("train", "--teacher {here}/other", "different tokenizers"),
    ("train", "--out {here}/used", "already holds"),
    ("train", "--out {here}/one.jsonl", "already holds"),
    ("train", "--data={here}/blank.jsonl", "line 2 has an empty question"),
    ("train", "--data={here}/huge.jsonl", "50,000,000 characters"),
    ("train", "--data={here}/nul.jsonl", "line 2"),
    ("train", "--data={here}/latin.jsonl", "line 2"),
    ("train", "--student={here}/pickled", "model.safetensors"),
    ("train", "--student={here}/code", "custom code"),
    ("train", "--student={here}/cut", "cannot load"),
    ("train", "--teacher={here}/nan", "NaN or infinite weights"),
    ("train", "--teacher={here}/lacking", "lacks 1 weights"),
    ("train", "--student={here}/notemplate", "no chat template"),
    ("train", "--student={here}/badconfig", "not a valid JSON"),
    ("train", "--eval-batch=some", "invalid int or auto value"),
    ("train", "--resume={here}/nothing", "config.json"),
    ("train", "--resume={here}/run", "start a new one"),
    ("train", "--beta2=1", "above"),
    ("train", "--seed=99999999999999999999999", "above"),
    ("train", "--out=/dev/null/x", "/dev/null/x"),
    ("train", "--device=meta", "not available"),
    ("train", "--data={here}/twice.jsonl --eval-limit=1", "repeats the held-out"),
    ("eval_math", "", "--model"),
    ("eval_math", f"{ASK} --top-p=2", "above"),
    ("eval_math", "--regrade={here}/half.jsonl", "line 1 is not a graded answer, its response is 4"),
    ("eval_math", "--model={world}/teacher", "--benchmark"),
    ("eval_math", "--model={world}/teacher --benchmark=gsm9k", "choose from 'gsm8k', 'math500'"),
    ("eval_math", "--model={world}/teacher --benchmark=gsm8k", "network"),
    ("eval_math", "--model={world}/teacher --data={here}/none.jsonl", "does not exist"),
    ("eval_math", "--model={world}/teacher --data={here}/broken.jsonl", "line 2"),
    ("eval_math", "--model={world}/teacher --data={here}/noanswer.jsonl", "no column answer"),
    ("eval_math", "--model={world}/teacher --data={here}/empty.jsonl", "empty"),
    ("eval_math", f"{ASK} --answer-column=gold", "no column gold, only question, answer"),
    ("eval_math", "--model={here}/notokens --data={world}/test.jsonl", "give a complete model folder"),
    ("eval_math", "--model={here}/nowhere --data={world}/test.jsonl", "does not exist"),
    ("eval_math", "--model={here}/half --data={world}/test.jsonl", "cannot load"),
    ("eval_math", "--model={here}/code --data={world}/test.jsonl", "custom code"),
    ("eval_math", f"{ASK} --samples=0", "below 1"),
    ("eval_math", f"{ASK} --samples=4", "--temperature"),
    ("eval_math", f"{ASK} --top-p=0", "below"),
    ("eval_math", f"{ASK} --batch-size=many", "invalid int or auto value"),
    ("eval_math", f"{ASK} --batch-size=0", "is below 1"),
    ("eval_math", f"{ASK} --data={{here}}/test.jsonl", "the same name"),
    ("eval_math", f"{ASK} --max-new-tokens=100000", "exceed the context"),
    ("eval_math", f"{ASK} --device=tpu9", "device"),
    ("eval_math", f"{ASK} --out={{here}}/used", "already holds"),
    ("eval_math", "--resume={here}", "config.json"),
    ("eval_math", "--resume={here}/run", "start a new one"),
    ("eval_math", "--regrade={here}/none.jsonl", "no graded answers"),
    ("eval_math", "--regrade={here}/test.jsonl", "line 1 is not a graded answer"),
    ("eval_math", f"{ASK} --top-p=0.5", "--top-p does not change them: add --temperature"),
    ("train", "--preset=toy --dry-run --max-new-tokens=1024", "exceed the context of 256 tokens"),
    ("eval_math", "--regrade={here}/broken.jsonl", "line 2"),
    ("toy", "--world=middle", "middle"),
    ("toy", "--wrld=opening", "--wrld"),
    ("toy", "opening", "opening"),
    ("train", "extra", "extra"),
    ("train", "--steps=", "''"),
    ("train", "--steps=-0", "below 1"),
    ("train", "--steps=1e3", "'1e3'"),
    ("train", "--steps=0x10", "'0x10'"),
    ("train", "--steps=1_000", "'1_000'"),
    ("train", "--steps=١", "invalid int value"),
    ("train", f"--steps={10**30}", "above"),
    ("train", f"--batch-size={10**30}", "above"),
    ("train", f"--rollouts-per-prompt={10**30}", "above"),
    ("train", f"--max-new-tokens={10**30}", "exceed the context"),
    ("train", "--max-new-tokens=0", "below 1"),
    ("train", "--micro-batch=0", "below 1"),
    ("train", "--lr=1e400", "not a finite number"),
    ("train", "--lr=inf", "not a finite number"),
    ("train", "--lr=-1", "below 0"),
    ("train", "--lr=1_0", "'1_0'"),
    ("train", "--lr=", "''"),
    ("train", "--lr=0x1p3", "'0x1p3'"),
    ("train", "--temperature=1e400", "not a finite number"),
    ("train", "--temperature=-0", "below"),
    ("train", "--warmup=1.5", "above 1"),
    ("train", "--beta2=-0.1", "below 0"),
    ("train", "--clip=0", "below"),
    ("train", "--seed=-1", "below 0"),
    ("train", "--eval-limit=-1", "below 0"),
    ("train", "--eval-every=-1", "below 0"),
    ("train", "--eval-temperature=-1", "below 0"),
    ("train", "--eval-batch=0", "below 1"),
    ("train", "--save-every=-1", "below 0"),
    ("train", "--show-every=x", "'x'"),
    ("train", "--decay=linear", "linear"),
    ("train", "--divergence=kl", "'kl'"),
    ("train", "--preset=", "''"),
    ("train", "--horizon=1e400", "horizon inf"),
    ("train", "--horizon=-0", "horizon -0"),
    ("train", "--horizon=1.5", "horizon 1.5"),
    ("train", "--horizon=", "''"),
    ("train", f"--horizon={10**30}", "horizon 1e+30"),
    ("train", "--schedule=full --horizon=0.5", "full has the horizon --max-new-tokens, not 0.5"),
    ("train", "--schedule=full --horizon=auto", "not auto: drop --horizon"),
    ("train", "--schedule=esr --popd-interval=3", "do not apply to esr"),
    ("train", "--schedule=popd --popd-growth=-1", "never grows"),
    ("train", "--world=closing --preset=qwen", "--world closing"),
    ("train", "--low-memory=3", "ignored explicit argument '3'"),
    ("train", "--no-steps", "--no-steps"),
    ("train", "--student=", "cannot load"),
    ("train", "--teacher=", "cannot load"),
    ("train", "--data=", "has no train"),
    ("train", "--data={here}/folder.jsonl", "has no train"),
    ("train", "--data={here}/test.jsonl --eval-data={here}/missing.jsonl", "missing.jsonl does not exist"),
    ("train", "--student={here}/one.jsonl", "one.jsonl"),
    ("train", "--student={here}/adapter", "cannot load"),
    ("train", "--student={here}/mamba --dry-run", "type mamba is not supported"),
    ("train", "--student={here}/gemma3n --dry-run", "type gemma3n_text is not supported"),
    ("train", "--student={here}/vision --dry-run", "Qwen2VLConfig"),
    ("train", "--instruction=\udcff", "not text"),
    ("train", f"--out={'n' * 300}", "shorter name"),
    ("train", f"--data={'n' * 300}", "nnn"),
    ("train", f"--student=/{'n' * 300}", "nnn"),
    ("train", f"--resume={'n' * 300}", "nnn"),
    ("train", "--out={here}/one.jsonl/x", "cannot create"),
    ("train", "--resume=", "name the folder"),
    ("train", "--resume={here}/one.jsonl", "name the folder"),
    ("train", "--resume={here}/missing", "name the folder"),
    ("train", "--resume", "expected one argument"),
    ("eval_math", "extra", "extra"),
    ("eval_math", f"{ASK} --limit=-1", "below 0"),
    ("eval_math", f"{ASK} --limit=1_0", "'1_0'"),
    ("eval_math", f"{ASK} --samples={10**30}", "above"),
    ("eval_math", f"{ASK} --temperature=nan", "not a finite number"),
    ("eval_math", f"{ASK} --seed={2**33}", "above"),
    ("eval_math", f"{ASK} --out={{here}}/one.jsonl/x", "cannot create"),
    ("eval_math", f"{ASK} --out={'n' * 300}", "shorter name"),
    ("eval_math", "--model= --data={world}/test.jsonl", "cannot load"),
    ("eval_math", "--model={here}/adapter --data={world}/test.jsonl", "cannot load"),
    ("eval_math", "--resume=", "name the folder"),
    ("eval_math", "--resume={here}/one.jsonl", "name the folder"),
    ("eval_math", "--resume={here}/missing --limit=3", "name the folder"),
    ("eval_math", "--regrade=", "no graded answers"),
    ("eval_math", "--regrade={here}/half.jsonl --limit 5", "takes no other flag: drop --limit"),
    ("eval_math", "--regrade={here}", "no graded answers"),
    ("eval_math", "--regrade={here}/latin.jsonl", "line 2"),
    ("eval_math", "--regrade={here}/binary.csv", "line 1"),
    ("schedules", "--bogus", "--bogus"),
    ("schedules", "full", "full"),
    ("four_schedules", "--bogus", "--bogus"),
    ("four_schedules", "extra", "extra"),
    ("compare", "--bogus", "--bogus"),
    ("compare", "--csv={here}/c.csv --steps=1 --arms=popd", "never grows"),
    ("compare", "--arms=best", "best"),
    ("compare", "--seeds=0", "below 1"),
    ("compare", "--minutes=-1", "below 0"),
    ("compare", "--minutes=nan", "not a finite number"),
    ("compare", "--curve-points=0", "below 1"),
    ("compare", "--eval-limit=1", "below 2"),
    ("compare", "--resume=x", "--resume does not apply"),
    ("compare", "--world=closing --student=x", "--world closing"),
    ("compare", "--csv={here}/nothing --arms=full", "name another --csv"),
    ("compare", "--csv={here}/one.jsonl/x.csv", "name another --csv"),
    ("compare", "--csv={here}/c.csv --keep={here}/one.jsonl/x", "name another --keep"),
    ("compare", "--csv={here}/c.csv --preset=toy --data={here}/missing.jsonl", "does not exist"),
    ("compare", "--report --csv={here}/missing.csv", "missing.csv"),
    ("compare", "--report --csv={here}/binary.csv", "not a CSV file"),
    ("phase", "--problems=101", "above 100"),
    ("phase", "--csv={here}/one.jsonl/x.csv", "name another --csv"),
    ("phase", "--report --csv={here}/binary.csv", "not a CSV file"),
    ("words", "--bogus", "--bogus"),
    ("words", "--arms=best", "best"),
    ("words", "--seeds=0", "below 1"),
    ("words", "--csv={here}/one.jsonl/x.csv", "name another --csv"),
    ("words", "--report --csv={here}/missing.csv", "missing.csv"),
    ("words", "--report --csv={here}/binary.csv", "not a CSV file"),
    ("probe", "guess", "decay, cascade, swap"),
    ("probe", "draw", "decay, cascade, swap"),
    ("probe", "decay --steps 3", "--steps"),  # no knob of the probes
    ("probe", "decay --student {world}/student", "give all three"),
    ("probe", "swap --student a --teacher b --data c", "--trained RUN/student"),
    ("probe", "cascade --trained {world}/teacher", "--horizon"),
    ("probe", "cascade --horizon 20", "--trained RUN/student"),
    ("probe", "swap --trained {world}/teacher --horizon 128", "below --max-new-tokens 128"),
    ("probe", "swap --trained {here}/none --horizon 20 --out {here}/x.csv", "does not exist"),
    ("probe", "decay --prefixes some", "'some'"),
    ("probe", "decay --prefixes nan", "'nan'"),
    ("probe", "decay --prefixes 1e999", "1e999"),
    ("probe", "decay --prefixes 128", "below --max-new-tokens 128"),
    ("probe", "decay --prefixes 0", "above 0"),
    ("probe", "decay --dtype=float16", "float16"),
    ("probe", "decay --sample-batch=0", "below 1"),
    ("probe", "decay --samples=0", "below 1"),
    ("probe", "decay --seed=-1", "below 0"),
    ("probe", "swap --horizon=-1", "below 0"),
    ("probe", "decay --out {root}/results/toy.csv", "exists already"),
    ("probe", "decay --max-new-tokens 1000 --out {here}/x.csv", "exceed the context"),
    ("probe", "decay --problems=1", "below 2"),
    ("probe", "decay --max-new-tokens=1", "below 2"),
    ("probe", "decay --out={here}/one.jsonl/x.csv", "name another --out"),
    ("probe", "decay --out={here}/binary.csv", "exists already"),
    ("parts", "--bogus", "--bogus"),
    ("parts", "--part=nothing", "nothing"),
    ("parts", "--sides=plain", "no side plain"),
    ("parts", "--repeats=0", "below 1"),
    ("parts", "--part=rollouts", "needs --model"),
    ("parts", "--part=logits --model=x", "needs --teacher"),
    ("parts", "--part=evaluation --data={here}/missing.jsonl --out={here}/e.csv", "does not exist"),
    ("parts", "--out={here}/nothing", "name another --out"),
    ("parts", "--side=ours --device=abacus", "abacus"),
    ("gpu", "", "no CUDA device here: add --tiny"),
    ("gpu", "--tiny --out={here}/nothing", "name another --out"),
    ("steps", "--bogus", "--bogus"),
    ("steps", "--sides=best", "best"),
    ("steps", "--tokens=0", "below 1"),
    ("steps", "--growth=2", "below --tokens"),
    ("steps", "--growth=256 --sides=naive", "drop --sides"),
    ("steps", "--endless", "--endless"),
    ("steps", "--out={here}/one.jsonl/x.csv", "name another --out"),
    ("steps", "--side=ours --student={here}/missing --data={world}", "does not exist"),
]
BAD += [(script, f"--resume={{here}}/config{i}", names) for i, (script, _, names) in enumerate(CONFIGS)]
SCRIPTS = (train, eval_math, schedules, toy, four_schedules, compare, probe, parts, steps)
SCRIPTS += (phase, words, gpu)
MAINS = {script.__name__.rpartition(".")[2]: script.main for script in SCRIPTS}


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("script, flags, names", BAD)
def test_bad_input_is_one_line_and_changes_nothing(here, world, monkeypatch, capsys, script, flags, names):
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(here)
    before = files(here) | files(ROOT / "results")
    argv = [flag.format(here=here, world=world, root=ROOT) for flag in flags.split()]
    fresh = script == "train" and not flags.startswith("--resume")
    argv = ["--preset", "toy", *argv] if fresh else argv
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_main(MAINS[script])
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1 and line.startswith("error: ") and names in line, line
    assert files(here) | files(ROOT / "results") == before


def test_there_are_many():
    assert len(BAD) >= 240


EXPENSIVE = [
    "--schedule=esr --horizon=0",
    "--data=missing.jsonl",
    "--eval-data=missing.jsonl",
    "--student=./missing",
    "--teacher=./other --student=./missing",
    "--device=abacus",
    "--teacher-device=abacus",
    "--out=used",
    "--out=one.jsonl/x",
    "--steps=0",
    "--data=broken.jsonl",
    "--student=./badconfig",
]


@pytest.mark.parametrize("script", ["train", "compare"])
@pytest.mark.parametrize("flags", EXPENSIVE)
def test_wrong_flags_are_found_before_the_toy_world_is_built(here, tmp_path, monkeypatch, script, flags):
    """Without a cache it takes a minute."""
    if script == "compare" and flags.startswith(("--schedule", "--out")):
        flags = "--arms=esr --esr-tokens=0" if "esr" in flags else flags.replace("--out", "--csv")

    def build(world):
        raise AssertionError("the toy world is built")

    monkeypatch.chdir(here)
    monkeypatch.setattr(toy, "CACHE", tmp_path)
    monkeypatch.setattr(toy, "build", build)
    monkeypatch.setattr(sys, "argv", ["script.py", "--preset=toy", *flags.split()])
    with pytest.raises(BadInput):
        MAINS[script]()


def test_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, ROOT / "schedules.py", "--bogus"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unrecognized arguments: --bogus") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", MAINS)
def test_help_changes_nothing(here, monkeypatch, capsys, script):
    before = files(here) | files(ROOT / "results")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_main(MAINS[script])
    assert not stop.value.code and capsys.readouterr().out
    assert files(here) | files(ROOT / "results") == before
