"""The frameworks that we can install: what must import, which Python they run on, what to put right afterwards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.core.errors import SetupError
from tunesmith.core.fingerprint import hash_text

LOCKS = Path(__file__).with_name("envs")
CUDA_GIB = 6.0  # what the CUDA build of torch and its libraries take beyond the CPU build, rounded up


@dataclass(frozen=True, slots=True)
class Repair:
    """A path inside site-packages that breaks a CPU environment and is deleted there."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class Framework:
    """One framework.

    imports:    what its environment must be able to import, in this order: `module` or `module:name`.
    shown:      distributions whose versions people ask for; the first is the framework itself.
    pythons:    oldest and newest Python that its lock is good for.
    needed_gib: disk space of its environment with a CPU torch, measured and rounded up.
    environ:    variables that it runs with: offline, silent.
    whole_steps: it divides each forward pass by its own target tokens, so only a step of one pass has the job's loss.
    """

    name: str
    title: str
    imports: tuple[str, ...]
    shown: tuple[str, ...]
    pythons: tuple[tuple[int, int], tuple[int, int]]
    needed_gib: float
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    cpu_repairs: tuple[Repair, ...] = ()
    whole_steps: bool = False

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.name}.txt"


_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_TRAINERS = ("transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework(
            name="trl",
            title="TRL and PEFT",
            imports=("trl:SFTTrainer", "peft:LoraConfig"),
            shown=("trl", "peft", "transformers", "datasets", "accelerate", "bitsandbytes"),
            pythons=((3, 11), (3, 13)),
            needed_gib=2.0,
            environ=_QUIET,
        ),
        Framework(
            name="llamafactory",
            title="LLaMA-Factory",
            imports=("llamafactory.train.tuner:run_exp",),
            shown=("llamafactory", *_TRAINERS),
            pythons=((3, 11), (3, 12)),
            needed_gib=2.5,
            environ=_QUIET,
            cpu_repairs=(
                Repair(
                    "torchaudio/lib",
                    "torchaudio comes for CUDA alone; without these it imports as plain Python",
                ),
            ),
        ),
        Framework(
            name="axolotl",
            title="Axolotl",
            imports=("axolotl.train:train",),
            shown=("axolotl", *_TRAINERS),
            pythons=((3, 11), (3, 12)),
            needed_gib=4.5,
            environ={**_QUIET, "AXOLOTL_DO_NOT_TRACK": "1"},
            whole_steps=True,
        ),
        Framework(
            name="unsloth",
            title="Unsloth",
            imports=("unsloth:FastLanguageModel",),
            shown=("unsloth", "unsloth-zoo", *_TRAINERS),
            pythons=((3, 11), (3, 13)),
            needed_gib=3.0,
            environ={**_QUIET, "UNSLOTH_DISABLE_STATISTICS": "1"},
        ),
    )
}


def find_framework(name: str) -> Framework:
    if name not in FRAMEWORKS:
        near = difflib.get_close_matches(name.lower(), FRAMEWORKS, n=1)
        guess = f"Did you mean {near[0]!r}?" if near else ""
        raise SetupError(name, "no such framework", rule=f"one of {', '.join(FRAMEWORKS)}", cure=guess)
    return FRAMEWORKS[name]


def torch_lock() -> Path:
    """torch's plain build for Linux with its CUDA libraries, all with hashes."""
    return LOCKS / "torch.txt"


def read_lock(path: Path) -> dict[str, str]:
    """Distribution -> exact version."""
    return dict(re.findall(r"^([a-z0-9-]+)===?(\S+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def torch_requirement() -> str:
    return f"torch=={read_lock(torch_lock())['torch']}"


def hash_locks(framework: Framework) -> str:
    """SHA-256 over what decides a framework's environment: its lock, torch's, and the repairs."""
    texts = [path.read_text(encoding="utf-8") for path in (framework.lock, torch_lock())]
    return hash_text("\0".join([*texts, repr(framework.cpu_repairs)]))
