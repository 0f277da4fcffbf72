"""Prompts as ids, rendered by the tokenizer and read back to check them; and answers as text.

A prompt contains control tokens, such as <|im_end|> or <think>, only where the chat template writes them: in
a problem they are plain text. Added tokens that consist of spaces alone are not control tokens.

A prompt is correct if its ids, decoded, give its text. Spaces and control characters may differ (a leading
space, a token that swallows a line break), and so may compatible forms of a character (NFKC) and a bos token
at the start.
"""

import copy
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from support.cli import BadInput

MARK = "\ue000"  # stands for the user's text in a template; a private-use character that no text contains
# Replaces a function of templates that gives today's date: prompts must not change from day to day.
DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
# Of jinja2, of transformers where none of several templates is the default, and of what a template computes.
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
# A base model, which has no chat template, reads these examples before each problem, in the same layout.
FEW_SHOT = r"""Question: A box holds 12 pencils. Mia buys 3 boxes and gives away 7. How many has she left?
Answer: Mia buys 3 * 12 = 36 pencils. She has 36 - 7 = 29 left. The final answer is \boxed{29}.

Question: What is $\frac{1}{2} + \frac{1}{3}$?
Answer: Over 6 this is $\frac{3}{6} + \frac{2}{6}$. The final answer is \boxed{\frac{5}{6}}.

"""
DROP_SYSTEM = "drop --system-prompt, or put its text into --instruction"
SPACES = " \t\r\n\u2581"  # the last one is SentencePiece's sign for a space


def render(
    tokenizer,
    problems: Sequence,
    instruction: str,
    system_prompt: str = "",
    thinking: bool = False,
    few_shot: bool = False,
) -> list[list[int]]:
    """The prompt of each problem, as the ids that both student and teacher get.

    Without a chat template the prompt is plain text after two examples. Raises BadInput for such a tokenizer
    without `few_shot`, if the template refuses, omits or changes a message, or if the ids do not give the
    text back.
    """
    name = tokenizer.name_or_path
    chat = tokenizer.chat_template is not None
    if not chat and not few_shot:
        raise BadInput(f"the tokenizer of {name} has no chat template: give an instruction-tuned model")

    if not chat and (system_prompt or thinking):
        flag = "--system-prompt" if system_prompt else "--thinking"
        raise BadInput(f"the tokenizer of {name} has no chat template, which {flag} needs: drop it")

    def text_around(content: str) -> str:
        if not chat:
            return f"{FEW_SHOT}Question: {content}\nAnswer:"
        return apply_template(tokenizer, content, system_prompt, thinking)

    if not chat and instruction:
        print(f"{name} has no chat template: two worked examples take the place of --instruction", flush=True)
    encode = Encoder(tokenizer, text_around, bos=not chat)
    if thinking and "enable_thinking" not in tokenizer.get_chat_template():
        print(f"the chat template of {name} has no switch: --thinking changes nothing", flush=True)
    prompts, texts = [], []
    for problem in problems:
        text, ids = encode(problem.question + instruction if chat else problem.question)
        prompts.append(ids)
        texts.append(text)
    check_round_trip(tokenizer, prompts, texts)
    return prompts


def decode_answers(rollouts, tokenizer) -> list[dict]:
    """For each row of a `rollout.Rollout` the text, its length in tokens, and whether it ended."""
    answers = []
    hidden = hidden_ids(tokenizer)
    rows = zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask, rollouts.finished.tolist())
    for prompt, tokens, mask, finished in rows:
        text = tokenizer.decode([i for i in tokens[mask].tolist() if i not in hidden])
        if tokenizer.chat_template is None:  # a base model ends where it writes the next question itself
            text, next_question, _ = text.partition("\nQuestion:")
            finished = finished or bool(next_question)
        elif tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):
            text = "<think>" + text  # the template has opened it
        answers.append({"response": text, "length": int(mask.sum()), "finished": finished})
    return answers


def hidden_ids(tokenizer) -> set[int]:
    """The special ids, but for the tags of reasoning: what they enclose is not graded."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return {i for i in special if tokenizer.convert_ids_to_tokens(i) not in ("<think>", "</think>")}


def apply_template(tokenizer, content: str, system_prompt: str, thinking: bool) -> str:
    """The chat of a system prompt, if there is one, and one user turn, as text. Raises BadInput."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    # enable_thinking is a switch of Qwen3's template; other templates ignore it
    how = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": thinking}
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            how["chat_template"] = DATE + template
        text = tokenizer.apply_chat_template([*system, {"role": "user", "content": content}], **how)
    except TEMPLATE_ERRORS as error:
        remedy = DROP_SYSTEM if system_prompt else "give a model with another template"
        what = f"the chat template of {tokenizer.name_or_path} fails ({error})"
        raise BadInput(f"{what}: {remedy}") from error
    if system_prompt.strip() not in text:
        what = f"the chat template of {tokenizer.name_or_path} omits the system prompt"
        raise BadInput(f"{what}: {DROP_SYSTEM}")
    return text


class Encoder:
    """Encodes a user's text within `text_around`; control tokens in the user's text are plain text.

    A text that contains one is encoded by a copy of the tokenizer in which control tokens have other names;
    the text around the user's is written with these names.
    """

    def __init__(self, tokenizer, text_around: Callable[[str], str], bos: bool):
        self.tokenizer = tokenizer
        self.text_around = text_around
        self.bos = bos  # whether the tokenizer adds its bos token; a chat template writes its own
        added = tokenizer.added_tokens_decoder
        self.controls = {i: t for i, t in added.items() if t.special or t.content.strip(SPACES)}
        longest_first = sorted((t.content for t in self.controls.values()), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        parts = text_around(MARK).split(MARK)
        if len(parts) != 2:
            what = f"the chat template of {tokenizer.name_or_path} writes a message {len(parts) - 1} times"
            raise BadInput(f"{what}, not once: give a model with another template")
        self.before, self.after = parts

    def __call__(self, content: str) -> tuple[str, list[int]]:
        """The whole text, and its ids. Raises BadInput."""
        text = self.text_around(content)
        if content.strip() not in text:
            what = f"the chat template of {self.tokenizer.name_or_path} changes the text {content[:60]!r}"
            raise BadInput(f"{what}: give a model with another template")
        control = self.pattern.search(content)
        if not control:
            return text, self.tokenizer(text, add_special_tokens=self.bos)["input_ids"]
        content = text[len(self.before) : len(text) - len(self.after)]  # a template may strip it
        renamed = self.rename(self.before) + content + self.rename(self.after)
        ids = self.plain.encode(renamed, add_special_tokens=False).ids
        if MARK in content or self.controls.keys() & set(ids):  # a Unigram model may have them as words
            what = f"the tokenizer of {self.tokenizer.name_or_path} cannot read {control[0]!r} as plain text"
            raise BadInput(f"{what} in {content[:60]!r}: remove that problem")
        if self.bos:
            ids = self.plain.encode(renamed, add_special_tokens=True).ids
        originals = {self.plain.token_to_id(renamed_token(i)): i for i in self.controls}
        return text, [originals.get(i, i) for i in ids]

    def rename(self, text: str) -> str:
        """A template's text with the names that control tokens have in the copy."""
        ids = {token.content: i for i, token in self.controls.items()}
        return self.pattern.sub(lambda match: renamed_token(ids[match[0]]), text)

    @cached_property
    def plain(self) -> Tokenizer:
        """A copy that finds control tokens under their new names only. Raises BadInput."""
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            what = f"the tokenizer of {self.tokenizer.name_or_path} cannot read control tokens as plain text"
            raise BadInput(f"{what}: remove the problems that contain one")
        plain = copy.deepcopy(self.tokenizer.backend_tokenizer)
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True  # special tokens are not looked for; now all controls are special
        plain.add_special_tokens([AddedToken(t.content, special=True) for t in self.controls.values()])
        for i, token in self.controls.items():
            how = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
            plain.add_tokens([AddedToken(renamed_token(i), **how)])
        return plain


def renamed_token(i: int) -> str:
    return f"{MARK}{i}{MARK}"


def check_round_trip(tokenizer, prompts: list[list[int]], texts: list[str]) -> None:
    """Raises BadInput unless the ids of every prompt, decoded, give its text, as the module describes."""
    bos = tokenizer.bos_token or ""
    wrong = []
    for ids, text in zip(prompts, texts):
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != text and comparable(decoded) not in (comparable(text), comparable(bos + text)):
            wrong.append((text, decoded))
    if wrong:
        text, decoded = wrong[0]
        place = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), 0)
        around = slice(max(0, place - 20), place + 40)
        count = f"{len(wrong)} of {len(texts)} prompts ({text[around]!r} becomes {decoded[around]!r})"
        what = f"the tokenizer of {tokenizer.name_or_path} loses or adds text in {count}"
        raise BadInput(f"{what}: give a complete model folder, or remove those problems")


def comparable(text: str) -> str:
    """Text without spaces and control characters, in the compatible form NFKC."""
    text = unicodedata.normalize("NFKC", text).replace("\u2581", "")
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Zs", "Zl", "Zp"))
