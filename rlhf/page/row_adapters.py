"""Adapters of one base, each row of a batch with its own, and with a weight for each of them.

    y[row] = W x[row] + sum over adapters of  weight[row, adapter] * s B A x[row]

The base's product is one for all rows, so that a batch reads the base's weights once however many versions are in it.
The adapters' factors stand behind one another, A = [A1; A2; ...] and B = [s1 B1, s2 B2, ...], and of A x each row
keeps the parts of its own adapters: two small products for all versions. Terms are added, never factors.
"""

from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


class RowAdapters:
    """Sets which adapters the layers of a model compute with; outside of `active` peft's own choice stands."""

    def __init__(self, model: nn.Module):
        self.now: Mix | None = None
        for module in model.modules():
            if isinstance(module, LoraLayer):
                # For good, and hands on outside of `active`: putting it in and out would touch every layer at every
                # token.
                module.forward = RowForward(module, self)

    @contextmanager
    def active(self, rows: list[dict[str, float]]):
        """Within the block each row has its own adapters: name in memory -> weight, empty for the bare base."""
        self.now = Mix(rows)
        try:
            yield
        finally:
            self.now = None


class Mix:
    """The adapters of a batch.

    names: those that any row has. weights: [rows, names], 0 where a row has an adapter not.
    """

    def __init__(self, rows: list[dict[str, float]]):
        used: set[str] = set()
        for adapters in rows:
            used |= {name for name, weight in adapters.items() if weight != 0}
        self.names = tuple(sorted(used))
        # On the CPU: the layers move what they need of it, once for each pattern of ranks.
        self.weights = torch.tensor([[adapters.get(name, 0.0) for name in self.names] for adapters in rows])
        self._columns: dict[tuple[int, ...], tuple[Tensor, Tensor] | None] = {}

    def columns(self, ranks: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Weight of each column of A x, and True where it is none of the row's: [rows, sum of ranks] each.

        None where every row has every column as it is. ranks: of each name; most layers have the same.
        """
        # Kept for the batch: hundreds of layers have the same ranks.
        if ranks not in self._columns:
            weights = self.weights.repeat_interleave(torch.tensor(ranks), 1).to(like.device, like.dtype)
            plain = bool((weights == 1).all())
            self._columns[ranks] = None if plain else (weights, weights == 0)
        return self._columns[ranks]


class RowForward:
    """Stands in for the `forward` of one of peft's layers, as long as rows have adapters of their own."""

    def __init__(self, layer: LoraLayer, adapters: RowAdapters):
        self.layer = layer
        self.adapters = adapters
        self.usual = layer.forward
        # Names, and their factors behind one another: batches of the same versions follow each other.
        self.stacked: tuple = ((), None)

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        """y [rows, ..., out] of x [rows, ..., in]."""
        mix = self.adapters.now
        if mix is None:
            return self.usual(x, *args, **kwargs)
        layer = self.layer
        base = layer.base_layer(x, *args, **kwargs)

        # Not every layer has every adapter; a variant of LoRA (DoRA is one) or an embedding computes something else.
        plain = tuple(name for name in mix.names if name in layer.lora_A and name not in layer.lora_variant)
        others = [name for name in mix.names if name not in plain]
        # Rows of the bare base take part in the products too: to sort them out would cost more.
        y = self.plain_terms(x, base, mix, plain) if plain else base
        for name in others:
            if name in layer.lora_A or name in layer.lora_embedding_A:
                y = y + self.other_term(x, base, mix, name)
        return y.to(base.dtype)

    def plain_terms(self, x: Tensor, base: Tensor, mix: Mix, names: tuple[str, ...]) -> Tensor:
        """The base's result with the terms of plain LoRA."""
        a, b, ranks = self.factors(names)
        down = linear(x.to(a.dtype), a)
        # A version that this layer lacks has no columns in it.
        if names != mix.names:
            ranks = tuple(ranks[names.index(name)] if name in names else 0 for name in mix.names)
        columns = mix.columns(ranks, a)
        if columns is not None:
            weights, none = (x.view(len(x), *[1] * (down.dim() - 2), -1) for x in columns)
            # Filled, not multiplied: another version's overflow would come through as infinity times nothing.
            down = down.masked_fill(none, 0) * weights
        return base + linear(down, b)

    def factors(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """A [sum of ranks, in], B [out, sum of ranks] with the scaling in it, and the rank of each name."""
        # The weights do not change while a page is open.
        if self.stacked[0] != names:
            layer = self.layer
            a = [layer.lora_A[name].weight for name in names]
            b = [layer.lora_B[name].weight * layer.scaling[name] for name in names]
            self.stacked = (names, (torch.cat(a), torch.cat(b, 1), tuple(map(len, a))))
        return self.stacked[1]

    def other_term(self, x: Tensor, base: Tensor, mix: Mix, name: str) -> Tensor:
        """Whatever peft makes of an adapter, less the base."""
        weights = mix.weights[:, mix.names.index(name)].to(base.device)
        term = self.layer._mixed_batch_forward(x, adapter_names=[name] * len(x)) - base
        weights = weights.view(-1, *[1] * (base.dim() - 1))
        return (term * weights).masked_fill(weights == 0, 0)
