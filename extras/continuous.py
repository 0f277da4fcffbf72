"""`--sampler continuous`: rollouts by transformers' continuous batching (paged KV cache, CUDA graphs).

The engine packs all unfinished rows into one batch without padding. Each call makes a fresh one, because an
engine that is kept reuses prefixes that were computed with earlier weights.
"""

import functools
import gc
import logging
import math
import random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig

from rollout import Rollout
from support.cli import BadInput
from support.models import first_line
from support.run_folder import is_out_of_memory

PAGE = 256  # tokens of a row in one page of the cache
MOST_TOKENS = 2048  # in one pass: without flash attention its mask is this number x the cache's length


@torch.no_grad()
def continuous_rollout(
    model,  # a Hugging Face causal LM in evaluation mode
    prompts: list[list[int]],
    horizon: int,
    eos_ids: set[int],
    noise: Tensor,  # (B, H) from `sampling_noise`
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Rollout:
    """The arguments and the distribution of `rollout.rollout`, sampled by transformers' engine.

    The engine has one generator for the whole batch, here seeded by a hash of `noise`. The same call on the
    same machine gives the same sample, but a row depends on the other rows and on the horizon, and it is not
    the row of `rollout.rollout`. Torch's global generators are left as they were. Raises ValueError if the
    model is in training mode, BadInput if the engine cannot run it.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        raise refusal(model, "its paged attention ignores attn_logit_softcapping")
    if model.device.type == "cpu":
        say_slow()
    seed = random.Random(noise.cpu().numpy().tobytes()).getrandbits(32)
    sampling = sampling_config(model, horizon, eos_ids, temperature, vocab_size)
    with torch.random.fork_rng():  # the engine seeds the global generators
        outputs = generate(model, prompts, sampling, engine_config(model, prompts, horizon, seed))
    tokens = pad_sequence([torch.tensor(output.generated_tokens) for output in outputs], batch_first=True)
    logp = pad_sequence([torch.tensor(output.logprobs) for output in outputs], batch_first=True)
    lengths = torch.tensor([len(output.generated_tokens) for output in outputs])
    response_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    finished = torch.tensor([output.generated_tokens[-1] in eos_ids for output in outputs])
    return Rollout(prompts, *(part.to(model.device) for part in (tokens, response_mask, logp, finished)))


@functools.cache
def say_slow() -> None:
    print("--sampler continuous is made for GPUs: on a CPU it is slower than plain", flush=True)


def sampling_config(
    model, horizon: int, eos_ids: set[int], temperature: float, vocab_size: int | None
) -> GenerationConfig:
    """The distribution of `rollout.rollout`; the checkpoint's own config is not used."""
    rows = model.get_output_embeddings().weight.shape[0]
    return GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=horizon,
        eos_token_id=sorted(eos_ids),
        suppress_tokens=list(range(vocab_size or rows, rows)) or None,
    )


def engine_config(model, prompts: list[list[int]], horizon: int, seed: int) -> ContinuousBatchingConfig:
    """A cache in which every row fits at its full length; by default it is 0.8 to 0.9 of the free memory."""
    pages = [math.ceil((len(prompt) + horizon) / PAGE) + 1 for prompt in prompts]  # one to spare
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=sum(pages),
        max_batch_tokens=min(MOST_TOKENS, sum(map(len, prompts))),
        safety_margin=0.0,  # no row has to wait for free pages
        return_logprobs=True,
        seed=seed,
        # Without flash attention the library does not use CUDA graphs unless told to.
        use_cuda_graph=model.device.type == "cuda",
        kv_padding_interval_size=2048,  # a graph for each multiple of so many cached tokens; default: 16,384
        # Flash attention has 16 bits, and does not run on a CPU beside a GPU.
        auto_switch_to_flash=model.device.type != "cpu" and model.dtype != torch.float32,
    )


def generate(model, prompts: list, sampling: GenerationConfig, engine: ContinuousBatchingConfig) -> list:
    """A GenerationOutput for each prompt, in their order. Raises BadInput if the engine fails.

    `model.generate_batch` is not used: it starts the engine's thread before it adds the rows, so the rows of
    the first pass, and with them the sample, depend on the threads' speed.
    """
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # errors are reported below
    model.destroy_cached_continuous_batching_manager()  # it would be used in place of a fresh one
    try:
        manager = model.init_continuous_batching(sampling, engine)
    # Errors of single families, or a flash attention package that is installed but does not load.
    except (AttributeError, LookupError, TypeError, ValueError, ImportError, OSError) as error:
        raise refusal(model, first_line(error)) from error
    names = manager.add_requests(prompts)
    outputs = {}
    gc.freeze()  # the engine collects garbage twice: a second each if it searches all objects of the program
    try:
        manager.start()
        while len(outputs) < len(names):
            output = manager.get_result(timeout=1)
            if output is not None:
                outputs[output.request_id] = output
            elif not manager.is_running():
                break
    finally:
        manager.stop(hard_stop=True)  # waits for the thread, after Ctrl-C as well
        manager.destroy()
        gc.unfreeze()
    error = manager.background_thread_status.fatal_error
    if error is not None and is_out_of_memory(error):
        raise error
    reasons = [output.error for output in outputs.values() if output.error is not None]
    if reasons or len(outputs) < len(names):
        raise refusal(model, first_line(error or RuntimeError(*reasons[:1]))) from error
    return [outputs[name] for name in names]


def refusal(model, reason: str) -> BadInput:
    what = f"{type(model).__name__} does not run in transformers' continuous batching ({reason})"
    return BadInput(f"{what}: drop --sampler continuous")
