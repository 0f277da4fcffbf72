"""A teacher with another tokenizer: it reads the student's text, and scores it where student tokens end.

The student's tokens y spell a text; z are the teacher's tokens of the same text, after the teacher's own
prompt. F(o) estimates the teacher's log-probability of the first o bytes. Let o be the end of the student's
token y_i, and z_1..z_j the teacher's tokens that end before o. Then

    F(o) = log q(z_1..z_j) + log sum_{t in I} q(t | z_1..z_j)

The set I contains the teacher's tokens that agree with the text up to o: z_{j+1} if it ends at o; and, where
a student's token y_a ends where z_j does, every token whose spelling begins with y_{a+1}..y_i. The spelling
of a teacher's token is the student's token of the same bytes, or else the student's tokenization of them. If
I is empty, y_i is joined with the next token. A chunk of the student's tokens from o to o' has the advantage
A = F(o') - F(o) - log p(chunk), detached, and the loss is the mean of -A log p(y) over the scored tokens. All
eos tokens of a model count as one event.

With equal tokenizers and one eos token this is `opd.sampled_reverse_kl`. With a student whose tokens are
bytes, the gradient is that of the reverse KL to the teacher's distribution of texts, if the text after
z_{j+1} never changes z_1..z_j. Otherwise the gradient is biased: z depends on the whole text, so that a
boundary in z can reveal what comes next, and other tokenizations of the text are left out. If both models
have the same distribution of texts, the expected gradient should be 0. By enumeration, for a teacher with the
tokens {a, b, ab}, its largest component for a logit is:

    student                 {a, b}   {a, b, ba}   {a, b, bb}
    this                         0         0.18         0.11
    common boundaries alone   0.09         0.20         0.14
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, takewhile

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eval_math import HeldOut
from opd import log_probs, token_logp
from rollout import Rollout, hidden_states, micro_batches, model_inputs
from support import models
from support.cli import BadInput
from support.run_folder import describe_functions

CHUNK = 128  # states whose logits exist at a time, as in opd.opd_backward
NAMES = bytes_to_unicode()  # GPT-2's names of the bytes
BYTES = {character: byte for byte, character in NAMES.items()}
# A text that is changed by normalisation, or by a vocabulary that lacks a byte.
PROBE = " a  b\r\n\te\u0301\u00e9\ufb01 \U0001f600\u65e5 <|endoftext|>"


class Vocabulary:
    """A tokenizer in bytes: the bytes of every id, and the ids of a text, which is not normalised."""

    def __init__(self, tokenizer):
        name = tokenizer.name_or_path
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise BadInput(f"{name} has no fast tokenizer, so its bytes are unknown: name another teacher")
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.of_bytes = '"ByteLevel"' in json.dumps(state["decoder"])
        added = tokenizer.added_tokens_decoder
        self.pieces: dict[int, bytes] = {}  # without control tokens, which have no text
        for token, i in tokenizer.get_vocab().items():
            if i in added:
                piece = b"" if added[i].special else added[i].content.encode()
            elif self.of_bytes and BYTES.keys() >= set(token):
                piece = bytes(BYTES[character] for character in token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                piece = bytes.fromhex(token[3:5])
            else:
                piece = token.replace("\u2581", " ").encode()
            if piece:
                self.pieces[i] = piece
        self.backend = Tokenizer.from_str(json.dumps(unchanging(state)))
        self.backend.encode_special_tokens = True  # their names in a text are plain text
        if self.encode(PROBE) is None:
            what = f"the tokenizer of {name} does not keep every byte of a text"
            raise BadInput(f"{what}, so it cannot be aligned with another: name another model")

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text; None if they do not spell it byte for byte."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids if self.spell(ids) == text.encode() else None

    def split(self, raw: bytes) -> list[bytes]:
        """The pieces that spell these bytes, which may end within a character."""
        text = valid_start(raw)
        rest = raw[len(text.encode()) :]
        if rest and self.of_bytes:
            found = self.backend.model.tokenize("".join(NAMES[byte] for byte in raw))
            return [self.pieces[token.id] for token in found]
        ids = self.encode(text) or []
        return [*(self.pieces[i] for i in ids), *(bytes([byte]) for byte in rest)]

    def spell(self, ids: list[int]) -> bytes:
        return b"".join(self.pieces.get(i, b"") for i in ids)


def unchanging(state: dict) -> dict:
    """A tokenizer's state that does not normalise, truncate or pad, and puts no space in front of a text."""
    normalizer = state["normalizer"] or {}
    parts = [part for part in normalizer.get("normalizers", [normalizer]) if part.get("type") == "Replace"]
    pre_tokenizer = state["pre_tokenizer"] or {}
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    normalizer = {"type": "Sequence", "normalizers": parts}
    return state | {"normalizer": normalizer, "truncation": None, "padding": None}


@dataclass(frozen=True)
class Alignment:
    """What the teacher reads of one response, and where both models can be compared."""

    tokens: list[int]  # z; if the response has ended, then an eos id of the teacher
    # (i, j, I) of each boundary o, as above. The first is (0, 0, []), where F is 0; tokens after the last one
    # are not scored.
    bounds: list[tuple[int, int, list[int]]]
    size: int  # bytes up to the last boundary
    unscored: int  # the student's tokens after it


class Aligner:
    def __init__(self, student: Vocabulary, teacher: Vocabulary):
        self.student, self.teacher = student, teacher
        # The teacher's tokens whose spelling begins with these pieces.
        self.beginning: dict[tuple[bytes, ...], list[int]] = {}
        own = set(student.pieces.values())
        for t, piece in sorted(teacher.pieces.items()):
            spelling = (piece,) if piece in own else tuple(student.split(piece))
            if b"".join(spelling) == piece:
                for n in range(1, len(spelling) + 1):
                    self.beginning.setdefault(spelling[:n], []).append(t)

    def __call__(self, tokens: list[int], ended: bool, ends: list[int], room: int) -> Alignment:
        """Align a student's response with a teacher that has the eos ids `ends` and reads `room` tokens.

        The text ends at the first control token within it, or at the first byte that is not UTF-8.
        """
        written = tokens[: len(tokens) - ended]  # without its end
        pieces = [*takewhile(len, (self.student.pieces.get(i, b"") for i in written))]
        z = self.teacher.encode(valid_start(b"".join(pieces))) or []
        z = z[:room]
        bounds = [(0, 0, []), *self.bounds(pieces, z)]
        scored = bounds[-1][0]
        size = sum(map(len, pieces[:scored]))
        if ended and scored == len(written) and len(z) < room:
            return Alignment([*z, ends[0]], [*bounds, (len(tokens), len(z), ends)], size, 0)
        return Alignment(z, bounds, size, len(tokens) - scored)

    def bounds(self, pieces: list[bytes], z: list[int]) -> list[tuple[int, int, list[int]]]:
        """The boundaries in the text, as in `Alignment`."""
        ends = [0, *accumulate(len(self.teacher.pieces[t]) for t in z)]
        started = {0: 0}  # by offset, the number of student tokens that end there
        found = []
        for i, offset in enumerate(accumulate(map(len, pieces)), 1):
            if offset > ends[-1]:
                break
            started[offset] = i
            j = bisect_left(ends, offset) - 1  # ends[j] < offset <= ends[j + 1]
            a = started.get(ends[j])
            alive = [] if a is None else [*self.beginning.get(tuple(pieces[a:i]), [])]
            if offset == ends[j + 1] and z[j] not in alive:
                alive.append(z[j])
            if alive:
                found.append((i, j, alive))
        return found


def valid_start(raw: bytes) -> str:
    """The text up to the first byte that is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


@torch.no_grad()
def log_sums(
    head: Callable, hidden: Tensor, sets: list[tuple[int, list[int]]], temperature: float
) -> list[float]:
    """The log-probability of each set (n, tokens), predicted by state n of hidden, (N, D): float64 nats."""
    state = torch.tensor([n for n, tokens in sets for _ in tokens], dtype=torch.long)
    token = torch.tensor([t for _, tokens in sets for t in tokens], dtype=torch.long)
    values = torch.zeros(len(state), dtype=torch.double)  # on the CPU: Apple's GPU has no float64
    for start in range(0, len(hidden), CHUNK):
        logp = log_probs(head(hidden[start : start + CHUNK]), temperature)
        here = (state >= start) & (state < start + CHUNK)
        values[here] = logp[state[here] - start, token[here]].cpu().double()
    return [part.logsumexp(0).item() for part in values.split([len(tokens) for _, tokens in sets])]


def gains(
    head: Callable, hidden: Tensor, aligned: list[Alignment], temperature: float
) -> list[tuple[int, float | None]]:
    """(tokens, F(o') - F(o)) of each chunk of these responses; (1, None) for a token that is not scored.

    `hidden`, (N, D), predicts the tokens that the teacher reads, in order.
    """
    sets = []
    first = 0  # the state that predicts the response's first token
    for row in aligned:
        for (_, before, _), (_, after, tokens) in pairwise(row.bounds):
            sets += [(first + j, [row.tokens[j]]) for j in range(before, after)]
            sets.append((first + after, tokens))
        first += len(row.tokens)
    logp = iter(log_sums(head, hidden, sets, temperature))
    found = []
    for row in aligned:
        opened = 0.0  # of the last set
        for (start, before, _), (end, after, _) in pairwise(row.bounds):
            # -opened first: it cancels exactly if the last set was the first of these tokens alone.
            gain = sum(islice(logp, after - before), -opened)
            opened = next(logp)
            found.append((end - start, gain + opened))
        found += [(1, None)] * row.unscored
    return found


def end_or_token_logp(logp: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """log p of each token; of an eos token, that of all eos ids together: (C, V), (C,), (E,) -> (C,)."""
    ends = ends[ends < logp.shape[-1]]
    return torch.where(torch.isin(tokens, ends), logp[:, ends].logsumexp(-1), token_logp(logp, tokens))


def advantages(gain: Tensor, number: Tensor, logp: Tensor) -> Tensor:
    """A of each token, (N,), given F(o') - F(o) of each chunk, and chunk number and log p of each token."""
    return (gain - torch.zeros_like(gain).index_add(0, number, logp))[number]


def student_backward(
    pair,
    hidden: Tensor,  # (N, D) the student's states that predict the tokens
    tokens: Tensor,  # (N,)
    chunks: list[tuple[int, float | None]],  # as `gains` returns them
    normalizer: int,
    temperature: float,
) -> tuple[float, dict[str, Tensor]]:
    """The loss, backpropagated as in `opd.opd_backward`, and statistics, (N,) each."""
    ends = torch.tensor(sorted(pair.eos_ids), device=tokens.device)
    length = torch.tensor([length for length, _ in chunks])
    gain = torch.tensor([gain or 0.0 for _, gain in chunks], dtype=torch.double)
    scored = torch.tensor([float(gain is not None) for _, gain in chunks])
    number = torch.arange(len(chunks)).repeat_interleave(length)  # (N,) of each token's chunk
    # A needs log p of a whole chunk, so logits exist for all chunks that start within the same CHUNK tokens.
    start = length.cumsum(0) - length
    sizes = (start // CHUNK)[number].unique(return_counts=True)[1].tolist()
    leaf = hidden.detach().requires_grad_(hidden.requires_grad)
    loss = torch.zeros((), device=tokens.device)
    parts = []
    for states, chosen, numbers in zip(leaf.split(sizes), tokens.split(sizes), number.split(sizes)):
        logp = log_probs(pair.student_head(states), temperature)
        event_logp = end_or_token_logp(logp, chosen, ends)
        # On the CPU: Apple's GPU has no float64.
        advantage = advantages(gain, numbers, event_logp.detach().cpu().double()) * scored[numbers]
        advantage = advantage.float().to(logp.device)
        part = (-advantage * event_logp).sum() / normalizer
        if part.requires_grad:
            part.backward()
        loss += part.detach()
        logp = logp.detach()
        parts.append((advantage, token_logp(logp, chosen), -(logp.exp() * logp).sum(-1)))
    if leaf.grad is not None:
        hidden.backward(leaf.grad)
    advantage, logp, entropy = map(torch.cat, zip(*parts))
    gap = advantage / length[number].to(logp.device)
    return loss.item(), {
        "reverse_kl": -gap,
        "student_entropy": entropy,
        "student_logp": logp,
        "teacher_logp": logp + gap,
        "scored": scored[number].to(logp.device),
    }


@dataclass(frozen=True)
class Scorer:
    """Scores rollouts as `train.score` does with `sampled_reverse_kl`; the teacher has another tokenizer."""

    align: Aligner
    prompts: dict[tuple[int, ...], list[int]]  # the teacher's ids of a prompt, by the student's ids
    ends: list[int]  # eos ids of the teacher

    def __call__(
        self,
        pair,
        rollouts: Rollout,
        divergence: object = None,  # not used: `sampled` is the only one with which `prepare` is called
        temperature: float = 1.0,
        micro_batch: int = 2048,
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss and statistics of all response tokens.

        `teacher_logp` and `reverse_kl` are estimates: log p + A / length and -A / length, with the length of
        the token's chunk; A is 0 for tokens that are not scored. `scored` is 1 or 0; `chunk_length`, in
        tokens, and `log_ratio_per_byte`, (log q - log p) / bytes, are the same number for every token.
        """
        aligned, read = self.read(pair, rollouts)
        normalizer = max(sum(row.bounds[-1][0] for row in aligned), 1)
        loss, parts = 0.0, []
        for rows in micro_batches(rollouts, micro_batch):
            ids, predicts = model_inputs(read, rows, read.response_mask)
            with torch.no_grad():
                hidden = hidden_states(pair.teacher, ids)[predicts]
            chunks = gains(pair.teacher_head, hidden, [aligned[row] for row in rows], temperature)
            ids, predicts = model_inputs(rollouts, rows, rollouts.response_mask)
            hidden = hidden_states(pair.student, ids)[predicts]
            mask = rollouts.response_mask[rows]
            tokens = rollouts.tokens[rows][mask]
            part_loss, part = student_backward(pair, hidden, tokens, chunks, normalizer, temperature)
            loss += part_loss
            index, position = mask.nonzero(as_tuple=True)
            parts.append(part | {"row": index.new_tensor(rows)[index], "position": position})
        statistics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        count = sum(len(row.bounds) - 1 for row in aligned)
        size = sum(row.size for row in aligned)
        gap = -statistics["reverse_kl"].cpu().double().sum().item()
        means = {"chunk_length": normalizer / max(count, 1), "log_ratio_per_byte": gap / max(size, 1)}
        every = torch.ones_like(statistics["reverse_kl"])
        return loss, statistics | {name: every * value for name, value in means.items()}

    def read(self, pair, rollouts: Rollout) -> tuple[list[Alignment], Rollout]:
        """The responses aligned, and as the teacher reads them."""
        prompts = [self.prompts[tuple(prompt)] for prompt in rollouts.prompts]
        size = models.context_length(pair.teacher.config)
        aligned = []
        for prompt, tokens, mask, ended in zip(
            prompts, rollouts.tokens, rollouts.response_mask, rollouts.finished.tolist()
        ):
            aligned.append(self.align(tokens[mask].tolist(), ended, self.ends, size - len(prompt)))
        tokens = [rollouts.tokens.new_tensor(row.tokens) for row in aligned]
        tokens = pad_sequence(tokens, batch_first=True, padding_value=-1)
        return aligned, Rollout(prompts, tokens, tokens >= 0, logp=None, finished=rollouts.finished)


def coverage(align: Aligner, texts: list[str]) -> tuple[float, float]:
    """The fraction of the student's tokens of these texts that are scored, and the mean chunk length."""
    encoded = map(align.student.encode, texts)
    ids = [tokens for tokens in encoded if tokens is not None]  # without texts whose bytes are not kept
    rows = [align(tokens, False, [], 1 << 30) for tokens in ids]
    scored = sum(row.bounds[-1][0] for row in rows)
    chunks = sum(len(row.bounds) - 1 for row in rows)
    return scored / max(sum(map(len, ids)), 1), scored / max(chunks, 1)


def prepare(
    pair, prompts: list[list[int]], problems: list, test: list, knobs, scorer: Callable | None = None
) -> tuple[Scorer, HeldOut]:
    """The `Scorer`, and the held-out problems as the teacher reads them.

    Raises BadInput if the teacher has no chat template, if a tokenizer does not keep the bytes of a text, or
    if a script has given a `scorer` of its own.
    """
    if scorer:
        what = f"the script's {describe_functions(scorer=scorer)} needs one tokenizer"
        raise BadInput(f"{what}: name a teacher of the student's family")
    tokenizer = pair.teacher_tokenizer or pair.tokenizer
    align = Aligner(Vocabulary(pair.tokenizer), Vocabulary(tokenizer))
    own = models.render_prompts(tokenizer, problems, knobs, [pair.teacher.config])
    own_test = models.render_prompts(tokenizer, test, knobs, [pair.teacher.config])
    texts = [problem.question for problem in problems[:100]]
    share, length = coverage(align, texts)
    what = f"the teacher has another tokenizer and reads the student's text: {share:.1%} of the tokens of"
    print(f"{what} {len(texts)} problems can be scored, in chunks of {length:.2f} tokens", flush=True)
    ends = models.eos_ids(tokenizer, pair.teacher)
    found = Scorer(align, dict(zip(map(tuple, prompts), own)), sorted(ends))
    return found, HeldOut(test, own_test, tokenizer, ends)
