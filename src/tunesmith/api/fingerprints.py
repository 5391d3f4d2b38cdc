"""Hashes of what a training rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunesmith.api.tasks import TrainTask
from tunesmith.core.fingerprint import hash_bytes, hash_code, hash_file, hash_json, hash_text
from tunesmith.data.prepare import Prepared
from tunesmith.data.stream import find_stream_sources
from tunesmith.job.objective import DistillSpec
from tunesmith.job.spec import Job

# Above this, a base model is known by its tensors' names, shapes and its revision instead of every byte.
MAX_HASHED_BYTES = 4 << 30


def fingerprint_run(task: TrainTask, job: Job, prepared: Prepared) -> dict[str, str]:
    """Hashes of what a training rests on: data, base model, our code; of a distillation its teacher."""
    found = {
        **fingerprint_data(job, prepared),
        "model": fingerprint_model(Path(task.model_folder), task.revision),
        "code": hash_code(),
    }
    if isinstance(job.objective_spec, DistillSpec):
        from tunesmith.api.teacher import check_teacher, fingerprint_teacher

        found["teacher"] = fingerprint_teacher(check_teacher(job, Path(task.model_folder)))
    return found


def fingerprint_model(folder: Path, revision: str | None) -> str:
    """SHA-256 over the weights and configuration of a model folder."""
    files = sorted(folder.glob("*.safetensors"))
    if sum(path.stat().st_size for path in files) <= MAX_HASHED_BYTES:
        parts = [hash_file(path) for path in [*files, folder / "config.json"]]
    else:
        parts = [f"{path.name}:{path.stat().st_size}" for path in files] + [
            str(revision),
            hash_file(folder / "config.json"),
        ]
    return hash_text("\n".join(parts))


def fingerprint_data(job: Job, prepared: Prepared) -> dict[str, str]:
    """What decides the rows of a run: the prepared ones', and of streamed ones their sources'."""
    found = prepared.fingerprints
    return found | {"stream_sha256": _fingerprint_stream(job, found)} if job.data.streaming else found


def _fingerprint_stream(job: Job, fingerprints: Mapping[str, str]) -> str:
    """Hash of what decides streamed rows. Files too large to hold are known by size and both ends."""
    parts: list[str] = []
    for source, _ in find_stream_sources(job.data):
        parts += [source.name, str(source.revision)]
        for path in source.files:
            with path.open("rb") as handle:
                head = handle.read(1 << 20)
                handle.seek(max(0, path.stat().st_size - (1 << 20)))
                tail = handle.read()
            parts.append(f"{path.name}:{path.stat().st_size}:{hash_bytes(head + tail)}")
    kept = {name: fingerprints[name] for name in ("template_sha256", "tokenizer_sha256")}
    return hash_json({"sources": parts, "data": job.data.model_dump(mode="json"), **kept})
