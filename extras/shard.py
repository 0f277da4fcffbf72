"""`torchrun ... train.py --shard`: weights, gradients and AdamW's state are divided among processes (FSDP2).

The student's shards are fp32 and take the place of the masters: FSDP gathers a layer in the dtype of the
matmuls when it is needed, and sums its gradients over the processes in fp32. For sampling, a model is
gathered once and kept until the next answers are scored. Gathering a layer is a collective, so all processes
make the same number of passes, some of them over a row without a loss.

In bf16, the gradients of the output head are summed over the chunks of a micro-batch in bf16; without
--shard they are summed in fp32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from extras.ranks import Leader, Worker, selected
from rollout import Rollout, micro_batches
from support import models
from support.cli import BadInput
from support.run import CheckpointedRun


class ShardedWorker(Worker):
    """What every rank does with its share of the answers and its shards of the models."""

    collective = ("divide", "prepare", "score", "sum_gradients", "clip", "step", "state", "weights")
    whole: str | None = None  # the model that is gathered
    optimizer: torch.optim.Optimizer | None = None  # after `divide`

    def load(self, knobs, device: torch.device) -> None:
        """Load both models into the CPU's memory; `divide` moves the shards to the device."""
        super().load(knobs, torch.device("cpu"))

    @torch.no_grad()
    def divide(self, knobs, device: torch.device) -> None:
        for name, weight in self.pair.student.named_parameters():
            weight.data = self.pair.masters[name].data  # fp32
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, knobs.dtype), reduce_dtype=torch.float32)
        shard(self.pair.student, mesh=mesh, mp_policy=policy)
        shard(self.pair.teacher, mesh=mesh)
        self.pair = replace(self.pair, masters=dict(self.pair.student.named_parameters()))
        self.optimizer = self.adamw(self.pair, knobs)

    def prepare(self, model: str) -> None:
        """Gather a model for sampling, which then needs no communication."""
        if self.whole != model:
            self.reshard()
            self.whole = model
            for module in sharded(getattr(self.pair, model)):
                module.set_reshard_after_forward(False)
                module.unshard()

    def reshard(self) -> None:
        for module in (*sharded(self.pair.student), *sharded(self.pair.teacher)):
            module.set_reshard_after_forward(True)
            module.reshard()
        self.whole = None

    def score(
        self, rollouts: Rollout, loss_mask: Tensor, training: bool, micro_batch: int, passes: int, **options
    ) -> tuple[float, dict[str, Tensor]]:
        self.reshard()
        groups = micro_batches(rollouts, micro_batch)
        loss, parts = 0.0, []
        for i in range(passes):
            rows = groups[i] if i < len(groups) else groups[0][:1]
            mask = loss_mask[rows] if i < len(groups) else torch.zeros_like(loss_mask[rows])
            self.gather_heads()
            part_loss, part = super().score(
                selected(rollouts, rows), mask, training, micro_batch=1 << 60, **options
            )
            loss += part_loss
            parts.append(part | {"row": torch.tensor(rows)[part["row"]]})
        self.reshard()
        return loss, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def gather_heads(self) -> None:
        """Gather the output heads, and with them the embeddings and last norms.

        FSDP gathers them in the model's own forward, which scoring does not call:
        `rollout.hidden_states` calls the decoder, and `opd.opd_backward` the heads.
        """
        heads = []
        for model in (self.pair.student, self.pair.teacher):
            model.unshard()
            heads.append(models.OutputHead.of(model, self.pair.vocab_size))
        self.pair = replace(self.pair, student_head=heads[0], teacher_head=heads[1])

    def sum_gradients(self) -> None:
        """FSDP has averaged the gradients: turn the mean into the sum."""
        for master in self.pair.masters.values():
            if master.grad is not None:
                master.grad.mul_(dist.get_world_size())

    def clip(self, largest: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.pair.masters.values(), largest)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """What `CheckpointedRun.tensors` returns, gathered; empty on other ranks than 0."""
        found = {}
        for name, weight in self.pair.masters.items():
            found[f"weight/{name}"] = weight
            found |= {f"{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return gathered(found)

    def weights(self) -> dict[str, Tensor]:
        """The student's weights, gathered; empty on other ranks than 0."""
        return gathered(self.pair.masters)

    @torch.no_grad()
    def restore(self, name: str, values: dict[str, Tensor]) -> None:
        """Set this rank's shards of a weight and of AdamW's state."""
        self.reshard()  # a gathered model would keep the old weights
        master = self.pair.masters[name]
        for key, value in values.items():
            if value.shape == master.shape:  # AdamW's step is a scalar, and not divided
                values[key] = distribute_tensor(
                    value.to(master.device), master.device_mesh, master.placements, src_data_rank=None
                )
        master.copy_(values.pop("weight"))
        self.optimizer.state[master] = values


class ShardedLeader(Leader):
    """Rank 0's side. All ranks do what it does with the models."""

    def __init__(self, leader: Leader, knobs):
        plain = leader.worker
        super().__init__(ShardedWorker(plain.load_pair, plain.score_rows, plain.adamw), leader.messages)
        self.knobs = knobs
        self.sampler = leader.sampler
        self.begin("shard")  # the other ranks replace their workers as well

    def load_pair(self, knobs, device: torch.device):
        _, teacher_tokenizer = models.load_tokenizers(knobs.student, knobs.teacher, knobs.divergence)
        if teacher_tokenizer:
            what = "--shard needs one tokenizer, and the teacher has another"
            raise BadInput(f"{what}: drop --shard, or name a teacher of the student's family")
        pair = super().load_pair(knobs, device)
        for model in (pair.student, pair.teacher):
            for name, weight in model.named_parameters():
                if weight.dtype != getattr(torch, knobs.dtype):
                    what = f"{type(model).__name__} keeps {name} in float32, which --shard does not"
                    raise BadInput(f"{what}: add --dtype float32, or drop --shard")
        self.everywhere("divide", [(self.knobs, models.find_device(self.knobs.device))] * self.size)
        return self.worker.pair

    def score(self, pair, rollouts: Rollout, loss_mask: Tensor | None = None, **options: Any):
        shares = [selected(rollouts, rows) for rows in self.dealt(rollouts)]
        passes = max(len(micro_batches(share, options["micro_batch"])) for share in shares)
        found = super().score(pair, rollouts, loss_mask, passes=passes, **options)
        if torch.is_grad_enabled():
            self.begin("clip", self.knobs.clip)  # this rank does so in train.train
        return found

    def adamw(self, pair, knobs) -> torch.optim.Optimizer:
        """An optimizer whose steps the other ranks make as well."""
        optimizer = self.worker.optimizer
        optimizer.register_step_pre_hook(lambda *_: self.begin("step", optimizer.param_groups[0]["lr"]))
        return optimizer

    def run(self, folder: Path, pair, optimizer, knobs) -> CheckpointedRun:
        return ShardedRun(self, folder, pair, optimizer, knobs)


class ShardedRun(CheckpointedRun):
    """A run whose checkpoints are gathered: the files are those of one process, which can continue it."""

    def __init__(self, leader: ShardedLeader, *arguments: Any):
        super().__init__(*arguments)
        self.leader = leader

    def save_student(self, folder: Path) -> None:
        """As `train.Pair.save_student`."""
        student = self.pair.student
        weights = self.leader.everywhere("weights", [()] * self.leader.size)[0]
        _, kind = type(student).__bases__  # FSDP has put a class of its own in front of the model's
        plain = kind.__new__(kind)
        plain.__dict__.update(student.__dict__)
        dtype = getattr(torch, self.leader.knobs.dtype)
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        models.save_model(plain, self.pair.tokenizer, folder, weights)

    def tensors(self) -> dict[str, Tensor]:
        return self.leader.everywhere("state", [()] * self.leader.size)[0]

    def restore(self, name: str, values: dict[str, Tensor]) -> None:
        self.leader.everywhere("restore", [(name, values)] * self.leader.size)

    def save_last(self) -> None:
        """Do nothing: after a fault the ranks are in different calls, and cannot gather their shards."""


@torch.no_grad()
def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors on rank 0, in the CPU's memory; all ranks have to call this."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            found[name] = whole.detach().cpu()
    return found


def sharded(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def shard(model, **options: Any) -> None:
    """Divide each layer, then the rest. FSDP's root is the module called first, so call the whole model."""
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **options)
    fully_shard(model, **options)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    model.reshard()
