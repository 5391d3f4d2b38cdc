"""Resolve again the exact versions and hashes of every framework's environment. Needs uv and a package index.

    python tools/lock_frameworks.py              # all of src/tunesmith/frameworks/envs/*.txt
    python tools/lock_frameworks.py axolotl      # one

torch, and the CUDA libraries and Triton that belong to its plain Linux build, have a lock of their own: an install
takes that build on a machine with an NVIDIA GPU and a CPU build elsewhere. A framework's lock holds the rest, whole, so
that an install resolves nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ENVS = Path(__file__).resolve().parents[1] / "src" / "tunesmith" / "frameworks" / "envs"
TORCH = "torch==2.13.0"
# What each is asked for by us; the rest follows. bitsandbytes: QLoRA, where the framework leaves it optional.
REQUIREMENTS = {
    "torch": (),
    "trl": (
        "trl==1.16.0",
        "peft==0.21.2",
        "transformers==5.23.0",
        "datasets==5.2.0",
        "accelerate==1.15.0",
        "bitsandbytes==0.50.2",
    ),
    "llamafactory": ("llamafactory==0.9.5", "bitsandbytes==0.50.2"),
    "axolotl": ("axolotl==0.19.0",),
    "unsloth": ("unsloth==2026.10.9",),
}
# Frameworks that import Triton themselves, on a CPU too.
NEED_TRITON = ("axolotl", "unsloth")
# Unsloth asks for a certifi that not every index has yet; torchvision exists on PyPI for CUDA alone, where it breaks
# a CPU torch, and trains no text.
OVERRIDES = ("certifi>=2026.10.18", "torchvision ; sys_platform == 'never'")
# Resolved for the oldest Python that we support, on Linux; the hashes are those of every platform.
RESOLVED_FOR = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
HEADER = "# Made by tools/lock_frameworks.py from {asked}. Not to be edited.\n"


def resolve(name: str) -> str:
    """The lock of one framework: pinned requirements with hashes, nothing that names an index."""
    asked = (TORCH, *REQUIREMENTS[name])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "asked.in").write_text("\n".join(asked) + "\n", encoding="utf-8")
        (root / "overrides.txt").write_text("\n".join(OVERRIDES) + "\n", encoding="utf-8")
        command = ["uv", "pip", "compile", "asked.in", "--override", "overrides.txt", *RESOLVED_FOR]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: uv could not resolve it: {done.stderr.strip()}")
    of_torch = re.compile(r"(torch|nvidia-(?!ml-py)[a-z0-9-]+|cuda-[a-z]+|triton)==")
    kept: list[str] = []
    for entry in re.findall(r"^\S.*\n(?:[ ]{4}.*\n)*", done.stdout, flags=re.MULTILINE):
        with_torch = of_torch.match(entry) is not None
        if name == "torch":
            wanted = with_torch
        else:
            wanted = not with_torch or (entry.startswith("triton==") and name in NEED_TRITON)
        if wanted:
            kept.append(entry)
    if name == "torch":
        # `==` would also take 2.13.0+cpu from a folder of wheels, and prefer it.
        kept = [
            entry.replace("torch==", "torch===") if entry.startswith("torch==") else entry for entry in kept
        ]
    return HEADER.format(asked=", ".join(asked)) + "".join(kept)


def main(names: list[str]) -> None:
    for name in names or list(REQUIREMENTS):
        text = resolve(name)
        (ENVS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(re.findall(r'^[a-z0-9]', text, flags=re.MULTILINE))} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
