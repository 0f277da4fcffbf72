"""What the benchmarks share: sides in processes of their own, peak memory, and Hugging Face's `generate`.

A side is one way to do the work that is measured: this project's, a naive one, or another library's.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rollout import pad_left
from support import run_folder
from support.cli import BadInput, flag_of


def compare_sides(
    script: str, sides: Iterable[str], given: dict[str, Any], about: dict[str, Any], out: Path
) -> None:
    """Measure each side, print its row, which begins with `about`, and add it to the CSV file `out`."""
    for side in sides:
        row = about | {"side": side} | measure_apart(script, side, given)
        print(row, flush=True)
        run_folder.append_csv(out, [row])


def measure_apart(script: str, side: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the script prints as JSON, called with the given flags and --side. Raises BadInput if it fails."""
    command = [sys.executable, script, f"--side={side}"]
    for name, value in given.items():
        if isinstance(value, bool):
            command.append(flag_of(name if value else f"no_{name}"))
        elif name != "sides":
            command.append(f"{flag_of(name)}={value}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        what = f"side {side} failed ({reason})"
        raise BadInput(f"{what}: install what it needs, or select others with --sides")
    return json.loads(done.stdout.splitlines()[-1])


def synchronize(device: torch.device) -> None:
    """Wait for the kernels that a GPU has not finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024


def peak_columns(device: torch.device) -> dict[str, Any]:
    """Peak memory in GB; on a GPU also what PyTorch's allocator has reserved, and what the device has in use.

    The last includes the CUDA context, and all other processes on the device.
    """
    found = {"peak_gb": peak_memory(device) / 1e9, "reserved_gb": "", "device_gb": ""}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
        found["device_gb"] = (total - free) / 1e9
    return found


def hardware(device: torch.device) -> dict[str, str]:
    return {"hardware": run_folder.environment(device)["hardware"]}


def reset_peak(device: torch.device) -> int:
    """Start a new measurement of the peak; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory(device)


def generate(model, prompts: list[list[int]], horizon: int, eos_ids: set[int]) -> tuple[Tensor, Tensor]:
    """Sample with `model.generate` from the softmax of all logits, whatever the generation config says.

    Returns sequences and their attention mask, (B, P + R) each, prompts padded on the left; the mask is 0 on
    padding and after the eos token.
    """
    ids, mask = pad_left(prompts, model.device)
    eos = sorted(eos_ids)
    sequences = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=horizon,
        eos_token_id=eos,
        pad_token_id=0,
        repetition_penalty=1.0,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    ended = torch.isin(sequences[:, ids.shape[1] :], torch.tensor(eos, device=model.device)).long()
    in_response = ended.cumsum(1) - ended == 0  # up to the first eos token, which is included
    return sequences, torch.cat([mask, in_response.long()], dim=1)
