"""Where and with what a figure was measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vitcop_vllm.plugin import installed_vllm_version

Device = Literal["cpu", "gpu"]


class WrongDeviceError(RuntimeError):
    """vLLM runs on another device than was asked for."""


def settle_device(asked: Device | None, device_type: str) -> Device:
    """The device that vLLM runs on.

    Args:
        asked: What the user asks for, if anything.
        device_type: What vLLM's platform calls its own.

    Raises:
        WrongDeviceError: If vLLM runs on another, or on one that pruning does not run on.
    """
    known: dict[str, Device] = {"cpu": "cpu", "cuda": "gpu"}
    device = known.get(device_type)
    if device is None:
        raise WrongDeviceError(
            f"vLLM finds device {device_type!r} here, and pruning runs on {', '.join(known)}"
        )
    if asked not in (None, device):
        raise WrongDeviceError(
            f"--device {asked} was asked for, and the vLLM that is installed runs on the {device} "
            f"here: `make install DEVICE={asked}` installs the other one, on a machine that has "
            f"a {asked.upper()} for it"
        )
    return device


def processor_name() -> str:
    """The processor's name, which Python does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> dict[str, Any]:
    """Versions of what computes, and the processor it computes on."""
    return {
        "vllm": installed_vllm_version(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
    }
