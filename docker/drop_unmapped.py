"""Deletes the CUDA files that torch does not load on a machine without a GPU.

PyPI's torch links against CUDA's libraries, so the others cannot be deleted. Of these packages a
process without a GPU maps what torch links against, and never opens the rest.
"""

import sysconfig
from pathlib import Path

import torch
import torchvision

mapped = Path("/proc/self/maps").read_text()
packages = Path(sysconfig.get_path("purelib")) / "nvidia"
dropped = [f for f in packages.rglob("*") if f.is_file() and f"{f}\n" not in mapped]
size = sum(f.stat().st_size for f in dropped)
for file in dropped:
    file.unlink()
print(
    f"torch {torch.__version__}, torchvision {torchvision.__version__}: "
    f"deleted {len(dropped)} files of {packages}, {size / 1e9:.2f} GB"
)
