"""Content hashes of what a run reads, so that a run is continued with the inputs that it was started with."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from support import models

CHUNK = 1 << 20  # bytes read at a time


def inputs(contents: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """A hash of each of `contents`, which JSON can express, and of each model's tokenizer and weights.

    Raises BadInput if a tokenizer or a config cannot be loaded.
    """
    found = {what: of_json(content) for what, content in contents.items()}
    for name in dict.fromkeys(names):
        tokenizer = models.load_tokenizer(name)
        vocabulary = sorted(tokenizer.get_vocab().items())
        found[f"tokenizer of {name}"] = of_json([vocabulary, tokenizer.chat_template])
        found[f"weights of {name}"] = of_weights(name)
    return found


def of_training(knobs, problems: list, test: list) -> dict[str, str]:
    """Of a training run, which reads the questions alone of the `problems` that it trains on."""
    contents = {f"training problems of {knobs.data}": [problem.question for problem in problems]}
    contents |= {f"held-out problems of {knobs.eval_data or knobs.data}": test}
    return inputs(contents, (knobs.student, knobs.teacher))


def of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def of_weights(name: str) -> str | None:
    """A hash of config and weights in the folder `name`, or the commit of the hub model `name`."""
    folder = Path(name)
    if not folder.is_dir():
        return models.load(AutoConfig, name)._commit_hash
    found = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    return found.hexdigest()
