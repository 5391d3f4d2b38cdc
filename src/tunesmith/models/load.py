"""Open a model folder: config, checked weights, decoder. Never runs code from the folder, never reads pickle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.core.errors import ModelError
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.config import DecoderConfig, load_config
from tunesmith.models.decoder import Decoder
from tunesmith.models.fp8 import check_fp8_device
from tunesmith.models.headers import check_tensors, find_tensors, list_expected
from tunesmith.models.heap import keep_freed_memory
from tunesmith.models.weights import check_tied, read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.job.spec import Compute, Storage


def load_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: Storage = "full",
    double_quant: bool = True,
    compute: Compute = "auto",
    trainable: bool = False,
    master_dtype: torch.dtype = torch.float32,
    own_decoder: bool = True,
    on_reference: Callable[[CausalLM], None] | None = None,
    classifier: bool = False,
) -> CausalLM:
    """Model of a Hugging Face folder, in evaluation mode, frozen.

    dtype:       compute dtype, and storage of frozen weights.
    base:        storage of the linear layers' frozen weights; the rest stays in `dtype`.
    compute:     what products with an nf4 base are made in: `dtype`, or fp8. An fp8 base multiplies in fp8.
    trainable:   keep masters of all weights and train them (full fine-tuning).
    master_dtype: of the weights that are trained; bf16 only with an optimizer that rounds stochastically.
    own_decoder: False runs any model through the fallback, as a reference.
    on_reference: called before products are made in fp8, with the model as it multiplies in `dtype`: the weights of the
                 folder for an fp8 base, NF4 for nf4. On a GPU it still takes no more room than what comes after it.
    classifier:  the folder is a sequence classifier's, as a reward model is saved; refused otherwise.
    Raises ModelError, before anything is built, and SetupError for fp8 on a GPU that has none.
    """
    folder = Path(folder)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    if trainable and base != "full":
        raise ValueError("a quantised base cannot be trained whole")
    if compute == "bf16" and dtype != torch.bfloat16:
        raise ModelError(
            "method.compute",
            f"is bf16, and the precision is {str(dtype).removeprefix('torch.')}",
            cure="Set precision: bf16, or leave compute out",
        )
    in_fp8 = base == "fp8" or compute == "fp8"
    if in_fp8:
        place, cure = ("method.base", "full or nf4") if base == "fp8" else ("method.compute", "bf16 or auto")
        check_fp8_device(torch.device(device), place=place, cure=f"Write {place.partition('.')[2]}: {cure}")
    config = load_config(folder)
    check_kind(config, place=str(folder), classifier=classifier)
    stored = find_tensors(folder)
    if not (config.own and own_decoder):
        from tunesmith.models.fallback import load_fallback

        masters = master_dtype if trainable else None
        model: CausalLM = load_fallback(folder, config, stored, dtype=dtype, masters=masters)
    else:
        chosen = check_tensors(stored, list_expected(config), config, place=str(folder))
        tied_twice = {"lm_head.weight", "model.embed_tokens.weight"} & set(stored) if config.tied else set()
        tensors = read_tensors(stored, {*chosen.values(), *tied_twice})
        if config.tied:
            check_tied(tensors, place=str(folder))
        named = {name: tensors[source] for name, source in chosen.items()}
        score = named.pop("score.weight", None)
        model = Decoder(
            config, named, folder=folder, dtype=dtype, storage=master_dtype if trainable else dtype
        )
        if score is not None:
            model.add_score(score)
        del tensors, named
    if base != "full":
        from tunesmith.models.packed import lend_weights, pack_model, set_compute

        if base == "fp8" and on_reference:
            lend_weights(model)
            model = model.to(device)
            on_reference(model.eval())
        pack_model(model, base, double_quant=double_quant, device=device)
        if compute == "fp8":
            model = model.to(device)
            if on_reference:
                on_reference(model.eval())
            set_compute(model, "fp8")
    model = model.to(device)
    if trainable:
        model.make_trainable(master_dtype)
    return model.eval()


def check_kind(config: DecoderConfig, *, place: str, classifier: bool) -> None:
    """Raise ModelError if a sequence classifier is taken for a language model, or the other way round."""
    if config.is_classifier == classifier:
        return
    finding, rule = "is a sequence classifier", "a language model predicts tokens"
    if classifier:
        finding, rule = "is no sequence classifier", "a reward model scores answers"
    cure = "Give a folder that objective: reward has made" if classifier else "Give a language model"
    raise ModelError(place, finding, rule=rule, cure=cure)
