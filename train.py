"""On-policy distillation: the student samples answers, the teacher scores each token, the student learns.

    python train.py --schedule topd --horizon 0.1      without a GPU: a toy world, 1 to 3 minutes at first
    python train.py --preset qwen                      with a GPU: a 0.5B student, a 1.5B teacher, GSM8K

--help prints this text; the defaults that it shows are those of the preset qwen.
"""
# Shapes: B rows, R longest response, D hidden; of a micro-batch M rows, L longest input, N tokens with a loss

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from eval_math import INSTRUCTION, HeldOut, evaluate
from opd import DIVERGENCES, Divergence, opd_backward, reverse_kl
from rollout import Rollout, hidden_states, micro_batches, model_inputs, rollout, sampling_noise
from schedules import SCHEDULES, make_schedule
from support import data, models, report, run_folder, toy
from support.cli import knob, parse, run_main
from support.run import CheckpointedRun, Run
from support.scores import score_answers


# knob(default, help, limits). `word` is a text that a numeric flag takes too; `group` heads a part of --help.
# A preset (PRESET in support/toy.py and support/words.py) replaces some defaults; flags replace both.
@dataclass(frozen=True)
class Knobs:
    schedule: str = knob("topd", "how the horizon changes", choices=SCHEDULES, group="the horizon")
    horizon: float | str | None = knob(
        None, "up to 1 a fraction of --max-new-tokens, above 1 tokens; auto: measured first", word="auto"
    )
    popd_growth: int | None = knob(None, "tokens per increase; default: reaches T by 2/3 of the run")
    popd_interval: int | None = knob(None, "steps between two increases; default: 1/30 of the run")
    max_new_tokens: int = knob(1024, "T, the longest response; evaluation always allows T", least=1)

    student: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder", group="models and data")
    teacher: str = knob("Qwen/Qwen2.5-1.5B-Instruct", "another tokenizer needs --divergence sampled")
    preset: str = knob(
        "", "default: toy if no GPU, model or data is given, else qwen", choices=("toy", "words", "qwen")
    )
    world: str = knob("opening", "world of the preset toy", choices=toy.WORLDS)
    teacher_device: str = knob("", "cpu, or a second GPU such as cuda:1; default: --device")
    teacher_bits: str = knob("", "quantise its weights, by bitsandbytes; default: no", choices=("8", "4"))
    data: str = knob("openai/gsm8k:main", "hub name[:config], folder, or JSONL/JSON/CSV/parquet file")
    eval_data: str = knob("", "held-out problems; default: test split of --data, or part of a single file")
    question_column: str = knob("", "of both files; default: by name, see support/data.py")
    answer_column: str = knob("", "column of the held-out answers; default: by name; a.b is field b of a")
    skip_bad_rows: bool = knob(False, "leave out rows that cannot be read, instead of stopping")
    instruction: str = knob(INSTRUCTION, "text after each problem")
    system_prompt: str = knob("", "system message; the chat template's own if empty")

    divergence: str = knob("reverse_kl", "the loss", choices=DIVERGENCES, group="optimisation")
    steps: int = knob(200, "optimizer steps", least=1, most=999_999)
    batch_size: int = knob(16, "prompts in a step", least=1, most=10**5)
    rollouts_per_prompt: int = knob(1, "answers to each prompt", least=1, most=10**5)
    temperature: float = knob(1.0, "of sampling, and of both models in the loss", least=0.01, most=100)
    sampler: str = knob("plain", "graphs: faster on CUDA, same up to rounding", choices=("plain", "graphs"))
    lr: float = knob(5e-6, "peak learning rate", least=0)
    warmup: float = knob(0.1, "fraction of the steps in which the learning rate rises", least=0, most=1)
    decay: str = knob("cosine", "of the learning rate after the warm-up", choices=("cosine", "constant"))
    beta2: float = knob(0.95, "of AdamW; low, because runs are short", least=0, most=0.9999)
    clip: float = knob(1.0, "largest gradient norm", least=1e-6)
    micro_batch: int = knob(2048, "tokens in one backward: changes memory and rounding alone", least=1)
    low_memory: bool = knob(False, "train LoRA adapters, not all weights; sets --lr 5e-5 with preset qwen")
    shard: bool = knob(False, "with torchrun: divide both models among the processes (FSDP2)")
    checkpointing: bool = knob(True, "recompute activations in backward: less memory, a third more time")

    eval_every: int = knob(0, "steps between evaluations; 0: before and after", least=0, group="evaluation")
    eval_limit: int = knob(64, "held-out problems; 0: no evaluation", least=0)
    eval_batch: int | str = knob("auto", "answers sampled together, at most 64 if auto", least=1, word="auto")
    eval_temperature: float = knob(0.0, "0 is greedy", least=0)

    out: str = knob("", "default: the first free runs/<preset>-<schedule>-N", group="the run folder")
    resume: str = knob("", "run folder to continue; its settings are used, --steps may grow")
    save_every: int = knob(25, "steps between checkpoints, and one at the end; 0: none", least=0)
    show_every: int = knob(10, "steps between printed answers with log q - log p; 0: none", least=0)
    tracker: str = knob("", "log to it as well; must be installed", choices=("tensorboard", "wandb"))
    seed: int = knob(0, "of data order and sampling", least=0, most=2**32)
    dtype: str = knob("", "of matmuls; default: whichever is faster here", choices=("bfloat16", "float32"))
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    dry_run: bool = knob(False, "estimate the memory, say whether it fits, and stop")


@dataclass(frozen=True)
class Pair:
    """Student and teacher in the dtype of the matmuls, and the fp32 masters that the optimizer updates.

    A bf16 weight has 8 bits of precision: adding 1e-6 to 0.02 would change nothing. So the optimizer updates
    the masters, fp32 tensors in which the gradients accumulate too, and the student computes with bf16 copies
    of them. A weight that is fp32 itself is its own master.

    Both models stay in evaluation mode: with dropout, sampling and scoring would differ in distribution.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    masters: dict[str, Tensor]  # by name, of every weight that is trained
    student_head: models.OutputHead  # from hidden states to logits, fp32 where the device can
    teacher_head: models.OutputHead
    tokenizer: object  # the student's
    # Ids from vocab_size on exist in one model alone: training neither samples nor scores them.
    vocab_size: int | None  # None: all ids of each model, as their tokenizers differ
    eos_ids: set[int]  # ids that end a response
    teacher_tokenizer: object | None = None  # None: the student's

    @torch.no_grad()
    def copy_masters_to_weights(self) -> None:
        for name, master in self.masters.items():
            self.student.get_parameter(name).copy_(master)  # of fp32 weights the two are one tensor

    def save_student(self, folder: Path) -> None:
        """Write the student as a Hugging Face folder in the dtype of the matmuls, LoRA adapters merged."""
        state_dict = None
        if any("lora_" in name for name in self.masters):
            from extras import lora

            state_dict = lora.merged(self.student)
        models.save_model(self.student, self.tokenizer, folder, state_dict)


def move_gradient(master: Tensor, weight: Tensor) -> None:
    """Add a weight's bf16 gradient to its master's, after each micro-batch; the head's after each chunk."""
    if master.grad is None:
        master.grad = weight.grad.to(master.dtype)
    else:
        master.grad.add_(weight.grad)
    weight.grad = None


def make_pair(student, teacher, tokenizer, vocab_size: int | None, eos_ids: set[int]) -> Pair:
    """Find the output heads and create the student's masters. Raises BadInput if a head is not supported."""
    student_head = models.checked_head(student, hidden_states, vocab_size)
    teacher_head = models.checked_head(teacher, hidden_states, vocab_size)
    teacher_head = models.move_head(teacher_head, student.device)  # the two distributions are compared there
    masters = {}
    for name, weight in student.named_parameters():
        if weight.requires_grad and weight.dtype == torch.float32:
            masters[name] = weight
        elif weight.requires_grad:
            masters[name] = torch.nn.Parameter(weight.detach().float())
            # Called in backward, each time that autograd has added to the weight's gradient.
            weight.register_post_accumulate_grad_hook(partial(move_gradient, masters[name]))
    return Pair(student, teacher, masters, student_head, teacher_head, tokenizer, vocab_size, eos_ids)


def score(
    pair: Pair,
    rollouts: Rollout,
    loss_mask: Tensor | None = None,  # (B, R) bool, the tokens with a loss; default: all response tokens
    divergence: Divergence = reverse_kl,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    micro_batch: int = 2048,
    normalizer: int | None = None,  # tokens with a loss in the whole step; default: in these rollouts
) -> tuple[float, dict[str, Tensor]]:
    """Score rollouts with both models, and backpropagate into the masters, unless under `torch.no_grad()`.

    Returns the loss (the sum of the divergence / `normalizer`), and `token_statistics` of all tokens with a
    loss, with the `row` of each in `rollouts` and its `position` in the response, both counted from 0.
    """
    loss_mask = rollouts.response_mask if loss_mask is None else loss_mask & rollouts.response_mask
    # Divide by the tokens of the whole step: a mean per micro-batch would weight tokens unequally.
    normalizer = int(loss_mask.sum()) if normalizer is None else normalizer
    loss = 0.0
    statistics = []
    for rows in micro_batches(rollouts, micro_batch):
        mask = loss_mask[rows]  # (M, R)
        ids, predicts = model_inputs(rollouts, rows, loss_mask)  # (M, L) each
        with torch.no_grad():
            teacher_hidden = hidden_states(pair.teacher, ids)[predicts]  # (N, D), the teacher's D
        student_hidden = hidden_states(pair.student, ids)[predicts]  # (N, D)
        batch_loss, batch_statistics = opd_backward(
            student_head=pair.student_head,
            student_hidden=student_hidden,
            teacher_head=pair.teacher_head,
            teacher_hidden=teacher_hidden,
            tokens=rollouts.tokens[rows][mask],
            normalizer=normalizer,
            divergence=divergence,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
        )
        loss += batch_loss.item()
        index, position = mask.nonzero(as_tuple=True)  # (N,) each: the index of a row in the micro-batch
        row = torch.tensor(rows, device=mask.device)[index]  # its number in `rollouts`
        statistics.append(batch_statistics | {"row": row, "position": position})
    return loss, {name: torch.cat([part[name] for part in statistics]) for name in statistics[0]}


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: str) -> float:
    """Linear warm-up to `peak` in the first `warmup` of the steps, then constant or a cosine towards zero."""
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if decay == "constant":
        return peak
    progress = (step - warmup_steps) / (steps - warmup_steps)  # from 0 to below 1
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(pair: Pair, knobs: Knobs) -> torch.optim.AdamW:
    """AdamW on the masters. `train` sets the learning rate of each step."""
    return torch.optim.AdamW(pair.masters.values(), betas=(0.9, knobs.beta2), weight_decay=0, fused=True)


def train(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    horizon_at: Callable[[int], int],  # step -> H in tokens
    knobs: Knobs,
    run: Run,
    grade: Callable[[object, str], dict] | None = None,  # (model, name) -> held-out scores
    sampler: Callable[..., Rollout] = rollout,
    scorer: Callable[..., tuple[float, dict[str, Tensor]]] = score,
) -> None:
    """The training loop. `run` (support/run.py) yields the step numbers, and times, logs and saves the steps.

    `sampler` is called like `rollout`, and `scorer` like `score`. Rollouts that were not sampled by the
    student have `logp=None`. Raises BadInput if `logp` and the scorer's `student_logp` differ on average by
    more than rounding.
    """
    longest_checked = 0  # tokens
    for step in run.steps(knobs.steps):  # resumes from a checkpoint, saves, and stops on a signal
        horizon = horizon_at(step)

        # 1. The student answers this step's prompts with at most `horizon` tokens each.
        with run.timed("rollout_s"):
            indices = data.batch_indices(len(prompts), knobs.batch_size, step, knobs.seed)
            batch = [prompts[i] for i in indices for _ in range(knobs.rollouts_per_prompt)]
            noise = sampling_noise([(knobs.seed, step, row) for row in range(len(batch))], horizon)
            rollouts = sampler(
                pair.student,
                batch,
                horizon,
                pair.eos_ids,
                noise,
                temperature=knobs.temperature,
                vocab_size=pair.vocab_size,
            )

        # 2. Both models score every token, and `opd_backward` backpropagates the loss: afterwards the
        #    gradients are in the student's fp32 masters.
        with run.timed("score_s"):
            loss, statistics = scorer(
                pair,
                rollouts,
                divergence=DIVERGENCES[knobs.divergence],
                temperature=knobs.temperature,
                micro_batch=knobs.micro_batch,
            )
            # The loss must be that of the sampled distribution: checked whenever answers may be longer.
            if horizon > longest_checked:
                models.check_rollouts(pair.student, rollouts, statistics, knobs)
                longest_checked = horizon

        # 3. One AdamW step. A non-finite loss or gradient ends the run before the weights move.
        with run.timed("update_s"):
            grad_norm = torch.nn.utils.clip_grad_norm_(pair.masters.values(), knobs.clip).item()
            if not math.isfinite(loss + grad_norm):
                raise run.non_finite(step, loss, grad_norm, rollouts, statistics)
            lr = learning_rate(step, knobs.steps, knobs.lr, knobs.warmup, knobs.decay)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            pair.copy_masters_to_weights()

        # 4. Evaluate if it is due, and log; the log shows an answer every --show-every steps.
        done = step + 1
        accuracy = ""  # an empty cell; after the last step, main evaluates
        if grade and knobs.eval_every and done % knobs.eval_every == 0 and done < knobs.steps:
            accuracy = grade(pair.student, f"step_{done}")["accuracy"]
        columns = {"step": step, "horizon": horizon, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        run.log(rollouts, statistics, **columns, accuracy=accuracy)


def load_pair(knobs: Knobs, device: torch.device) -> Pair:
    """Load both models. Raises BadInput, also for two tokenizers with another divergence than `sampled`."""
    tokenizer, teacher_tokenizer = models.load_tokenizers(knobs.student, knobs.teacher, knobs.divergence)
    dtype = getattr(torch, knobs.dtype)
    student = models.load_model(knobs.student, dtype, device)
    teacher_device = models.find_device(knobs.teacher_device) if knobs.teacher_device else device
    teacher = models.load_model(knobs.teacher, dtype, teacher_device, knobs.teacher_bits)
    teacher.requires_grad_(False)
    models.note_smaller_teacher(student, teacher)
    if knobs.low_memory:
        from extras import lora

        lora.add_adapters(student)
    if knobs.checkpointing:
        models.enable_checkpointing(student)
    vocab_size = None if teacher_tokenizer else models.shared_vocabulary(student, teacher)
    readers = [student] if teacher_tokenizer else [student, teacher]  # the models that read the student's ids
    # The teacher may end answers with an id that the student's list lacks; the student learns to use it.
    eos_ids = models.eos_ids(tokenizer, *readers)
    student.generation_config.eos_token_id = sorted(eos_ids)
    pair = make_pair(student, teacher, tokenizer, vocab_size, eos_ids)
    return replace(pair, teacher_tokenizer=teacher_tokenizer)


def schedule_of(knobs: Knobs) -> Callable[[int], int]:
    """The function step -> H in tokens. Raises BadInput if the settings are invalid."""
    return make_schedule(
        name=knobs.schedule,
        budget=knobs.max_new_tokens,
        steps=knobs.steps,
        horizon=knobs.horizon,
        growth=knobs.popd_growth,
        interval=knobs.popd_interval,
    )


def choose_engine(knobs: Knobs, ranks) -> SimpleNamespace:
    """The functions that load, sample, score and optimise, and the run: in this process or among `ranks`."""
    sampler = rollout
    if knobs.sampler == "graphs":
        from extras.graphs import graph_rollout as sampler
    if ranks:
        return ranks.start(knobs, sampler)  # has the same five attributes
    return SimpleNamespace(
        load_pair=load_pair, rollout=sampler, score=score, adamw=adamw, run=CheckpointedRun
    )


def main(sampler: Callable | None = None, scorer: Callable | None = None) -> int | None:
    """Check the settings, load the models, evaluate, train, evaluate. Returns 0, or None after --dry-run.

    A script may give `train` its own `sampler` and `scorer`, as in `run_main(partial(train.main, scorer=f))`.
    Evaluation keeps the sampler of the flags.
    """
    # 1. Settings and problems.
    functions = run_folder.describe_functions(sampler=sampler, scorer=scorer)
    ranks = None
    if os.environ.get("WORLD_SIZE", "1") != "1":  # started by torchrun
        from extras.ranks import join

        ranks = join(load_pair, score, adamw, functions)  # returns on rank 0; the others serve it, and exit
    knobs, folder = run_folder.settings(Knobs, parse(Knobs, __doc__))  # new, or those of a resumed run
    engine = choose_engine(knobs, ranks)
    horizon_at = schedule_of(knobs)
    run_folder.build_world(knobs, rollout)  # the models and data of the presets toy and words, if missing
    device = models.find_device(knobs.device)
    problems, test = data.problems_of(knobs)
    if knobs.dry_run:
        from extras import memory

        print(memory.dry_run(knobs, problems, test, horizon_at, device))
        return None

    # 2. The models, and what depends on their tokenizers.
    pair = engine.load_pair(knobs, device)
    configs = [pair.student.config] if pair.teacher_tokenizer else [pair.student.config, pair.teacher.config]
    prompts = models.render_prompts(pair.tokenizer, problems, knobs, configs)
    test_prompts = models.render_prompts(pair.tokenizer, test, knobs, configs)
    held_out = HeldOut(test, test_prompts, pair.tokenizer, pair.eos_ids)
    teacher_held_out = held_out
    if pair.teacher_tokenizer:
        from extras.other_tokenizer import prepare  # refuses a scorer that a script has given

        scorer, teacher_held_out = prepare(pair, prompts, problems, test, knobs, scorer)
    sampler = sampler or engine.rollout
    scorer = scorer or engine.score
    if knobs.horizon == "auto":
        from extras import profile_horizon

        knobs = replace(knobs, horizon=profile_horizon.choose(scorer, pair, prompts, knobs))
        horizon_at = schedule_of(knobs)

    def grade(model, name: str, held_out: HeldOut = held_out) -> dict | None:
        """Scores of full-length answers to the held-out problems; the answers go to the run folder."""
        if not test:  # --eval-limit 0
            return None
        records = evaluate(
            model,
            held_out,
            path=folder / f"eval_{name}.jsonl",
            max_new_tokens=knobs.max_new_tokens,
            batch_size=knobs.eval_batch,
            seed=knobs.seed,
            temperature=knobs.eval_temperature,
            sampler=engine.rollout,
        )
        return score_answers(records)

    # 3. Evaluate, train, evaluate again.
    optimizer = engine.adamw(pair, knobs)
    run = engine.run(folder, pair, optimizer, knobs)
    inputs = run_folder.training_inputs(knobs, problems, test) | {"functions of the script": functions}
    with run.open(horizon_at, inputs):  # raises BadInput if a resumed run had other inputs
        if knobs.tracker:
            from extras import tracker

            run.track = tracker.start(knobs.tracker, folder, asdict(knobs))
        # A resumed run reads these answers from its folder. Its student, too, has the weights from before
        # training here: the checkpoint is restored by `run.steps`, which `train` calls.
        summary = {"before": grade(pair.student, "before")}
        summary["teacher"] = grade(pair.teacher, "teacher", teacher_held_out)
        train(pair, optimizer, prompts, horizon_at, knobs, run, grade if test else None, sampler, scorer)
        run.save_student(folder / "student")
        summary["seconds"] = run.seconds()
        summary["after"] = grade(pair.student, "after")
        run.track(knobs.steps, summary)
        report.finish(folder, summary)
    return 0


if __name__ == "__main__":
    run_main(main)
