"""What the benchmarks share: each side in a process of its own, and the memory that a process has held."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli import BadInput


def flags_of(given: dict) -> list[str]:
    """The flags of the knobs that were given, for a side's own process, without `sides` and `out`."""
    flags = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if name not in ("sides", "out"):
            switch = f"--{flag}" if value else f"--no-{flag}"
            flags.append(switch if isinstance(value, bool) else f"--{flag}={value}")
    return flags


def measure_apart(script: str, side: str, flags: list[str]) -> dict:
    """What `script --side SIDE` prints as JSON. Raises BadInput if it fails."""
    done = subprocess.run([sys.executable, script, *flags, f"--side={side}"], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        raise BadInput(f"side {side} failed ({why}): install what it needs, or name the others with --sides")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024


def peak_reserved(device: torch.device) -> float | str:
    """GB that torch has taken of a GPU at its peak; nothing on a CPU."""
    return torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else ""


def reset_peak(device: torch.device) -> int:
    """Bytes in use now, from which on the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)
