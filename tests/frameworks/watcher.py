"""What a worker does inside a framework: wrap forward, backward, clipping and the optimizer, and write what passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from tunesmith.core.fingerprint import hash_row
from tunesmith.core.parity import Example, ParameterGroup, ParityStep


class Watcher:
    """`end_step` closes a step; `steps` holds those closed."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, pad_id: int) -> None:
        self.model, self.optimizer, self.pad_id = model, optimizer, pad_id
        self.names = {p: plain_name(n) for n, p in model.named_parameters() if p.requires_grad}
        self.steps: list[ParityStep] = []
        self.state_dtypes: tuple[str, ...] | None = None
        self._start_step()

    def _start_step(self) -> None:
        self.examples: list[Example] = []
        self.loss = 0.0
        self.grad_norm: float | None = None
        self.applied_norm: float | None = None
        self.rates: tuple[float, ...] | None = None
        self.clip_norm = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        forward, backward = self.model.forward, torch.Tensor.backward
        clip_norm, clip_value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_

        def see_forward(*, labels: torch.Tensor, **inputs: torch.Tensor) -> Any:
            self.examples += self._read_rows(inputs, labels)
            return forward(**inputs)

        def see_backward(loss: torch.Tensor, *args: Any, **more: Any) -> None:
            self.loss += loss.item()
            backward(loss, *args, **more)

        def see_clip_norm(parameters: Any, max_norm: float, *args: Any, **more: Any) -> Any:
            self._see_gradient()
            self.clip_norm = max_norm
            return clip_norm(parameters, max_norm, *args, **more)

        def see_clip_value(parameters: Any, clip_value_: float) -> Any:
            self._see_gradient()
            return clip_value(parameters, clip_value_)

        hook = self.optimizer.register_step_pre_hook(self._see_step)
        self.model.forward, torch.Tensor.backward = see_forward, see_backward
        torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_ = see_clip_norm, see_clip_value
        try:
            yield
        finally:
            hook.remove()
            self.model.forward, torch.Tensor.backward = forward, backward
            torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_ = clip_norm, clip_value

    def _norm(self) -> float:
        norms = [p.grad.double().norm() for p in self.names if p.grad is not None]
        return float(torch.stack(norms).norm())

    def _see_gradient(self) -> None:
        if self.grad_norm is None:
            self.grad_norm = self._norm()

    def _see_step(self, *_: Any) -> None:
        self._see_gradient()
        self.applied_norm = self._norm()
        self.rates = tuple(float(group["lr"]) for group in self.optimizer.param_groups)

    def end_step(self) -> None:
        if not self.steps:
            states = [v for state in self.optimizer.state.values() for k, v in state.items() if k != "step"]
            self.state_dtypes = tuple(sorted({str(v.dtype)[6:] for v in states}))
        self.steps.append(
            ParityStep(
                tuple(self.examples), self.loss, self.grad_norm, self.rates, self.clip_norm, self.applied_norm
            )
        )
        self._start_step()

    def _read_rows(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[Example]:
        """Rows without padding: cut where positions begin anew if packed, else by the mask, else by the pad token."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            real = mask.bool()
        elif len(ids) == 1 and "position_ids" in inputs:
            starts = [*(inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist(), ids.shape[1]]
            return [as_example(ids[0, a:b], labels[0, a:b], 0) for a, b in pairwise(starts)]
        else:
            real = ids != self.pad_id
        return [
            as_example(i[r], lab[r], int((lab[~r] >= 0).sum()))
            for i, lab, r in zip(ids, labels, real, strict=True)
        ]

    def list_groups(self) -> tuple[ParameterGroup, ...]:
        kinds = {"AdamW": "adamw", "Adam": "adam", "SGD": "sgd", "RMSprop": "rmsprop"}
        kind = kinds[type(self.optimizer).__name__]
        return tuple(
            ParameterGroup(
                kind, tuple(self.names[p] for p in group["params"]), group["weight_decay"],
                *group.get("betas", (0.0, 0.0)), group.get("eps", 0.0),
            )
            for group in self.optimizer.param_groups
        )  # fmt: skip


def as_example(ids: torch.Tensor, labels: torch.Tensor, labelled_pads: int) -> Example:
    trained = (labels >= 0).long().tolist()
    return Example(hash_row(ids.tolist(), trained), len(trained), sum(trained), labelled_pads)


def sample_base(model: Any) -> dict[str, tuple[float, ...]]:
    """Sixteen values of every frozen linear layer but the head."""
    return {
        plain_name(name): tuple(layer.weight.flatten()[:: layer.weight.numel() // 16][:16].float().tolist())
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad and "lm_head" not in name
    }


def plain_name(name: str) -> str:
    """Without the prefixes that PEFT adds."""
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
