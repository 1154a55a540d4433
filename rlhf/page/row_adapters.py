"""Adapters of one base, each row of a batch with its own, and with a weight for each of them.

    y[row] = W x[row] + sum over the row's adapters of  weight * s (x[row] A') B'

The base's product is one for all rows, so that a batch reads the base's weights once however many versions are in it.
The terms are added, never the factors: half of one adapter and half of another is not the adapter of mean factors.
"""

from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

# An adapter, its weight, and the rows that it is for; None for all of them.
Term = tuple[str, float, Tensor | None]


class RowAdapters:
    """Sets which adapters the layers of a model compute with; outside of `active` peft's own choice stands."""

    def __init__(self, model: nn.Module):
        self.terms: list[Term] | None = None
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.forward = RowForward(module, self)

    @contextmanager
    def active(self, rows: list[dict[str, float]]):
        """Within the block each row has its own adapters: name in memory -> weight, empty for the bare base."""
        self.terms = terms_of(rows)
        try:
            yield
        finally:
            self.terms = None


def terms_of(rows: list[dict[str, float]]) -> list[Term]:
    """The terms of a batch: rows that share an adapter and its weight are computed together."""
    places: dict[tuple[str, float], list[int]] = {}
    for place, adapters in enumerate(rows):
        for name, weight in adapters.items():
            if weight != 0:
                places.setdefault((name, weight), []).append(place)
    return [
        (name, weight, None if len(index) == len(rows) else torch.tensor(index))
        for (name, weight), index in places.items()
    ]


class RowForward:
    """Stands in for the `forward` of one of peft's layers, as long as rows have adapters of their own."""

    def __init__(self, layer: LoraLayer, adapters: RowAdapters):
        self.layer = layer
        self.adapters = adapters
        self.usual = layer.forward

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        """y [rows, ..., out] of x [rows, ..., in]."""
        if self.adapters.terms is None:
            return self.usual(x, *args, **kwargs)

        base = self.layer.base_layer(x, *args, **kwargs)
        y = base
        for name, weight, rows in self.adapters.terms:
            if rows is None:
                y = (y + weight * self.term(name, x, base)).to(base.dtype)
                continue
            # The base's own result is still needed where another adapter of the row reads it.
            y = base.clone() if y is base else y
            rows = rows.to(x.device)
            y[rows] = (y[rows] + weight * self.term(name, x[rows], base[rows])).to(base.dtype)
        return y

    def term(self, name: str, x: Tensor, base: Tensor) -> Tensor | float:
        """What an adapter adds for these rows of x, of which the base alone gives `base`."""
        layer = self.layer
        if name in layer.lora_A and name not in layer.lora_variant:
            a = layer.lora_A[name]
            return layer.lora_B[name](a(x.to(a.weight.dtype))) * layer.scaling[name]
        if name in layer.lora_A or name in layer.lora_embedding_A:
            # A variant of LoRA (DoRA is one) or an embedding: whatever peft makes of it, less the base.
            return layer._mixed_batch_forward(x, adapter_names=[name] * len(x)) - base
        # Not every layer has this adapter.
        return 0.0
