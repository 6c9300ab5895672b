"""Device, machine and versions of a measurement."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from vitcop_vllm.plugin import installed_vllm_version

Device = Literal["cpu", "gpu"]


class WrongDeviceError(RuntimeError):
    """vLLM does not run on the wanted device."""


def resolve_device(wanted: Device | None, device_type: str) -> Device:
    """The device that vLLM runs on.

    Args:
        wanted: ``--device``, if given.
        device_type: Device type of vLLM's platform.

    Raises:
        WrongDeviceError: If vLLM runs on another device, or on a device without pruning.
    """
    known: dict[str, Device] = {"cpu": "cpu", "cuda": "gpu"}
    device = known.get(device_type)
    if device is None:
        raise WrongDeviceError(
            f"vLLM runs on device {device_type!r} here; pruning supports {', '.join(known)}"
        )
    if wanted not in (None, device):
        raise WrongDeviceError(
            f"--device {wanted}: the installed vLLM runs on the {device} here. On a machine with a "
            f"{wanted.upper()}, `make install DEVICE={wanted}` installs vLLM for it"
        )
    return device


def processor_name() -> str:
    """The processor's name; Python's ``platform`` has none on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def command(program: str, argv: Sequence[str] | None) -> str:
    """The command that measures again; ``argv`` is by default this process's."""
    return f'{program} ARGS="{shlex.join(sys.argv[1:] if argv is None else argv)}"'


def machine() -> dict[str, Any]:
    """Versions, and the processor."""
    return {
        "vllm": installed_vllm_version(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
    }
