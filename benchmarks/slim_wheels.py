"""Fetch the wheels of gpu_wheels.txt for a GPU machine without a network, and leave out of them what it never loads.

    python benchmarks/slim_wheels.py --out .whl            fetch and slim (pip must reach a package index)
    python benchmarks/slim_wheels.py --out .whl --from DIR  slim wheels that are already in DIR

Two wheels are large for what is used of them: Unsloth brings its desktop application (`studio/`), bitsandbytes a
library for every CUDA, ROCm and XPU release (kept: CUDA 13.0 and the CPU). A slim wheel is the same wheel zipped again
without those files and without their lines in RECORD; code and version stay what they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

LIST = Path(__file__).with_name("gpu_wheels.txt")
PYTHON = "3.12"
# pip takes a platform tag literally: a wheel for manylinux_2_27 is not found under manylinux_2_28.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def _is_kept_library(name: str) -> bool:
    file = name.rpartition("/")[2]
    return not file.startswith("libbitsandbytes_") or file in (
        "libbitsandbytes_cuda130.so",
        "libbitsandbytes_cpu.so",
    )


# Distribution name, as wheels spell it -> whether a file of the wheel stays.
KEEP: dict[str, Callable[[str], bool]] = {
    "unsloth": lambda name: not name.startswith("studio/"),
    "bitsandbytes": _is_kept_library,
}


def read_list(path: Path = LIST) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def download(requirements: list[str], folder: Path) -> None:
    """Fetch wheels for Python 3.12 on x86-64 Linux, without what they depend on: the list names everything."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    for requirement in requirements:
        subprocess.run([*command, requirement], check=True)


def slim_wheel(wheel: Path, folder: Path) -> Path:
    """Copy a wheel into `folder` without the files that nobody loads there. Returns the copy."""
    target = folder / wheel.name
    keep = KEEP.get(wheel.name.partition("-")[0])
    if keep is None:
        shutil.copyfile(wheel, target)
        return target
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as copy,
    ):
        for item in source.infolist():
            if not keep(item.filename):
                continue
            content = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = _filter_record(content.decode(), keep).encode()
            copy.writestr(item, content, zipfile.ZIP_DEFLATED, 9)
    return target


def _filter_record(text: str, keep: Callable[[str], bool]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows(row for row in csv.reader(io.StringIO(text)) if row and keep(row[0]))
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the slim wheels; emptied of wheels first"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, help="folder of whole wheels; default: fetch them"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.source or Path(scratch)
        if arguments.source is None:
            download(read_list(), source)
        total = 0
        for wheel in sorted(source.glob("*.whl")):
            size = slim_wheel(wheel, arguments.out).stat().st_size
            total += size
            print(f"{size:12,}  {'slim' if size < wheel.stat().st_size else '    '}  {wheel.name}")
    print(f"{total:12,}  bytes in all, {total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
