"""Hashes of what a training rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.api.tasks import TrainTask
from tunesmith.core.fingerprint import hash_bytes, hash_code, hash_file, hash_json, hash_text
from tunesmith.data.prepare import Prepared
from tunesmith.data.stream import find_stream_sources
from tunesmith.job.objective import DistillSpec, RewardTerm, RolloutSpec
from tunesmith.job.spec import Job, LoraSpec

# Above this, a base model is known by its tensors' names, shapes and its revision instead of every byte.
MAX_HASHED_BYTES = 4 << 30


def fingerprint_run(task: TrainTask, job: Job, prepared: Prepared) -> dict[str, str]:
    """Hashes of what a training rests on: data, base model, our code, and what its objective names."""
    return {
        **fingerprint_data(job, prepared),
        "model": fingerprint_model(Path(task.model_folder), task.revision),
        "code": hash_code(),
        **_fingerprint_adapter(job),
        **fingerprint_objective(job, Path(task.model_folder)),
    }


def describe_learning(job: Job) -> dict[str, Any]:
    """Method and objective as a checkpoint knows them. An adapter to go on from is known by its hash
    (`fingerprint_run`): its folder may move, or hold another one."""
    said = job.model_dump(mode="json", include={"method", "objective"})
    if isinstance(job.method_spec, LoraSpec) and job.method_spec.adapter:
        said["method"] = {**said["method"], "adapter": None}
    return said


def _fingerprint_adapter(job: Job) -> dict[str, str]:
    method = job.method_spec
    if not isinstance(method, LoraSpec) or method.adapter is None:
        return {}
    files = sorted(path for path in Path(method.adapter).glob("adapter_*") if path.is_file())
    return {"adapter": hash_text("\n".join(f"{path.name}:{hash_file(path)}" for path in files))}


def fingerprint_objective(job: Job, model_folder: Path) -> dict[str, str]:
    """Hashes of files that an objective names: of a distillation its teacher, of PPO and GRPO their rewards."""
    if isinstance(job.objective_spec, DistillSpec):
        from tunesmith.api.teacher import check_teacher, fingerprint_teacher

        return {"teacher": fingerprint_teacher(check_teacher(job, model_folder))}
    if isinstance(job.objective_spec, RolloutSpec):
        return {"rewards": fingerprint_rewards(job.objective_spec.terms)}
    return {}


def fingerprint_rewards(terms: Sequence[RewardTerm]) -> str:
    """Hash of the files that rewards are: functions, schemas, reward models."""
    parts: list[str] = []
    for term in terms:
        file = Path(term.source.rpartition(":")[0])
        if file.suffix == ".py":
            parts.append(hash_file(file))
        elif term.schema_file is not None:
            parts.append(hash_file(Path(term.schema_file)))
        elif Path(term.source).is_dir():
            parts.append(fingerprint_model(Path(term.source), None))
        else:
            parts.append(term.source)
    return hash_text("\n".join(parts))


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
