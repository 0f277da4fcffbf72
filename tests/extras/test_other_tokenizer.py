"""A teacher with another tokenizer: alignment by bytes, the gradient by enumeration, its bias, and a run."""

import math
import shutil
import sys
from itertools import pairwise, product

import pytest
import torch
from helpers import pair_of, renumbered, tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import opd
import train
from extras import other_tokenizer
from extras.other_tokenizer import Aligner, Alignment, Scorer, Vocabulary, advantages
from rollout import Rollout
from support import data, run_folder, toy
from support.cli import BadInput

END = "<|im_end|>"
NAMES = bytes_to_unicode()


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def of_bytes(merges="", digits=None, normalizer=None):
    """A byte-level tokenizer with these merges, such as "t h,th e"; `digits` are in groups of so many."""
    merges = [tuple(pair.split()) for pair in merges.split(",") if pair]
    tokens = [*NAMES.values(), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    if digits:
        groups = pre_tokenizers.Split(Regex(f"[0-9]{{1,{digits}}}|[^0-9]+"), "isolated")
        plain = pre_tokenizers.Sequence([groups, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.pre_tokenizer, tokenizer.decoder = plain, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return wrapped(tokenizer)


def of_sentences(byte_fallback=True):
    """Of SentencePiece's kind: a mark for spaces, one in front of a text, bytes for what it does not know."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=byte_fallback, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    return wrapped(tokenizer)


def of_metaspace():
    tokenizer = of_sentences().backend_tokenizer
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrapped(tokenizer)


def aligner(student, teacher):
    return Aligner(Vocabulary(student), Vocabulary(teacher))


SPACE, NEWLINE, RETURN = NAMES[32], NAMES[10], NAMES[13]
KINDS = {
    "bytes": of_bytes(),
    "merged": of_bytes(f"t h,th e,{SPACE} the,{RETURN} {NEWLINE},. {NEWLINE},{SPACE} {SPACE}"),
    "nfc": of_bytes("a b", digits=3, normalizer=normalizers.NFC()),
    "sentencepiece": of_sentences(),
    "metaspace": of_metaspace(),
}
TEXTS = [
    "the lathe",
    "  the  ab",
    "a\r\nb.\n\n",
    "\U0001f600 \U0001f468\u200d\U0001f469",
    "e\u0301 \u00e9 \ufb01 \u65e5\u672c",
    "123 4567",
    "a<|im_end|>b",
    "",
]


@pytest.mark.parametrize("student, teacher", product(KINDS, KINDS))
def test_boundaries_are_byte_offsets(student, teacher):
    """Every token is in a chunk, and what both sides have read at a boundary is the same text."""
    align = aligner(KINDS[student], KINDS[teacher])
    for text in TEXTS:
        tokens = align.student.encode(text)
        row = align(tokens, False, [], 1000)
        z = row.tokens
        assert align.teacher.spell(z) == text.encode()
        assert row.bounds[-1][1] == max(len(z) - 1, 0) and set(z[-1:]) <= set(row.bounds[-1][2])
        assert row.bounds[-1][0] == len(tokens) and row.size == len(text.encode())
        for i, j, alive in row.bounds:
            read, heard = align.student.spell(tokens[:i]), align.teacher.spell(z[:j])
            if alive:
                rest = read[len(heard) :]
                assert read.startswith(heard) and rest
                assert all(align.teacher.pieces[t].startswith(rest) for t in alive)
            else:
                assert heard.startswith(read)


DIGITS = {1: of_bytes(digits=1), 3: of_bytes("1 2,12 3", digits=3)}


START = [(0, 0, []), (1, 0, ["1", "12", "123"]), (2, 0, ["12", "123"])]


@pytest.mark.parametrize(
    "student, teacher, text, bounds",
    [
        (1, 3, "1234", [*START, (3, 0, ["123"]), (4, 1, ["4"])]),
        (1, 3, "12", START),  # cut by the horizon: the teacher may still mean 123
        (3, 1, "1234", [(0, 0, []), (1, 2, ["3"]), (2, 3, ["4"])]),
    ],
)
def test_digits_grouped_on_one_side(student, teacher, text, bounds):
    align = aligner(DIGITS[student], DIGITS[teacher])
    row = align(align.student.encode(text), False, [], 1000)
    spelled = [(i, j, sorted(align.teacher.spell([t]).decode() for t in alive)) for i, j, alive in row.bounds]
    assert spelled == bounds


def test_a_tokenizer_saved_with_truncation_and_padding_reads_the_whole_text():
    tokenizer = of_bytes("t h")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    assert Vocabulary(tokenizer).encode("the lathe") == Vocabulary(of_bytes("t h")).encode("the lathe")


def test_what_is_not_scored():
    align = aligner(KINDS["bytes"], KINDS["merged"])
    own = align.student.encode("a\U0001f600")
    control = KINDS["bytes"].eos_token_id
    for tokens, ended, scored, end in [
        (own, False, 5, False),
        (own[:3], False, 1, False),  # cut within a character
        ([*own, control], True, 6, True),
        ([*own[:3], control], True, 1, False),  # the text before this end is no text
        ([control], True, 1, True),
        ([own[0], control, own[0]], False, 1, False),  # a control token within the text
    ]:
        row = align(tokens, ended, [7, 8], 1000)
        assert row.bounds[-1][0] == scored and (row.tokens[-1:] == [7]) == end
        assert (row.bounds[-1][2] == [7, 8]) == end
    row = align([*own, control], True, [7, 8], 3)  # no room in the teacher's context
    assert len(row.tokens) == 3 and row.bounds[-1][0] == 3


def canonical(tokenizer, texts, prompts):
    """Rollouts whose tokens are the tokenizer's own of these texts, each with an end but the last."""
    ids = [Vocabulary(tokenizer).encode(text) + [tokenizer.eos_token_id] for text in texts]
    ids[-1].pop()
    width = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    finished = torch.tensor([True] * (len(ids) - 1) + [False])
    return Rollout(prompts, tokens, mask, None, finished)


def scorer_of(student, teacher, prompts, ends):
    given = {tuple(prompt): prompt for prompt in prompts}
    return Scorer(aligner(student, teacher), given, ends)


def gradient(pair, score, rollouts, **options):
    for master in pair.masters.values():
        master.grad = None
    loss, statistics = score(pair, rollouts, **options)
    return loss, statistics, torch.cat([p.grad.flatten() for p in pair.masters.values()])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_the_same_tokenizer_it_is_the_sampled_reverse_kl_to_the_last_bit(temperature):
    tokenizer = of_bytes(f"t h,th e,{SPACE} the", normalizer=normalizers.NFC())
    end, size = tokenizer.eos_token_id, len(tokenizer)
    student, teacher = (tiny(seed, vocab_size=size, max_position_embeddings=256) for seed in (0, 1))
    pair = pair_of(student, teacher, ends=(end,))
    prompts = [[5, 6, 7], [8], [9, 4]]
    texts = ["the athe" * 40, " the\r\n", "lathe th"]  # the first has more than 128 tokens
    rollouts = canonical(tokenizer, texts, prompts)
    assert rollouts.response_mask[0].sum() > other_tokenizer.CHUNK
    score = scorer_of(tokenizer, tokenizer, prompts, [end])
    how = {"temperature": temperature, "micro_batch": 24}
    loss, found, grad = gradient(pair, score, rollouts, **how)
    same = {"divergence": opd.sampled_reverse_kl}
    expected_loss, expected, expected_grad = gradient(pair, train.score, rollouts, **how, **same)
    assert loss == expected_loss and torch.equal(grad, expected_grad) and grad.abs().max() > 1e-3
    for name in ("student_logp", "student_entropy", "row", "position"):
        assert torch.equal(found[name], expected[name])
    assert torch.allclose(found["teacher_logp"], expected["teacher_logp"])
    assert found["scored"].min() == 1 and found["chunk_length"][0] == 1
    bytes_ = sum(map(len, texts))
    gap = (expected["teacher_logp"] - expected["student_logp"]).sum().item()
    assert found["log_ratio_per_byte"][0].item() == pytest.approx(gap / bytes_, rel=1e-5)


def letters(tokens, merges=()):
    """A tokenizer of a few letters and an end, which has the last id."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


SMALL = letters("ab")
LARGE = letters(["a", "b", "ab"], [("a", "b")])


@pytest.fixture
def small_probe(monkeypatch):
    monkeypatch.setattr(other_tokenizer, "PROBE", "abba")


def log_q(model, prompt, tokens):
    """The model's log-probability of a sequence, and of what may follow it."""
    logp = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    each = [logp[len(prompt) - 1 + n, t] for n, t in enumerate(tokens)]
    return sum(each, torch.tensor(0.0)), logp[-1]


def test_with_a_student_of_bytes_the_gradient_is_that_of_the_reverse_kl_of_texts(small_probe):
    """Student {a, b, 2 ends}, teacher {a, b, ab, 2 ends}, up to three tokens: all 22 responses, weighted.

    The teacher's probability that a text begins with s is that of all its tokenizations that cover s, which
    are the tokenizer's own.
    """
    student, teacher = tiny(0, vocab_size=4), tiny(1, vocab_size=5, eos_token_id=4)
    pair = train.make_pair(student, teacher.requires_grad_(False), None, None, {2, 3})
    prompt, ends = [1, 0], [3, 4]
    score = scorer_of(SMALL, LARGE, [prompt], ends)
    encode = Vocabulary(LARGE).encode
    responses = [(*s, end) for end in (2, 3) for n in range(3) for s in product((0, 1), repeat=n)]
    responses += list(product((0, 1), repeat=3))
    total, mass = 0, 0.0
    for response in responses:
        tokens = torch.tensor([response])
        finished = torch.tensor([response[-1] > 1])
        rollouts = Rollout([prompt], tokens, torch.ones_like(tokens, dtype=torch.bool), None, finished)
        _, statistics, grad = gradient(pair, score, rollouts)
        p = statistics["student_logp"].sum().exp().item()
        total += p * len(response) * grad
        mass += p
    assert mass == pytest.approx(1, abs=1e-5)

    def begins(text, ended=False):
        """log q of a text as a beginning, or as the whole of a response."""
        if ended or not text:
            before, after = log_q(teacher, prompt, encode(text))
            return before + after[ends].logsumexp(0) if ended else before
        found = []
        for tokens in product((0, 1, 2), repeat=len(text)):
            for n in range(1, len(text) + 1):
                spelled = "".join(("a", "b", "ab")[t] for t in tokens[:n])
                shorter = "".join(("a", "b", "ab")[t] for t in tokens[: n - 1])
                if spelled.startswith(text) and len(shorter) < len(text) and encode(spelled) == [*tokens[:n]]:
                    found.append(tokens[:n])
        return torch.stack([log_q(teacher, prompt, [*tokens])[0] for tokens in set(found)]).logsumexp(0)

    loss = 0
    for n in range(3):
        for before in product((0, 1), repeat=n):
            text = "".join("ab"[t] for t in before)
            reached, logp = log_q(student, prompt, [*before])
            target = torch.stack([begins(text + "a"), begins(text + "b"), begins(text, ended=True)])
            logp = torch.cat([logp[:2], logp[2:].logsumexp(0, keepdim=True)])
            kl = (logp.exp() * (logp - (target - begins(text)))).sum()
            loss += reached.exp().detach() * kl
    for master in pair.masters.values():
        master.grad = None
    loss.backward()
    exact = torch.cat([p.grad.flatten() for p in pair.masters.values()])
    assert exact.abs().max() > 1e-2 and (total - exact).abs().max() < 2e-6


def random_texts(longest):
    """A random distribution of texts over {a, b} with at most `longest` letters."""
    texts = ["".join(text) for n in range(longest + 1) for text in product("ab", repeat=n)]
    weights = torch.randn(len(texts), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return dict(zip(texts, weights.softmax(0).tolist()))


def next_token(texts, encode, size):
    """The next token's distribution after each beginning of a text, for a model of these texts."""
    mass = {}
    for text, p in texts.items():
        tokens = (*encode(text), size)
        for n, token in enumerate(tokens):
            after = mass.setdefault(tokens[:n], [0.0] * (size + 1))
            after[token] += p
    return {before: [p / sum(after) for p in after] for before, after in mass.items()}


def log(p):
    return math.log(p) if p else -math.inf


def expected_gradient(student, teacher, texts, only_common):
    """The largest expected gradient of a student's logit where both models have these texts."""
    align = aligner(student, teacher)
    sizes = len(align.student.pieces), len(align.teacher.pieces)
    p, q = (next_token(texts, v.encode, n) for v, n in zip((align.student, align.teacher), sizes))
    gradients = {before: torch.zeros(sizes[0] + 1, dtype=torch.double) for before in p}
    for text, weight in texts.items():
        tokens = [*align.student.encode(text), sizes[0]]
        row = align(tokens, True, [sizes[1]], 1000)
        if only_common:
            ends = {len(align.teacher.spell(row.tokens[:j])): j for j in range(len(row.tokens))}
            offsets = [len(align.student.spell(tokens[:i])) for i in range(len(tokens))]
            bounds = [(i, ends[o], []) for i, o in enumerate(offsets) if o in ends]
            row = Alignment(row.tokens, [*bounds, row.bounds[-1]], 0, 0)
        z = row.tokens
        rest = [log(sum(q[(*z[:j],)][t] for t in alive)) if alive else 0.0 for _, j, alive in row.bounds]
        gain = []
        for n in range(1, len(rest)):
            read = range(row.bounds[n - 1][1], row.bounds[n][1])
            gain.append(sum(log(q[(*z[:k],)][z[k]]) for k in read) + rest[n] - rest[n - 1])
        logp = [log(p[(*tokens[:i],)][token]) for i, token in enumerate(tokens)]
        number = [n for n, (start, end) in enumerate(pairwise(row.bounds)) for _ in range(start[0], end[0])]
        gain, logp = (torch.tensor(values, dtype=torch.double) for values in (gain, logp))
        found = advantages(gain, torch.tensor(number), logp).tolist()
        for i, (advantage, token) in enumerate(zip(found, tokens)):
            before = (*tokens[:i],)
            gradients[before] += weight * advantage * torch.tensor(p[before])
            gradients[before][token] -= weight * advantage
    return max(g.abs().max().item() for g in gradients.values())


@pytest.mark.parametrize(
    "merges, bias, of_common", [([], 0, 0.087), ([("b", "a")], 0.183, 0.200), ([("b", "b")], 0.111, 0.137)]
)
def test_bias_where_both_models_have_the_same_distribution(small_probe, merges, bias, of_common):
    """The expected gradient should be 0. It is for a student of bytes, and not where tokens straddle.

    Chunks between common boundaries alone are biased in each case.
    """
    student = letters(["a", "b", *map("".join, merges)], merges)
    texts = random_texts(4)
    found = [expected_gradient(student, LARGE, texts, only_common) for only_common in (False, True)]
    assert found[0] == pytest.approx(bias, abs=5e-4 if bias else 1e-12)
    assert found[1] == pytest.approx(of_common, abs=5e-4)


@pytest.mark.parametrize("merges", ["", "{0} {1}"])
def test_no_bias_where_tokens_of_the_teacher_end_within_a_character(merges):
    """Four bytes F0 9F 98 80; the teacher has F0 9F 98, which is no text that a student could be given."""
    first, second, third, _ = (NAMES[byte] for byte in "\U0001f600".encode())
    teacher = of_bytes(f"{first} {second},{first + second} {third}")
    texts = {"": 0.2, "\U0001f600": 0.3, "\U0001f601": 0.4, "\U0001f642": 0.01, "\U0001f600a": 0.09}
    student = of_bytes(merges.format(first, second))
    assert expected_gradient(student, teacher, texts, only_common=False) < 1e-12


def run(out, flags, monkeypatch):
    """The rows of a run of two steps, and what its teacher answered."""
    flags = f"--preset toy --divergence sampled --steps 2 --batch-size 8 --save-every 0 --out {out} {flags}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    answers = data.read_jsonl(out / "eval_teacher.jsonl")
    return run_folder.read_csv(out / "metrics.csv"), [answer["response"] for answer in answers]


def test_a_teacher_with_renumbered_tokens_trains_and_is_evaluated_like_the_original(
    world, tmp_path, monkeypatch, capsys
):
    other = renumbered(world, tmp_path / "other")
    flags = "--schedule full --max-new-tokens 20 --eval-limit 4 --eval-temperature 0 --show-every 1"
    same, same_answers = run(tmp_path / "same", flags, monkeypatch)
    assert "another tokenizer" not in capsys.readouterr().out
    rows, answers = run(tmp_path / "run", f"{flags} --teacher {other}", monkeypatch)
    printed = capsys.readouterr().out
    assert "the teacher has another tokenizer" in printed and "100.0% of the tokens" in printed
    assert answers == same_answers and len(set(answers)) == 4
    for row, expected in zip(rows, same):
        assert float(row["scored"]) > 0.95 and 1 <= float(row["chunk_length"]) < 1.05
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), abs=0.02)
        assert float(row["log_ratio_per_byte"]) < 0 < float(row["reverse_kl"])


def bad(kind, world, folder):
    """A teacher whose tokenizer cannot be used."""
    shutil.copytree(world / "teacher", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "template":
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink()
    elif kind == "bytes":  # it does not know what it was not trained on
        tokenizer = of_sentences(byte_fallback=False)
        tokenizer.chat_template = toy.TEMPLATE
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "kind, divergence, line",
    [
        ("ids", "reverse_kl", r"entries differ\): name another teacher"),
        ("ids", "jsd", r"entries differ\): name another teacher"),
        ("ids", "forward_kl", r"entries differ\): name another teacher"),
        ("template", "sampled", "has no chat template"),
        ("bytes", "sampled", "does not keep every byte of a text"),
    ],
)
def test_refused_in_one_line(kind, divergence, line, world, tmp_path, monkeypatch):
    bad(kind, world, tmp_path / "bad")
    out = tmp_path / "run"
    command = f"train.py --preset toy --teacher {tmp_path}/bad --divergence {divergence} --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(BadInput, match=line) as error:
        train.main()
    assert "\n" not in str(error.value) and not out.exists()


def test_texts_whose_bytes_are_not_kept_are_not_counted(small_probe):
    align = Aligner(Vocabulary(SMALL), Vocabulary(LARGE))
    assert align.student.encode("\u2581") is None
    assert other_tokenizer.coverage(align, ["ab", "\u2581"])[0] == 1


def test_an_end_beyond_the_head_is_no_end():
    logp = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0]]), dim=-1)
    found = other_tokenizer.end_or_token_logp(logp, torch.tensor([1]), torch.tensor([1, 7]))
    assert found == logp[:, 1]
