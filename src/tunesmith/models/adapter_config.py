"""What an adapter asks of its base, by the job, its JSON and its header: without torch, so it is looked at first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError
from tunesmith.core.jsonl import read_settings
from tunesmith.job.spec import LoraSpec
from tunesmith.models.config import DecoderConfig
from tunesmith.models.headers import EMBEDDINGS, StoredTensor, list_expected, read_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of other adapters than the ones we run, with the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says. tied: embedding and head are one trained matrix."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    targets: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()
    tied: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def scale_of(self, name: str, rank: int) -> tuple[float, float]:
        """(alpha, scale) of the adapter of module `name`."""
        alpha = match_pattern(self.alpha_pattern, name, self.alpha)
        return alpha, alpha / (rank**0.5 if self.rslora else rank)


def match_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json. Raises ModelError for adapters of another kind."""
    if not folder.is_dir():
        raise ModelError(
            str(folder), "no such folder", rule="an adapter is a folder in PEFT format", cure="Check the path"
        )
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        raise ModelError(
            str(folder),
            f"has no {ADAPTER_CONFIG}",
            rule="an adapter folder is in PEFT format",
            cure="Check the path",
        )
    raw = read_settings(path)
    try:
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise ModelError(
                str(path), f"peft_type is {kind!r}", rule="LoRA adapters (with rsLoRA, DoRA) are read"
            )
        for key, unused in _UNUSED.items():
            if key in raw and raw[key] not in unused:
                raise ModelError(
                    str(path),
                    f"{key} is {raw[key]!r}",
                    rule="this variant of LoRA is not run here",
                    cure="Merge it with peft, then use the merged model",
                )
        if isinstance(raw.get("init_lora_weights"), str) and raw["init_lora_weights"] not in (
            "gaussian",
            "orthogonal",
            "eva",
        ):
            raise ModelError(
                str(path),
                f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base",
                cure="Convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
        targets = raw.get("target_modules") or []
        return AdapterConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora")),
            dora=bool(raw.get("use_dora")),
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            tied=bool(raw.get("ensure_weight_tying")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(str(path), f"is not an adapter config ({error})", cure="Check the file") from None


def read_adapter_header(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of an adapter by PEFT's names. Raises ModelError if the file is missing or damaged."""
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(
            str(folder),
            f"has no {ADAPTER_WEIGHTS}",
            rule="adapters are safetensors",
            cure="Save it with safe_serialization=True",
        )
    return read_header(folder / ADAPTER_WEIGHTS)


def check_adapter(folder: Path, base: DecoderConfig) -> int:
    """Raise ModelError if the adapter in `folder` is damaged or of another base; as `check_model`, by headers alone.

    Returns the rows of the embedding that base and adapter have together: an adapter may add tokens. An adapter on what
    only the fallback runs is held against it when it is loaded.
    """
    config = read_adapter_config(folder)
    shapes = {name.removeprefix(PREFIX): t.shape for name, t in read_adapter_header(folder).items()}
    place, expected = str(folder / ADAPTER_WEIGHTS), list_expected(base) if base.own else {}
    for name, shape in sorted(shapes.items()) if base.own else ():
        module, _, part = name.rpartition(".lora_")
        weight = expected.get(f"{module}.weight") if module.endswith("_proj") else None
        rank = match_pattern(config.rank_pattern, module, config.rank)
        if weight and part == "A.weight":
            if len(shape) == 2 and shape[0] != rank:
                refuse_rank(place, name, shape[0], rank)
            check_shape(place, name, shape, (rank, weight[1]))
        elif weight and part == "B.weight":
            check_shape(place, name, shape, (weight[0], rank))
        elif weight and part == "magnitude_vector" and config.dora:
            check_shape(place, name, shape, (weight[0],))
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            check_shape(place, name, shape, (max([base.vocab_size, *shape[:1]]), base.hidden_size))
        else:
            refuse_tensor(place, name, shape)
    rows = (shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and shape)
    return max([base.vocab_size, *rows])


def refuse_tensor(place: str, name: str, shape: Sequence[int]) -> None:
    raise ModelError(
        place,
        f"{name} {list(shape)} has no place in this model",
        rule="adapter and base belong together",
        cure="Give the adapter's own base model",
    )


def refuse_rank(place: str, name: str, rank: int, stated: int) -> None:
    raise ModelError(
        place,
        f"{name} has rank {rank}, {ADAPTER_CONFIG} says {stated}",
        rule="weights and settings are of one adapter",
        cure=f"Give the {ADAPTER_CONFIG} that came with the weights",
    )


def check_shape(place: str, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ModelError(
            place,
            f"tensor {name} has shape {list(shape)}, this base asks for {list(expected)}",
            rule="adapter and base belong together",
            cure="Give the adapter's own base model",
        )


# --- what a job says of its adapters ----------------------------------------------------------------------------------


def check_lora(spec: LoraSpec, base: DecoderConfig) -> None:
    """Raise ModelError if `spec` asks for what the base, or the adapter to go on from, has not; by headers alone.

    Names in a model that only the fallback runs are looked at when it is loaded.
    """
    linears = [
        name.removesuffix(".weight")
        for name in (list_expected(base) if base.own else ())
        if name.endswith("_proj.weight")
    ]
    if spec.adapter is not None:
        folder = Path(spec.adapter)
        check_adapter(folder, base)
        marks = (name.removeprefix(PREFIX).partition(".lora_A.") for name in read_adapter_header(folder))
        adapted = {module for module, mark, _ in marks if mark}
        found = read_adapter_config(folder)
        check_continued(spec, found, spec.model_fields_set, adapted=adapted, linears=linears)
    elif base.own:
        find_targets(linears, spec.targets)
        check_modules(spec.modules_to_save)


def check_continued(
    spec: LoraSpec, found: AdapterConfig, said: Container[str], *, adapted: set[str], linears: Sequence[str]
) -> None:
    """Raise ModelError if what the job says contradicts the adapter it goes on from.

    said:    keys that the job gives; the adapter decides the others.
    adapted: linear layers that the adapter is on. linears: those of the base, empty where they are not known yet.
    """
    checks: dict[str, tuple[Any, Any]] = {
        "rank": (spec.rank, found.rank),
        "rslora": (spec.rslora, found.rslora),
        "dora": (spec.dora, found.dora),
        "alpha": (spec.alpha, found.alpha),
        "modules_to_save": (set(spec.modules_to_save), set(found.modules_to_save)),
    }
    if linears:
        checks["targets"] = (find_targets(linears, spec.targets), adapted)
    for key, (wanted, stored) in checks.items():
        if key in said and wanted is not None and wanted != stored:
            raise ModelError(
                f"method.{key}",
                f"the job and the adapter {spec.adapter} disagree",
                rule="a continued adapter keeps its shape",
                cure=f"Remove {key} from the job, or start a new adapter",
            )


def check_modules(modules: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raise ModelError for a module that cannot be trained whole. known: the model's own names of them."""
    for module in modules:
        if module not in ("embed_tokens", "lm_head", *known):
            raise ModelError(
                "method.modules_to_save",
                f"{module!r} cannot be trained whole",
                rule="embedding and head can",
                cure="Choose from embed_tokens, lm_head",
            )


def find_targets(names: Sequence[str], targets: str | Sequence[str]) -> set[str]:
    """Which of the linear layers `names` are meant by `targets`. Raises ModelError for one that fits none."""
    if targets == "all-linear":
        return set(names)
    found: set[str] = set()
    for target in targets:
        fits = {name for name in names if name == target or name.endswith("." + target)}
        if not fits:
            cure = (
                "Write modules_to_save: [lm_head] to train it whole"
                if target == "lm_head"
                else ("Choose from " + ", ".join(shorten(names)))
            )
            raise ModelError("method.targets", f"no linear layer ends in {target!r}", cure=cure)
        found |= fits
    return found


def shorten(names: Sequence[str] | set[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
