"""The rollouts of rollout.py, faster: the same law by other means. Read that file first.

- Keys and values stay in buffers: a step adds a column, where a `DynamicCache` copies all that it holds.
- On a CPU, bf16 weights are packed once a rollout in the layout that matmuls of few rows read fastest.
- On a CUDA GPU a step is one CUDA graph, captured once for each of a few sizes and replayed from then on. The
  host looks at what has ended every `check` steps only: each look makes it wait for the GPU.

Shapes: B rows, b of them in the batch, P longest prompt, L columns of the buffers, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from cli import BadInput
from rollout import Rollout, rollout, sample

ROUND = 512  # L is a multiple of it on a GPU, so that prompts of another length seldom need new buffers


class Columns(DynamicLayer):
    """A layer's keys and values, (B, heads, L, head size) each; a step writes one column of b rows."""

    def __init__(self, filled: DynamicLayer, rows: int, columns: int, place: Tensor):
        super().__init__()
        shapes = [(rows, x.shape[1], columns, x.shape[3]) for x in (filled.keys, filled.values)]
        self.keys, self.values = (filled.keys.new_zeros(shape) for shape in shapes)
        self.place = place  # (1,) the column to write, the same for all layers
        self.is_initialized, self.seen = True, columns  # columns that attention looks at

    def fill(self, filled: DynamicLayer) -> None:
        b, _, length, _ = filled.keys.shape
        self.seen = length
        self.keys[:b, :, :length], self.values[:b, :, :length] = filled.keys, filled.values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        b = len(keys)
        self.keys[:b].index_copy_(2, self.place, keys)
        self.values[:b].index_copy_(2, self.place, values)
        return self.keys[:b, :, : self.seen], self.values[:b, :, : self.seen]

    def keep(self, rows: Tensor) -> None:
        """Rows move up to the front, where the smaller batch reads them."""
        for buffer in (self.keys, self.values):
            buffer[: len(rows), :, : self.seen] = buffer[rows, :, : self.seen]


class Buffers:
    """All that a step reads and writes, at places in memory that stay: a graph knows no others."""

    def __init__(self, model, filled: DynamicCache, rows: int, columns: int):
        self.model, self.rows, self.columns = model, rows, columns
        device = filled.layers[0].keys.device
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = [Columns(layer, rows, columns, self.place) for layer in filled.layers]
        self.cache = Cache(layers=self.layers)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)  # columns to look at
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if device.type == "cuda":  # one pool and one stream for all graphs: each has memory of its own
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def start(self, filled: DynamicCache, mask: Tensor) -> None:
        """Take up the prompts' cache and their mask, (b, P)."""
        b, length = mask.shape
        for layer, source in zip(self.layers, filled.layers):
            layer.fill(source)
        self.mask.zero_()[:b, 0, 0, :length] = mask.bool()
        self.positions[:b, 0] = mask.sum(1) - 1

    def take(self, token: Tensor) -> None:
        """The tokens (b,) that the next step reads, each one place after its row's last."""
        self.ids[: len(token), 0] = token
        self.positions[: len(token)] += 1

    def keep(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows)
        for tensor in (self.ids, self.positions, self.mask):
            tensor[: len(rows)] = tensor[rows]

    def step(self, b: int, column: int, seen: int) -> Tensor:
        """Logits (b, V) after the tokens in `ids`, whose keys and values go to `column`."""
        self.mask[:b, ..., column] = True
        self.place.fill_(column)
        for layer in self.layers:
            layer.seen = seen
        if self.ids.device.type != "cuda":
            return self.forward(b)
        if (b, seen) not in self.graphs:
            self.graphs[b, seen] = self.capture(b)
        graph, logits = self.graphs[b, seen]
        graph.replay()
        return logits

    def forward(self, b: int) -> Tensor:
        out = self.model(
            input_ids=self.ids[:b],
            attention_mask=self.mask[:b, ..., : self.layers[0].seen],
            position_ids=self.positions[:b],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def capture(self, b: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step of b rows as a graph, and the logits that each replay writes anew. Raises BadInput."""
        device = self.ids.device
        with torch.cuda.device(device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.forward(b)  # once outside: libraries choose their kernels, and a step can be repeated
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    logits = self.forward(b)
            except RuntimeError as error:  # it may hide what came before: no memory
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__
                name = type(self.model).__name__
                raise BadInput(f"{name} makes no CUDA graph ({error}): use --sampler plain") from error
        return graph, logits


@contextmanager
def packed(model, rows: int) -> Iterator[None]:
    """Within this, bf16 linear layers on a CPU read a packed copy of their weights, best for `rows`."""
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    linear = [m for m in linear if m.weight.dtype == torch.bfloat16 and m.weight.device.type == "cpu"]
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        linear = []
    try:
        for module in linear:
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            module.forward = partial(multiply, weight, module.bias)
        yield
    finally:
        for module in linear:
            vars(module).pop("forward", None)  # the class's own is seen again


def multiply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def read_prompts(model, prompts: list[list[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
    """Logits (B, V) after each prompt, their cache, and their mask (B, P); padding goes to the left."""
    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    cache = DynamicCache(config=model.config)
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], cache, mask


def staying(alive: Tensor, exact: bool) -> Tensor:
    """Which rows of the batch to go on with, (b,) -> at most (b,): those alive, (0,) if there are none.

    Not `exact`, their number is halved as long as they fit, and ended rows fill it up: few sizes come up.
    """
    left = size = int(alive.sum())
    if left and not exact:
        size = len(alive)
        while size > 1 and (size + 1) // 2 >= left:
            size = (size + 1) // 2
    return alive.argsort(descending=True, stable=True)[:size].sort().values


@dataclass
class Sampler:
    """Called like `rollout.rollout`. On a GPU it keeps its buffers and graphs for the next call."""

    check: int | None = None  # steps between two looks at what has ended; default: 16 on CUDA, else 1
    span: int | None = None  # attention sees a multiple of so many columns; default: 128 on CUDA, else 1
    reuse: bool | None = None  # keep the buffers for the next call; default: on CUDA, for its graphs
    buffers: Buffers | None = field(default=None, repr=False)

    @torch.no_grad()
    def __call__(
        self,
        model,
        prompts: list[list[int]],
        horizon: int,
        end_ids: set[int],
        temperature: float = 1.0,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        top_p: float = 1.0,
    ) -> Rollout:
        """A `Rollout`, as `rollout.rollout` gives it."""
        was_training = model.training
        model.eval()
        try:
            with packed(model, len(prompts)):
                draw = partial(sample, temperature=temperature, generator=generator, top_p=top_p)
                return self.write(model, prompts, horizon, end_ids, draw, vocab_size)
        finally:
            model.train(was_training)

    def write(self, model, prompts, horizon: int, end_ids: set[int], draw: Callable, vocab_size) -> Rollout:
        cuda, rows = model.device.type == "cuda", len(prompts)
        check, span = self.check or (16 if cuda else 1), self.span or (128 if cuda else 1)
        logits, filled, mask = read_prompts(model, prompts)
        width = mask.shape[1]
        buffers = self.room(model, filled, rows, width + horizon, span)
        buffers.start(filled, mask)
        del filled  # its copy is all that is needed from here on
        tokens = mask.new_zeros(rows, horizon)
        response_mask, logp = tokens.bool(), tokens.float()
        going, alive = torch.arange(rows, device=mask.device), mask.new_ones(rows).bool()  # (b,) both
        finished, ends = torch.zeros_like(alive), torch.tensor(sorted(end_ids), device=mask.device)
        for t in range(horizon):
            token, token_logp = draw(logits[:, :vocab_size])  # (b,) both
            tokens[going, t], logp[going, t] = token.where(alive, 0), token_logp.where(alive, 0.0)
            response_mask[going, t] = alive
            ended = torch.isin(token, ends) & alive
            finished[going] |= ended
            alive = alive & ~ended
            buffers.take(token)
            if (t + 1) % check == 0:
                keep = staying(alive, exact=check == 1)
                if len(keep) == 0:
                    break
                if len(keep) < len(going):
                    buffers.keep(keep)
                    going, alive = going[keep], alive[keep]
            if t + 1 < horizon:
                seen = min(-(-(width + t + 1) // span) * span, buffers.columns)
                logits = buffers.step(len(going), width + t, seen)
        length = max(1, int(response_mask.any(0).sum()))
        return Rollout(prompts, tokens[:, :length], response_mask[:, :length], logp[:, :length], finished)

    def room(self, model, filled: DynamicCache, rows: int, columns: int, span: int) -> Buffers:
        """Buffers of at least this size: those of the last call, if they are kept and serve."""
        if not (model.device.type == "cuda" if self.reuse is None else self.reuse):
            return Buffers(model, filled, rows, -(-columns // span) * span)
        old, columns = self.buffers, -(-columns // ROUND) * ROUND
        if old is not None and old.model is model:
            if old.rows >= rows and old.columns >= columns:
                return old
            rows, columns = max(rows, old.rows), max(columns, old.columns)
        old = self.buffers = None  # freed before the new ones are made
        self.buffers = Buffers(model, filled, rows, columns)
        return self.buffers


def sampler(name: str, model) -> Callable[..., Rollout]:
    """`plain` is `rollout.rollout`, `fast` a `Sampler`. By default a CPU samples fast, where the model allows
    it; a GPU plainly, since its graphs have not been measured yet. Raises BadInput if `fast` can't be.
    """
    why_not = ""
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        why_not = "has layers of a sliding window"
    elif getattr(model.config, "alibi", False):
        why_not = "adds alibi to a mask of another shape"
    elif model.config._attn_implementation != "sdpa":  # others want another kind of mask
        why_not = f"computes attention by {model.config._attn_implementation}, not sdpa"
    if name == "fast" and why_not:
        raise BadInput(f"{type(model).__name__} {why_not}: use --sampler plain")
    name = name or ("plain" if why_not or model.device.type != "cpu" else "fast")
    return Sampler() if name == "fast" else rollout
