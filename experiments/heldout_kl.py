"""Exact reverse KL of a student to its teacher on fixed held-out prompts, the student's own tokens.

    python experiments/heldout_kl.py --student RUN/student --teacher TEACHER --data FILE

Accuracy on a hundred problems moves by whole points from luck alone; this moves only when the student does.
The same prompts and the same random numbers for every student that is measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import models
import report
from cli import BadInput, knob, parse, run
from eval_math import INSTRUCTION
from rollout import rollout
from train import Knobs as TrainKnobs
from train import score


@dataclass(frozen=True)
class Knobs:
    student: str = knob("", "hub name or folder")
    teacher: str = knob("", "hub name or folder")
    data: str = knob("openai/gsm8k:main", "hub name[:config], folder or file; its test split")
    prompts: int = knob(24, "problems, chosen by the seed", 2)
    tokens: int = knob(50, "sampled after each prompt, at temperature 1", 1)
    instruction: str = knob(INSTRUCTION, "text after each problem")
    dtype: str = knob("", "of matmuls; default: whichever is faster here", choices=("bfloat16", "float32"))
    seed: int = knob(0, "of the prompts and of the sampling", 0)
    out: str = knob("", "CSV file to which a row is added")


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__, None))
    if not knobs.student or not knobs.teacher:
        raise BadInput("--student and --teacher are both needed: name two model folders or hub models")
    device = models.find_device("")
    dtype = models.dtype_name(knobs.dtype, device)
    problems = data.subset(data.read_problems(knobs.data, "test"), knobs.prompts, knobs.seed)
    pair = models.load_pair(knobs.student, knobs.teacher, dtype, device, checkpointing=False)
    prompts = data.render(pair.tokenizer, problems, knobs.instruction, "")
    generator = torch.Generator(device).manual_seed(knobs.seed)
    with torch.no_grad():
        law = {"vocab_size": pair.vocab_size, "generator": generator}
        ro = rollout(pair.student, prompts, knobs.tokens, pair.ends, **law)
        _, stats, _ = score(pair, ro, TrainKnobs())
    by_prompt = report.mean_by_position(stats["reverse_kl"], stats["row"], len(prompts))
    row = {"student": knobs.student, "reverse_kl": by_prompt.mean().item()}
    row |= {
        "se": (by_prompt.std() / len(prompts) ** 0.5).item(),
        "prompts": len(prompts),
        "tokens": knobs.tokens,
    }
    row |= {"agreement": stats["agreement"].mean().item(), "seed": knobs.seed}
    gap = (stats["student_logp"] - ro.logp[stats["row"], stats["position"]]).abs().mean().item()
    row |= {"sampler_gap": gap}  # nats between the law sampled and the law scored: rounding alone
    if knobs.out:
        report.append_csv(Path(knobs.out), [row])
    print(f"reverse KL {row['reverse_kl']:.4f} +- {row['se']:.4f} nats a token ({len(prompts)} prompts)")


if __name__ == "__main__":
    run(main)
