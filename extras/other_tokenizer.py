"""A teacher with another tokenizer: it reads the student's text, and scores it where student tokens end.

The student's tokens y spell a text; z are the teacher's tokens of the same text, after the teacher's own
prompt. F(o) estimates the teacher's log-probability of the first o bytes. Let o be the end of the student's
token y_i, and z_1..z_j the teacher's tokens that end before o. Then

    F(o) = log q(z_1..z_j) + log sum_{t in I} q(t | z_1..z_j)

The set I contains the teacher's tokens that agree with the text up to o: z_{j+1} if it ends at o and, if a
student's token y_a ends where z_j does, every token whose spelling begins with y_{a+1}..y_i. The spelling of
a teacher's token is the student's token of the same bytes, or else the student's tokenization of them. If I
is empty, y_i is joined with the next token. A chunk of the student's tokens from o to o' has the advantage
A = F(o') - F(o) - log p(chunk), detached, and the loss is the mean of -A log p(y) over the scored tokens. All
eos tokens of a model count as one event.

With equal tokenizers and one eos token this is `opd.sampled_reverse_kl`. With a student whose tokens are
bytes, the gradient is that of the reverse KL to the teacher's distribution of texts, if the teacher's tokens
up to a place do not depend on the text after the next token. Otherwise the gradient is biased: z depends on
the whole text, so that a boundary in z can reveal what comes next, and other tokenizations of the text are
left out. If both models have the same distribution of texts, the expected gradient should be 0; its largest
component for a logit is, by enumeration for a teacher with the tokens {a, b, ab}:

    student                 {a, b}   {a, b, ba}   {a, b, bb}
    this                         0         0.18         0.11
    common boundaries alone   0.09         0.20         0.14
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eval_math import HeldOut
from opd import log_probs, token_logp
from rollout import Rollout, hidden_states, micro_batches, model_inputs
from support import models
from support.cli import BadInput
from support.prompts import render

CHUNK = 128  # states whose logits exist at a time, as in opd.opd_backward
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's names of the bytes
# A text that is changed by normalisation, or by a vocabulary that lacks a byte.
PROBE = " a  b\r\n\te\u0301\u00e9\ufb01 \U0001f600\u65e5 <|endoftext|>"


class Vocabulary:
    """A tokenizer in bytes: the bytes of every id, and the ids of a text, which is not normalised."""

    def __init__(self, tokenizer):
        name = tokenizer.name_or_path
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise BadInput(f"{name} has no fast tokenizer, so its bytes are unknown: name another teacher")
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        decoder = json.dumps(state["decoder"])
        of_bytes = '"ByteLevel"' in decoder
        added = tokenizer.added_tokens_decoder
        self.pieces: dict[int, bytes] = {}  # without control tokens, which have no text
        for token, i in tokenizer.get_vocab().items():
            if i in added:
                piece = b"" if added[i].special else added[i].content.encode()
            elif of_bytes and BYTES.keys() >= set(token):
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

    tokens: list[list[int]]  # z, one id each; if the response has ended, then all eos ids of the teacher
    # (i, j, I): after i of the student's tokens F is log q(z_1..z_j), plus log sum_{t in I} q(t) if I is not
    # empty. The first is (0, 0, []); tokens after the last one are not scored.
    bounds: list[tuple[int, int, list[int]]]
    size: int  # bytes up to the last boundary


class Aligner:
    def __init__(self, student: Vocabulary, teacher: Vocabulary):
        self.student, self.teacher = student, teacher
        own = set(student.pieces.values())
        spellings = [((piece,), t) for t, piece in teacher.pieces.items() if piece in own]
        others = [t for t, piece in teacher.pieces.items() if piece not in own and is_text(piece)]
        texts = [teacher.pieces[t].decode() for t in others]
        for t, encoded in zip(others, student.backend.encode_batch(texts, add_special_tokens=False)):
            if student.spell(encoded.ids) == teacher.pieces[t]:
                spellings.append((tuple(student.pieces[i] for i in encoded.ids), t))
        self.spellings = sorted(spellings)  # (the student's pieces of a teacher's token, the token)

    def beginning_with(self, pieces: tuple[bytes, ...]) -> list[int]:
        """The teacher's tokens whose spelling begins with these pieces."""
        after = (*pieces[:-1], pieces[-1] + b"\0")  # the next piece in order
        found = self.spellings[bisect_left(self.spellings, (pieces,)) : bisect_left(self.spellings, (after,))]
        return [t for _, t in found]

    def __call__(self, tokens: list[int], ended: bool, ends: list[int], room: int) -> Alignment:
        """Align a student's response with a teacher that has the eos ids `ends` and reads `room` tokens.

        The text ends at the first control token within it, or at the first byte that is not UTF-8.
        """
        pieces = [self.student.pieces.get(i, b"") for i in tokens[: len(tokens) - ended]]
        until = pieces.index(b"") if b"" in pieces else len(pieces)
        text = valid_start(b"".join(pieces[:until]))
        z = self.teacher.encode(text)
        whole = until == len(pieces) and text.encode() == b"".join(pieces) and z is not None
        z = [[t] for t in (z or [])[:room]]
        bounds = [(0, 0, []), *self.bounds(pieces[:until], [t for [t] in z])]
        size = sum(map(len, pieces[: bounds[-1][0]]))
        if ended and whole and len(z) < room:
            return Alignment([*z, ends], [*bounds, (len(tokens), len(z) + 1, [])], size)
        return Alignment(z, bounds, size)

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
            alive = [] if a is None else self.beginning_with(tuple(pieces[a:i]))
            if offset == ends[j + 1] and z[j] not in alive:
                alive.append(z[j])
            if alive == [z[j]]:
                found.append((i, j + 1, []))
            elif alive:
                found.append((i, j, alive))
        return found


def is_text(piece: bytes) -> bool:
    return valid_start(piece).encode() == piece


def valid_start(raw: bytes) -> str:
    """The text up to the first byte that is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


@torch.no_grad()
def log_sums(head: Callable, hidden: Tensor, sets: list[tuple[int, list[int]]], temperature: float) -> list:
    """The log-probability of each set (n, tokens), predicted by state n of hidden, (N, D): float64 nats."""
    # On the CPU: Apple's GPU has no float64.
    state = torch.tensor([n for n, tokens in sets for _ in tokens], dtype=torch.long)
    token = torch.tensor([t for _, tokens in sets for t in tokens], dtype=torch.long)
    owner = torch.tensor([i for i, (_, tokens) in enumerate(sets) for _ in tokens], dtype=torch.long)
    values = torch.zeros(len(state), dtype=torch.double)
    for start in range(0, len(hidden), CHUNK):
        logp = log_probs(head(hidden[start : start + CHUNK]), temperature)
        here = (state >= start) & (state < start + CHUNK)
        values[here] = logp[state[here] - start, token[here]].cpu().double()
    top = values.new_full((len(sets),), -torch.inf).scatter_reduce(0, owner, values, "amax")
    total = torch.zeros_like(top).index_add(0, owner, (values - top[owner]).exp())
    return (top + total.log()).tolist()


def gains(head: Callable, hidden: Tensor, aligned: list[Alignment], temperature: float) -> list[list[float]]:
    """F(o') - F(o) of each chunk of each response; `hidden` predicts their teacher's tokens, in order."""
    firsts = [0, *accumulate(len(row.tokens) for row in aligned)]
    sets = [(n, tokens) for n, tokens in enumerate(tokens for row in aligned for tokens in row.tokens)]
    for first, row in zip(firsts, aligned):
        sets += [(first + j, tokens) for _, j, tokens in row.bounds if tokens]
    values = log_sums(head, hidden, sets, temperature)
    opened = iter(values[firsts[-1] :])
    found = []
    for first, row in zip(firsts, aligned):
        rest = [next(opened) if tokens else 0.0 for _, _, tokens in row.bounds]
        closed = [sum(values[first + a[1] : first + b[1]]) for a, b in pairwise(row.bounds)]
        found.append([c + after - before for c, before, after in zip(closed, rest, rest[1:])])
    return found


def advantages(row: Alignment, gain: list[float], logp: list[float]) -> tuple[list[float], list[int]]:
    """For each token of a response the advantage A of its chunk and the chunk's length; 0 if not scored."""
    advantage, length = [0.0] * len(logp), [0] * len(logp)
    for (start, _, _), (end, _, _), value in zip(row.bounds, row.bounds[1:], gain):
        advantage[start:end] = [value - sum(logp[start:end])] * (end - start)
        length[start:end] = [end - start] * (end - start)
    return advantage, length


def end_or_token_logp(logp: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """log p of each token; of an eos token, that of all eos ids together: (C, V), (C,), (E,) -> (C,)."""
    ends = ends[ends < logp.shape[-1]]
    return torch.where(torch.isin(tokens, ends), logp[:, ends].logsumexp(-1), token_logp(logp, tokens))


@torch.no_grad()
def student_statistics(head: Callable, hidden: Tensor, tokens: Tensor, ends: Tensor, temperature: float):
    """(N, D), (N,) -> `end_or_token_logp`, and log p and entropy as in `opd.token_statistics`, (N,) each."""
    parts = []
    for states, chosen in zip(hidden.split(CHUNK), tokens.split(CHUNK)):
        logp = log_probs(head(states), temperature)
        entropy = -(logp.exp() * logp).sum(-1)
        parts.append((end_or_token_logp(logp, chosen, ends), token_logp(logp, chosen), entropy))
    return tuple(map(torch.cat, zip(*parts)))


def weighted_backward(
    head: Callable,
    hidden: Tensor,
    tokens: Tensor,
    ends: Tensor,
    weight: Tensor,
    normalizer: int,
    temperature: float,
) -> float:
    """The sum of -weight log p(y) / normalizer, backpropagated chunk by chunk as in `opd.opd_backward`."""
    cut = hidden.detach().requires_grad_(hidden.requires_grad)
    total = 0.0
    for states, chosen, factor in zip(cut.split(CHUNK), tokens.split(CHUNK), weight.split(CHUNK)):
        logp = log_probs(head(states), temperature)
        loss = (-factor * end_or_token_logp(logp, chosen, ends)).sum() / normalizer
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    if cut.grad is not None:
        hidden.backward(cut.grad)
    return total


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
        aligned = self.aligned(pair, rollouts)
        read = teacher_rollouts([self.prompts[tuple(p)] for p in rollouts.prompts], aligned, rollouts.tokens)
        normalizer = max(sum(row.bounds[-1][0] for row in aligned), 1)
        loss, parts = 0.0, []
        for rows in micro_batches(rollouts, micro_batch):
            ids, predicts = model_inputs(read, rows, read.response_mask)
            with torch.no_grad():
                hidden = hidden_states(pair.teacher, ids)[predicts]
            of_rows = [aligned[row] for row in rows]
            gain = gains(pair.teacher_head, hidden, of_rows, temperature)
            part_loss, part = self.student_part(pair, rollouts, rows, of_rows, gain, normalizer, temperature)
            loss += part_loss
            parts.append(part)
        statistics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        chunks = sum(len(row.bounds) - 1 for row in aligned)
        size = sum(row.size for row in aligned)
        every = torch.ones_like(statistics["reverse_kl"])
        ratio = -statistics["reverse_kl"].cpu().double().sum().item() / max(size, 1)
        more = {"chunk_length": every * normalizer / max(chunks, 1), "log_ratio_per_byte": every * ratio}
        return loss, statistics | more

    def aligned(self, pair, rollouts: Rollout) -> list[Alignment]:
        found = []
        for i, prompt in enumerate(rollouts.prompts):
            tokens = rollouts.tokens[i][rollouts.response_mask[i]].tolist()
            room = models.context_length(pair.teacher.config) - len(self.prompts[tuple(prompt)])
            found.append(self.align(tokens, bool(rollouts.finished[i]), self.ends, room))
        return found

    def student_part(self, pair, rollouts, rows, aligned, gain, normalizer, temperature):
        """The student's pass over a micro-batch: its share of the loss, and its statistics."""
        mask = rollouts.response_mask[rows]
        ids, predicts = model_inputs(rollouts, rows, rollouts.response_mask)
        row, position = mask.nonzero().T
        tokens = rollouts.tokens[rows][mask]
        hidden = hidden_states(pair.student, ids)[predicts]
        ends = torch.tensor(sorted(pair.eos_ids), device=tokens.device)
        scored_logp, logp, entropy = student_statistics(
            pair.student_head, hidden.detach(), tokens, ends, temperature
        )
        by_row = [part.tolist() for part in scored_logp.split(mask.sum(1).tolist())]
        pairs = [advantages(*each) for each in zip(aligned, gain, by_row)]
        advantage = logp.new_tensor([value for values, _ in pairs for value in values])
        length = logp.new_tensor([value for _, values in pairs for value in values])
        loss = weighted_backward(pair.student_head, hidden, tokens, ends, advantage, normalizer, temperature)
        gap = advantage / length.clamp_min(1)
        return loss, {
            "reverse_kl": -gap,
            "student_entropy": entropy,
            "student_logp": logp,
            "teacher_logp": logp + gap,
            "scored": (length > 0).float(),
            "row": row.new_tensor(rows)[row],
            "position": position,
        }


def teacher_rollouts(prompts: list[list[int]], aligned: list[Alignment], like: Tensor) -> Rollout:
    """The responses as the teacher reads them, an end as its first eos id, which predicts nothing."""
    width = max(len(row.tokens) for row in aligned)
    padded = [[t[0] for t in row.tokens] + [0] * (width - len(row.tokens)) for row in aligned]
    mask = [[True] * len(row.tokens) + [False] * (width - len(row.tokens)) for row in aligned]
    mask = torch.tensor(mask, dtype=torch.bool, device=like.device)
    return Rollout(prompts, like.new_tensor(padded), mask, logp=None, finished=None)


def coverage(
    align: Aligner, encode: Callable[[str], list[int] | None], texts: list[str]
) -> tuple[float, float]:
    """The fraction of the student's tokens of these texts that are scored, and the mean chunk length."""
    encoded = (encode(text) for text in texts)
    ids = [tokens for tokens in encoded if tokens is not None]  # without texts whose bytes are not kept
    rows = [align(tokens, False, [], 1 << 30) for tokens in ids]
    scored = sum(row.bounds[-1][0] for row in rows)
    chunks = sum(len(row.bounds) - 1 for row in rows)
    return scored / max(sum(map(len, ids)), 1), scored / max(chunks, 1)


def prepare(pair, prompts: list[list[int]], problems: list, test: list, knobs):
    """The `Scorer`, and the held-out problems as the teacher reads them.

    Raises BadInput if the teacher has no chat template, or if a tokenizer does not keep the bytes of a text.
    """
    tokenizer = pair.teacher_tokenizer or pair.tokenizer
    align = Aligner(Vocabulary(pair.tokenizer), Vocabulary(tokenizer))
    own = render(tokenizer, problems, knobs.instruction, knobs.system_prompt)
    own_test = render(tokenizer, test, knobs.instruction, knobs.system_prompt)
    models.check_context([pair.teacher.config], own + own_test, knobs.max_new_tokens)
    texts = [problem.question for problem in problems[:100]]
    share, length = coverage(align, align.student.encode, texts)
    what = f"the teacher has another tokenizer and reads the student's text: {share:.1%} of the tokens of"
    print(f"{what} {len(texts)} problems can be scored, in chunks of {length:.2f} tokens", flush=True)
    ends = models.eos_ids(tokenizer, pair.teacher)
    scorer = Scorer(align, dict(zip(map(tuple, prompts), own)), sorted(ends))
    return scorer, HeldOut(test, own_test, tokenizer, ends)
