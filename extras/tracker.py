"""`--tracker tensorboard` or `wandb`: the numbers of every step, and the final scores, also go there.

Both are optional: `pip install tensorboard` or `pip install wandb`. TensorBoard's files are in
RUN/tensorboard, those of wandb in RUN/wandb; its own environment variables say what it sends where, such as
WANDB_MODE=offline. A resumed run continues its curves.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cli import BadInput


def numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those of nested dicts as "name/key"."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = float(value)
    return found


def start(name: str, folder: Path, settings: dict[str, Any]) -> Callable[[int, dict[str, Any]], None]:
    """A function that logs the numbers of a row at a step. Raises BadInput if the package is missing."""
    try:
        return {"tensorboard": tensorboard, "wandb": wandb}[name](folder, settings)
    except ImportError as error:
        raise BadInput(f"--tracker {name} is not installed ({error}): pip install {name}") from error


def tensorboard(folder: Path, settings: dict[str, Any]) -> Callable[[int, dict[str, Any]], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(step: int, row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log


def wandb(folder: Path, settings: dict[str, Any]) -> Callable[[int, dict[str, Any]], None]:
    import wandb as library

    name = folder.resolve().name
    run = library.init(project="opd", name=name, id=name, dir=folder, config=settings, resume="allow")

    def log(step: int, row: dict[str, Any]) -> None:
        run.log(numbers(row), step=step)

    return log
