"""Read a job file: YAML 1.2 with line numbers, `--set` overrides, one-line errors with "did you mean".

YAML 1.2 (ruamel) and not 1.1: `1e-4` is a number, `no` is a string, a key written twice is an error. Aliases and tags
are refused: a job file is data.
"""

# pyright: standard
# Untyped nodes of YAML and hub calls pass through here; strict would only ask for casts.

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tunesmith.core.errors import JobError
from tunesmith.job.combinations import check_in_backward, check_optimizer
from tunesmith.job.objective import OBJECTIVES, VERIFIERS
from tunesmith.job.spec import Job

MAX_JOB_BYTES = 1 << 20
Location = tuple[str | int, ...]
# Mappings that may be written as one text, and the key it stands for.
_SHORT_FORMS = {"method": "name", "objective": "name", "model": "name", "qat": "scheme"}


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file.

    overrides: `a.b=value` strings, applied last; the value is YAML (`train.learning_rate=1e-4`).
    Paths in the file are relative to the file. Raises JobError, in one line.
    """
    path = Path(path)
    values, places = read_yaml(path)
    for override in overrides:
        _apply_override(values, override, places)
    job = _validate(values, places, str(path))
    return resolve_paths(job, path.parent)


def job_from(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Job:
    """A job from a mapping with the keys of a job file. Paths are relative to the working directory."""
    copied = _plain(values)
    places: dict[Location, str] = {}
    for override in overrides:
        _apply_override(copied, override, places)
    return resolve_paths(_validate(copied, places, "job"), Path())


def check_values(values: dict[str, Any], places: dict[Location, str], path: str) -> Job:
    """A job from values whose places are known; JobError at the place of the first that is wrong."""
    return _validate(values, places, path)


def read_yaml(
    path: Path, *, what: str = "a job file", cure: str = "Start from: tunesmith init"
) -> tuple[dict[str, Any], dict[Location, str]]:
    """The file's values, and the place (`job.yaml:4`) of every key and list item.

    what, cure: how messages call the file, and what helps if it holds no mapping.
    """
    text = _read_text(path, what)
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        _refuse_aliases_and_tags(text, path, what)
        document = yaml.load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise JobError(f"{path}:{line}", f"key {key!r} is written twice", cure="Keep one of them") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise JobError(
            place, f"not YAML: {error.problem}", cure="Check indentation, quotes and colons"
        ) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise JobError(str(path), f"not YAML: {str(error).splitlines()[0]}", cure="Check the file") from None
    if document is None:
        raise JobError(
            str(path), "is empty", rule=f"{what.removesuffix(' file')} names a model and data", cure=cure
        )
    if not isinstance(document, dict):
        raise JobError(
            f"{path}:1",
            f"is a {_yaml_type(document)}",
            rule=f"{what.removesuffix(' file')} is a mapping",
            cure=cure,
        )
    places: dict[Location, str] = {}
    _collect_places(document, (), places, str(path))
    return _plain(document), places


def _read_text(path: Path, what: str) -> str:
    try:
        if path.stat().st_size > MAX_JOB_BYTES:
            raise JobError(
                str(path), "is larger than 1 MB", rule=f"{what} is short", cure="Is this a data file?"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise JobError(
            str(path),
            (error.strerror or str(error)).lower(),
            cure="Check the path" + (", or write one with: tunesmith init" if what == "a job file" else ""),
        ) from None
    if raw.startswith(b"\xef\xbb\xbf"):
        raise JobError(f"{path}:1", "starts with a byte order mark", cure="Save the file without BOM")
    if b"\x00" in raw:
        raise JobError(str(path), "contains a NUL byte", rule=f"{what} is text", cure="Save it as UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise JobError(f"{path}:{line}", "is not UTF-8", rule=f"{what} is UTF-8", cure="Convert it") from None


def _refuse_aliases_and_tags(text: str, path: Path, what: str) -> None:
    from ruamel.yaml.events import AliasEvent

    depth = 0
    for event in YAML(typ="rt").parse(text):
        place = f"{path}:{event.start_mark.line + 1}" if event.start_mark else str(path)
        if isinstance(event, AliasEvent):
            raise JobError(
                place, "uses a YAML alias", rule=f"{what} is plain data", cure="Write the value out"
            )
        tag = getattr(event, "ctag", None) or getattr(event, "tag", None)
        if tag is not None and str(tag) not in ("None", "!"):
            raise JobError(
                place, f"uses the YAML tag {tag}", rule=f"{what} is plain data", cure="Remove the tag"
            )
        name = type(event).__name__
        depth += name.endswith("StartEvent") and not name.startswith(("Stream", "Document"))
        depth -= name.endswith("EndEvent") and not name.startswith(("Stream", "Document"))
        if depth > 20:
            raise JobError(
                place, "is nested more than 20 deep", rule=f"{what} is shallow", cure="Check indentation"
            )


def _collect_places(node: Any, at: Location, places: dict[Location, str], path: str) -> None:
    if not isinstance(node, CommentedBase):
        return
    items: Iterable[tuple[Any, Any]] = node.items() if isinstance(node, dict) else enumerate(node)  # type: ignore[call-overload]
    for key, child in items:
        line = node.lc.key(key)[0] if isinstance(node, dict) else node.lc.item(key)[0]
        places[(*at, key)] = f"{path}:{line + 1}"
        _collect_places(child, (*at, key), places, path)


def _plain(node: Any) -> Any:
    """ruamel's node types as plain Python values (strict validation wants exact types)."""
    if isinstance(node, Mapping):
        return {str(key): _plain(child) for key, child in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(child) for child in node]
    if isinstance(node, BaseModel):
        return node.model_dump()
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node if node is None else str(node)


def _apply_override(values: dict[str, Any], override: str, places: dict[Location, str]) -> None:
    key, sign, text = override.partition("=")
    place = f"--set {override}"
    if not sign or not key.strip():
        raise JobError(place, "is not KEY=VALUE", cure="Write it as --set train.learning_rate=1e-4")
    try:
        value = _plain(YAML(typ="rt").load(text))
    except YAMLError:
        raise JobError(place, "has a value that is not YAML", cure="Quote it") from None
    *parents, last = key.strip().split(".")
    node: dict[str, Any] = values
    at: Location = ()
    for name in parents:
        at = (*at, name)
        child: Any = node.get(name)
        if isinstance(child, str) and name in _SHORT_FORMS:
            child = {_SHORT_FORMS[name]: child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise JobError(
                place,
                f"{'.'.join(map(str, at))} is a {_yaml_type(child)}, not a mapping",
                cure="Check the key",
            )
        node[name] = child
        node = child
    node[last] = value
    for known in [location for location in places if location[: len(at) + 1] == (*at, last)]:
        del places[known]
    places[(*at, last)] = place


def _validate(values: dict[str, Any], places: Mapping[Location, str], path: str) -> Job:
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        raise _explain(error, places, path, values) from None
    check_optimizer(job.train, job.method_spec, place=places.get(("train", "optimizer"), path))
    in_backward = places.get(("train", "optimizer_in_backward"), path)
    check_in_backward(job.train, job.method_spec, place=in_backward)
    return job


def _explain(error: ValidationError, places: Mapping[Location, str], path: str, values: Any) -> JobError:
    """The finding a person should see first, as one line; the number of further ones is added."""
    details = [item for item in error.errors() if item["type"] != "default_error"]
    cleaned = [(_user_location(item["loc"], values), item) for item in details]
    # In a union every branch complains; the one that got furthest into the value, or knows the key, says most.
    rank = {"extra_forbidden": 0, "value_error": 1, "missing": 2}
    best = min(cleaned, key=lambda pair: (rank.get(pair[1]["type"], 3), -len(pair[0])))
    location, item = best
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), path)
    # Errors at a parent of this place are other branches of the same union, not further findings.
    others = len(
        {where for where, _ in cleaned if where != location[: len(where)] and where[:-1] != location[:-1]}
    )
    cure = _cure(location, item)
    if others:
        cure = f"{cure} ({others} more to mend)".strip()
    return JobError(place, _finding(location, item, cleaned), cure=cure)


def _user_location(location: Location, values: Any) -> Location:
    """pydantic's location without the names of union branches, which a person never wrote."""
    kept: list[str | int] = []
    node: Any = values
    for part in location:
        if isinstance(node, dict) and part in node:  # noqa: SIM114
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict) and _is_field_name(part):
            node = None
        else:
            continue
        kept.append(part)
    return tuple(kept)


def _is_field_name(part: str | int) -> bool:
    """A missing key keeps its name in a location; the tag of a union branch (`FullSpec`, `list[...]`) does not."""
    return (
        isinstance(part, str)
        and part.isidentifier()
        and part.islower()
        and part not in ("str", "float", "int", "lora", "full", *OBJECTIVES)
    )


def _finding(location: Location, item: Any, cleaned: list[tuple[Location, Any]]) -> str:
    key = ".".join(str(part) for part in location) or "job"
    kind = item["type"]
    if kind == "extra_forbidden":
        guess = _guess(location)
        return f"unknown key {key!r}" + (f"; did you mean {guess!r}?" if guess else "")
    if kind == "missing":
        return f"key {key!r} is missing"
    if kind == "value_error":
        return f"{key}: {item['ctx']['error']}"
    if kind == "too_short":
        return f"{key} is empty; it should be a list with at least one entry"
    shown = (
        repr(item["input"])
        if not isinstance(item["input"], dict | list)
        else f"a {_yaml_type(item['input'])}"
    )
    wanted = list(dict.fromkeys(_wanted(other) for where, other in cleaned if where == location))
    near = difflib.get_close_matches(str(item["input"]).lower(), re.findall("'(.*?)'", " ".join(wanted)), n=1)
    guess = f". Did you mean {near[0]!r}?" if near else ""
    return f"{key} is {shown[:60]}; it should be {' or '.join(wanted)}{guess}"


def _wanted(item: Any) -> str:
    context: dict[str, Any] = item.get("ctx", {})
    if item["type"] == "literal_error":
        return str(context["expected"])
    return {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "list_type": "a list",
        "model_type": "a mapping",
        "greater_than": f"above {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"below {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "finite_number": "a finite number",
    }.get(item["type"], str(item["msg"]))


def _guess(location: Location) -> str | None:
    close = difflib.get_close_matches(str(location[-1]), _sibling_keys(location), n=1, cutoff=0.6)
    return ".".join([*map(str, location[:-1]), close[0]]) if close else None


def _cure(location: Location, item: Any) -> str:
    if item["type"] == "extra_forbidden" and not _guess(location):
        return f"Known keys: {', '.join(_sibling_keys(location))}"
    if item["type"] == "missing":
        return "Add it; tunesmith init writes an example"
    # What a spec's own check says holds its cure.
    return "" if item["type"] == "value_error" else "All keys and values: tunesmith schema --markdown"


def _sibling_keys(location: Location) -> list[str]:
    """The keys allowed at this place, read from the JSON Schema."""
    schema = Job.model_json_schema()
    definitions = schema.get("$defs", {})
    nodes = [schema]
    for part in location[:-1]:
        nodes = [child for node in nodes for child in _child_schemas(node, part, definitions)]
    return sorted({key for node in nodes for key in node.get("properties", {})})


def _child_schemas(
    node: dict[str, Any], part: str | int, definitions: dict[str, Any]
) -> list[dict[str, Any]]:
    child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
    return _flatten(child, definitions) if child else []


def _flatten(node: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema node with references followed and unions opened."""
    if "$ref" in node:
        return _flatten(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    branches = node.get("anyOf", []) + node.get("oneOf", [])
    return [flat for branch in branches for flat in _flatten(branch, definitions)] or [node]


def _yaml_type(value: Any) -> str:
    return {
        dict: "mapping",
        list: "list",
        str: "text",
        bool: "true/false",
        int: "number",
        float: "number",
    }.get(type(_plain(value)), "empty value")


_PATH_KEYS: tuple[Location, ...] = (
    ("model",),
    ("model", "name"),
    ("method", "adapter"),
    ("objective", "teacher"),
    ("data", "template"),
    ("data", "train"),
    ("data", "split", "validation"),
    ("data", "split", "test"),
    ("evaluate", "documents"),
    ("evaluate", "schema_file"),
    ("evaluate", "general"),
)

_JUDGE_KEYS = (("evaluate", "documents"), ("evaluate", "schema_file"), ("evaluate", "general"))


def resolve_paths(job: Job, folder: Path) -> Job:
    """Make paths that exist beside the job file absolute; names (bundled, hub) stay as written."""
    # What was not written stays so: a continued adapter decides it.
    values = job.model_dump(exclude_unset=True)
    for key in _PATH_KEYS:
        node: Any = values
        for part in key[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
            if node is None:
                break
        if isinstance(node, dict) and key[-1] in node:
            if node[key[-1]] in ("", []):
                raise JobError(".".join(map(str, key)), "is empty", cure="Name a file or folder")
            node[key[-1]] = _resolve(node[key[-1]], folder)
            _refuse_missing_file(key, node[key[-1]])
    _resolve_rewards(values.get("objective"), folder)
    return Job.model_validate(values)


def _resolve_rewards(objective: Any, folder: Path) -> None:
    """Sources of rewards, `rewards.py:name` among them, and their schemas."""
    rewards = objective.get("rewards", []) if isinstance(objective, dict) else []
    for number, term in enumerate(rewards):
        whole = {"source": term} if isinstance(term, str) else term
        file, colon, name = whole["source"].rpartition(":")
        if file.endswith(".py"):
            whole["source"] = _resolve(file, folder) + colon + name
        elif whole["source"] not in VERIFIERS:
            whole["source"] = _resolve(whole["source"], folder)
        if whole.get("schema_file"):
            whole["schema_file"] = _resolve(whole["schema_file"], folder)
        rewards[number] = whole["source"] if isinstance(term, str) else whole


def _refuse_missing_file(key: Location, value: Any) -> None:
    """What the judge reads is a file here, unlike rows and models; told now and not after hours of training."""
    if key in _JUDGE_KEYS and value is not None and not os.path.exists(value):
        raise JobError(".".join(map(str, key)), f"{value}: no such file or folder", cure="Check the path")


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_resolve(item, folder) for item in value]
    if isinstance(value, dict):
        return {**value, "path": _resolve(value["path"], folder)} if "path" in value else value
    if not isinstance(value, str) or value == "auto":
        return value
    candidate = folder / value
    is_glob = any(letter in value for letter in "*?[")
    try:
        found = candidate.exists() or (is_glob and any(folder.glob(value)))
    except (OSError, ValueError, NotImplementedError):
        return value
    return str(candidate.resolve()) if found else value
