"""Decoding one token per row at a time: a cache that grows in place, or static shapes in a CUDA graph on a GPU.

Both decoders offer `prefill`, `goes_on`, `next` and `keep`. `every`: tokens between two checks for finished rows (a
check synchronises the GPU). `shrink`: the share of unfinished rows at or below which finished rows are removed.
"""

import warnings

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from rlhf.models.forward import accepts, forward, parts_by_length, position_ids
from rlhf.models.fusing import cache_kernels, kernels_available
from rlhf.models.kernels import BY_ROW
from rlhf.run.stopping import received

# A multiple that attention kernels like, for the room of a static cache.
ROOM_MULTIPLE = 64


def decoder_of(model: PreTrainedModel, query_ids: Tensor, query_mask: Tensor, total: int, static: bool):
    """The decoder for this model and device, for queries [B, Q] padded on the left and `total` tokens at most.

    `static` allows the one of static shapes, which only a GPU gains from.
    """
    kind = StaticDecoder if static and query_ids.is_cuda and supports_static_cache(model) else GrowingDecoder
    return kind(model, query_ids, query_mask, total)


def goes_on(ended: Tensor) -> bool:
    """Return True if a row [B] has not ended yet, and no signal came."""
    return bool((~ended).any()) and not received()


def supports_static_cache(model: PreTrainedModel) -> bool:
    """Return True if one mask serves all layers, and the architecture keeps to fixed shapes."""
    attention = model.config._attn_implementation
    if not getattr(model, "_can_compile_fullgraph", False) or attention not in ("sdpa", BY_ROW):
        return False
    # Other kinds choose their frequencies in Python by the longest position, and a recording would freeze the choice.
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return False
    # Layers with a window have a class of their own: the one mask of `StaticDecoder` would not serve them.
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers)


def next_logits(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: Cache, positions: Tensor | None = None, **more
) -> tuple[Tensor, Tensor]:
    """Logits [B, V] and hidden [B, H] after the new tokens [B, L].

    Args:
        mask: [B, whole length] of rows padded on the left; or, with positions [B, L], [B, 1, L, room] as attention
            takes it. more: for the model's attention.
    """
    if positions is None:
        # Of the new tokens alone: keys in the cache are rotated already.
        positions = position_ids(mask)[:, -tokens.shape[1] :]
        mask = mask.long()
    inputs = {"position_ids": positions} if accepts(type(model), "position_ids") else {}
    inputs |= {"attention_mask": mask, "past_key_values": cache, "use_cache": True} | more
    # The last column is every row's newest token, as padding is on the left.
    return forward(model, (slice(None), -1), tokens, **inputs)


# ---- a cache written in place ----
class RoomyLayer(DynamicLayer):
    """A cache layer with room for all tokens from the start: a new one is written, and the old ones are not copied."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, new, dim] behind those there are; returns all of them, as views."""
        start = self.get_seq_length()
        if not start:
            self.make_room(key_states, value_states, len(key_states))
        end = start + key_states.shape[2]
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states
        return self.show(end)

    def make_room(self, key_states: Tensor, value_states: Tensor, rows: int) -> None:
        """Memory for that many rows of keys and values like these."""
        self.lazy_initialization(key_states, value_states)
        # Zeros, not memory as it is found: a masked column has weight 0, and 0 times a NaN in it would still be NaN.
        self.stores = [x.new_zeros(rows, x.shape[1], self.room, x.shape[3]) for x in (key_states, value_states)]

    def show(self, end: int) -> tuple[Tensor, Tensor]:
        """All keys and values before column `end`, as views; those are what the layer holds from now on."""
        self.keys, self.values = (store[:, :, :end] for store in self.stores)
        return self.keys, self.values

    def place(self, rows: Tensor, of: int, end: int, part: DynamicLayer) -> None:
        """Put what another cache layer holds into these rows (of so many), its last column before column `end`."""
        if not self.is_initialized:
            self.make_room(part.keys, part.values, of)
        for store, states in zip(self.stores, (part.keys, part.values), strict=True):
            store[rows, :, end - states.shape[2] : end] = states
        self.show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows (in rising order), in the same memory."""
        end = self.get_seq_length()
        for store in self.stores:
            store[: len(indices), :, :end] = store[indices, :, :end]
        self.stores = [store[: len(indices)] for store in self.stores]
        self.show(end)


def roomy_cache(model: PreTrainedModel, room: int) -> Cache:
    """A cache of `room` tokens a row for this model; layers that only keep a window grow as they always do."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingDecoder:
    """For any model on any device: attention over the tokens so far, rows dropped as soon as they have ended."""

    every = 1
    goes_on = staticmethod(goes_on)

    def __init__(self, model: PreTrainedModel, query_ids: Tensor, query_mask: Tensor, total: int):
        self.model = model
        self.query_ids = query_ids
        self.mask = query_mask
        self.cache = roomy_cache(model, query_ids.shape[1] + total)

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and hidden [B, H] after the queries, the short ones apart from the long ones."""
        parts = self.query_parts()
        if len(parts) == 1:
            return next_logits(self.model, self.query_ids, self.mask, self.cache)

        outputs = []
        (total, end) = self.mask.shape

        for rows in parts:
            width = max(1, int(self.mask[rows].sum(1).max()))
            cache = DynamicCache(config=self.model.config)
            outputs.append(next_logits(self.model, self.query_ids[rows, -width:], self.mask[rows, -width:], cache))
            for layer, part in zip(self.cache.layers, cache.layers, strict=True):
                layer.place(rows, total, end, part)

        order = torch.cat(parts).argsort()
        return tuple(torch.cat(results)[order] for results in zip(*outputs, strict=True))

    def query_parts(self) -> list[Tensor]:
        """Row indices of each forward that `prefill` makes."""
        if all(type(layer) is RoomyLayer for layer in self.cache.layers):
            return parts_by_length(self.mask.sum(1))
        return [torch.arange(len(self.mask), device=self.mask.device)]

    def next(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and hidden states after one more token [B] per row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        return next_logits(self.model, tokens[:, None], self.mask, self.cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    @property
    def shrink(self) -> float:
        """Share of unfinished rows from which on finished ones are dropped; layers with linear attention keep all."""
        return 1.0 if all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers) else 0.0


# ---- static shapes ----
class ColumnLayer(StaticLayer):
    """A static cache layer that writes the newest token's keys and values in one kernel.

    column: [1] int32 on the GPU, where they go; its decoder moves it on.
    """

    def __init__(self, room: int, column: Tensor):
        super().__init__(max_cache_len=room)
        self.column = column

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, new, dim]; returns the whole room, of which attention reads a part."""
        if not self.is_initialized or key_states.shape[2] > 1:
            return super().update(key_states, value_states, *args, **kwargs)
        cache_kernels().write_cache(key_states, value_states, self.keys, self.values, self.column)
        return self.keys, self.values


class StaticDecoder:
    """For a GPU: every step has the same shapes and addresses, so that one recorded CUDA graph plays all of them.

    A decoding step of 7B is over a thousand small kernels, which a GPU gets through faster than Python launches them.
    Rows that have ended go on being computed until half are left; then the rest moves into a cache of its own and is
    recorded anew. Attention reads the columns that are used and no others where the model takes our kernel for it;
    otherwise a mask of the cache's whole room leaves the others out.
    """

    every = 8
    shrink = 0.5
    goes_on = staticmethod(goes_on)

    def __init__(self, model: PreTrainedModel, query_ids: Tensor, query_mask: Tensor, total: int):
        self.model = model
        self.query_ids = query_ids
        self.query_mask = query_mask
        room = -(-(query_ids.shape[1] + total) // ROOM_MULTIPLE) * ROOM_MULTIPLE
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        # Which columns of the cache a row may look at; the first of them, and the last, alike for all rows.
        self.seen = torch.zeros(len(query_ids), room, dtype=torch.bool, device=query_ids.device)
        self.seen[:, : query_ids.shape[1]] = query_mask
        self.first = (query_ids.shape[1] - query_mask.sum(1)).to(torch.int32)
        self.column = torch.full((1,), query_ids.shape[1] - 1, dtype=torch.int32, device=query_ids.device)
        # The trial for packing showed that this model hands on to its attention what it does not know.
        self.by_column = kernels_available() and model.config._attn_implementation == BY_ROW
        if self.by_column:
            self.cache.layers = [ColumnLayer(room, self.column) for _ in self.cache.layers]
        # The newest tokens, and their places in their rows.
        self.tokens = query_ids[:, -1:].clone()
        self.positions = query_mask.sum(1, keepdim=True) - 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and hidden [B, H] after the queries."""
        return next_logits(self.model, self.query_ids, self.query_mask, self.cache)

    def next(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and hidden states after one more token [B] per row; the next call overwrites them."""
        # Into the memory that the recording reads: it would never see a tensor of another address.
        self.tokens.copy_(tokens[:, None])
        if self.graph is None and self.warm and tokens.is_cuda:
            self.record()
        if self.graph is None:
            # The first step of a shape runs as it is: libraries choose and allocate what a recording must not.
            self.warm = True
            return self._step()
        self.graph.replay()
        return self.result

    def record(self) -> None:
        """Record a step; nothing is computed by it."""
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.result = self._step()
        except RuntimeError as error:
            warnings.warn(f"this model's decoding cannot be recorded ({error}): it is slower", stacklevel=2)
            # Not tried again: an instance attribute hides the method.
            self.graph = None
            self.record = lambda: None

    def _step(self) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of the newest tokens, one column and one position on."""
        # In place and on the GPU, so that these two additions are part of what is recorded.
        self.column += 1
        self.positions += 1
        more = {"columns": (self.first, self.column)} if self.by_column else {}
        if not self.by_column:
            self.seen.index_fill_(1, self.column.long(), True)
        return next_logits(self.model, self.tokens, self.seen[:, None, None], self.cache, self.positions, **more)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in memory of their own."""
        self.tokens = self.tokens[rows]
        self.seen = self.seen[rows]
        self.first = self.first[rows]
        self.positions = self.positions[rows]
        for layer in self.cache.layers:
            layer.keys = layer.keys[rows]
            layer.values = layer.values[rows]
            layer.batch_size = len(rows)
        # The rows have new addresses now, and a recording is of the old ones.
        self.graph = None
        self.warm = False
