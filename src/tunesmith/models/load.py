"""Open a model folder: config, checked weights, decoder. Never runs code from the folder, never reads pickle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.config import load_config
from tunesmith.models.decoder import Decoder
from tunesmith.models.headers import check_tensors, find_tensors, list_expected
from tunesmith.models.heap import keep_freed_memory
from tunesmith.models.weights import check_tied, read_tensors

if TYPE_CHECKING:
    from tunesmith.job.spec import Storage


def load_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: Storage = "full",
    double_quant: bool = True,
    trainable: bool = False,
    master_dtype: torch.dtype = torch.float32,
    own_decoder: bool = True,
) -> CausalLM:
    """Model of a Hugging Face folder, in evaluation mode, frozen.

    dtype:       compute dtype, and storage of frozen weights.
    base:        storage of the linear layers' frozen weights; the rest stays in `dtype`.
    trainable:   keep masters of all weights and train them (full fine-tuning).
    master_dtype: of the weights that are trained; bf16 only with an optimizer that rounds stochastically.
    own_decoder: False runs any model through the fallback, as a reference.
    Raises ModelError, before anything is built.
    """
    folder = Path(folder)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    if trainable and base != "full":
        raise ValueError("a quantised base cannot be trained whole")
    config = load_config(folder)
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
        model = Decoder(
            config, named, folder=folder, dtype=dtype, storage=master_dtype if trainable else dtype
        )
        del tensors, named
    if base != "full":
        from tunesmith.models.quant import pack_model

        pack_model(model, base, double_quant=double_quant, device=device)
    model = model.to(device)
    if trainable:
        model.make_trainable(master_dtype)
    return model.eval()
