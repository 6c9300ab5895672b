"""Where and with what a figure was measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vitcop_vllm.plugin import installed_vllm_version

Device = Literal["cpu", "gpu"]


class WrongDeviceError(RuntimeError):
    """vLLM does not run on the device that the user wants."""


def settle_device(wanted: Device | None, device_type: str) -> Device:
    """The device that vLLM runs on.

    Args:
        wanted: ``--device``, if given.
        device_type: vLLM's name of its platform's device.

    Raises:
        WrongDeviceError: If vLLM runs on another device, or on one that pruning does not run on.
    """
    known: dict[str, Device] = {"cpu": "cpu", "cuda": "gpu"}
    device = known.get(device_type)
    if device is None:
        raise WrongDeviceError(
            f"vLLM finds device {device_type!r} here, and pruning runs on {', '.join(known)}"
        )
    if wanted not in (None, device):
        raise WrongDeviceError(
            f"--device {wanted} does not fit: the installed vLLM runs on the {device} here. "
            f"`make install DEVICE={wanted}` installs the other one, on a machine with a "
            f"{wanted.upper()} for it"
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
    """Versions of what computes, and the processor that it computes on."""
    return {
        "vllm": installed_vllm_version(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
    }
