"""`--tracker tensorboard` or `wandb`: the numbers of every step, and the final scores, also go there.

Both are optional: `pip install tensorboard` or `pip install wandb`. TensorBoard's files are in
RUN/tensorboard, those of wandb in RUN/wandb. Wandb's own environment variables, such as WANDB_MODE=offline,
decide what it sends where. A resumed run continues its curves.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cli import BadInput
from support.models import first_line
from support.run_folder import run_id_of


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

    writers = []

    def log(step: int, row: dict[str, Any]) -> None:
        if not writers:  # a resumed run writes again what came after its checkpoint
            writers.append(SummaryWriter(folder / "tensorboard", purge_step=step))
            lines = [f"    {key}: {value}" for key, value in settings.items()]
            writers[0].add_text("settings", "\n".join(lines))
        for key, value in numbers(row).items():
            writers[0].add_scalar(key, value, step)
        writers[0].flush()

    return log


def wandb(folder: Path, settings: dict[str, Any]) -> Callable[[int, dict[str, Any]], None]:
    import wandb as library

    about = {"project": "opd", "name": folder.resolve().name, "id": run_id_of(folder), "dir": folder}
    try:
        run = library.init(**about, config=settings, resume="allow")
    except library.Error as error:
        what = f"wandb cannot be used ({first_line(error)})"
        raise BadInput(f"{what}: wandb login, or WANDB_MODE=offline, then --resume {folder}") from error

    def log(step: int, row: dict[str, Any]) -> None:
        run.log(numbers(row), step=step)

    return log
