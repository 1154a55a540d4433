"""A batch that rows join and leave while it runs, each with its own adapters.

    columns   0 1 2 3 4 5 6          all rows end at the same column, where the next token is written;
    row 0     . . a b c d e          each begins at a column of its own, and the mask hides what is before it
    row 1     . . . . x y z

Aligned at the end, so that one mask and one set of positions serve every architecture, sliding windows and ALiBi among
them. A row that joins is read by itself first; columns that no row needs any more are dropped when room is made.
"""

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.models.decoding import next_logits
from rlhf.models.linear import FrozenForward
from rlhf.page.row_adapters import RowAdapters
from rlhf.page.rows import Row

# Columns are made this many at a time.
ROOM = 128

# Elements of a weight from which on the choice of the kernel pays for a few rows.
WIDE = 1 << 21

# Of a model that names no limit.
MOST_POSITIONS = 1 << 17


class RowsLayer(DynamicLayer):
    """A cache layer of the batch: keys and values in stores [slots, heads, room, dim], of which a part is in use."""

    def __init__(self):
        super().__init__()
        self.stores: list[Tensor] = []
        self.rows = 0
        self.end = 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.end

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write keys and values [rows, heads, new, dim] behind those there are; returns all of them, as views."""
        start = self.end
        self.end += key_states.shape[2]
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[: self.rows, :, start : self.end] = states
        keys, values = (store[: self.rows, :, : self.end] for store in self.stores)
        return keys, values

    def rearrange(self, first: int, end: int, slots: int, room: int, like: DynamicLayer | None) -> None:
        """Move the columns from `first` on so that they end at column `end`, in stores of that many slots and columns.

        like: a layer to take the shape of heads from, where there is no store yet.
        """
        # Of the columns before `first` no row needs any.
        width = self.end - first
        stores = []
        for place, pattern in enumerate(self.stores or (like.keys, like.values)):
            # Zeros and not memory as it is found, where a NaN would come through the mask.
            store = pattern.new_zeros(slots, pattern.shape[1], room, pattern.shape[3])
            if self.stores and width:
                store[: self.rows, :, end - width : end] = self.stores[place][: self.rows, :, first : self.end]
            stores.append(store)
        self.stores = stores
        self.end = end

    def append(self, part: DynamicLayer) -> None:
        """Add a row: keys and values of another layer [1, heads, length, dim], its last column before `end`."""
        for store, states in zip(self.stores, (part.keys, part.values), strict=True):
            start = self.end - states.shape[2]
            # A NaN that an earlier row left would come through the mask: nothing times NaN is NaN.
            store[self.rows, :, :start] = 0
            store[self.rows, :, start : self.end] = states[0]
        self.rows += 1

    def remove(self, row: int) -> None:
        """Take a row out; the last one gets its place."""
        # The mask leaves columns before a row's start out, so that only its keys and values have to move, not those
        # behind it.
        self.rows -= 1
        for store in self.stores:
            store[row, :, : self.end] = store[self.rows, :, : self.end]


def own_cache(model: PreTrainedModel) -> tuple[Cache, bool]:
    """A cache for one row by itself, and whether the row can join others.

    A layer that keeps a window keeps all columns here: the mask leaves out what is outside of the window.
    """
    cache = DynamicCache(config=model.config)
    joins = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if joins:
        cache.layers = [DynamicLayer() for _ in cache.layers]
    return cache, joins


class Batch:
    """Rows that are decoded together, one token each at a step."""

    def __init__(self, model: PreTrainedModel, adapters: RowAdapters, max_rows: int):
        self.model = model
        self.adapters = adapters
        self.max_rows = max_rows
        # Layers with linear attention, whose state has no columns, keep every row by itself.
        self.joins = own_cache(model)[1]
        self.clear()

    def clear(self) -> None:
        """Forget all rows and their memory."""
        self.rows: list[Row] = []
        # Column at which each row begins.
        self.starts: list[int] = []
        self.cache = DynamicCache(config=self.model.config)
        self.cache.layers = [RowsLayer() for _ in self.cache.layers]
        self.slots = 0
        self.room = 0
        self.end = 0

    def read(self, row: Row, most: int) -> Tensor | None:
        """Read up to `most` more tokens of a row's prompt; logits [V] after the last of them, else None."""
        if row.cache is None:
            row.cache = own_cache(self.model)[0]
        # A model that keeps a state in place of columns reads its prompt at once.
        end = min(len(row.query_ids), row.read + most) if self.joins else len(row.query_ids)
        tokens = torch.tensor([row.query_ids[row.read : end]], device=self.model.device)
        logits = self._logits([row], tokens, torch.ones(1, end, dtype=torch.bool), row.cache)
        row.read = end
        return logits[0] if end == len(row.query_ids) else None

    def join(self, row: Row) -> None:
        """Let a row that has been read decode with the others from the next step on."""
        if self.joins:
            # The longest row sets the end for all; a longer one that joins moves the others to the right.
            length = len(row.query_ids)
            end = max(self.end, length)
            slots = self.slots
            if len(self.rows) == slots:
                # Doubled, so that a batch that fills up copies its memory a few times and not for every row.
                slots = min(self.max_rows, max(1, 2 * slots))
            if slots > self.slots or end > self.end:
                self._rearrange(end, slots, row.cache)
            for layer, part in zip(self.cache.layers, row.cache.layers, strict=True):
                layer.append(part)
            row.cache = None
            self.starts.append(self.end - length)
        self.rows.append(row)

    def leave(self, place: int) -> None:
        """Take the row at this place out; the last row gets its place."""
        # Nothing is kept for an empty batch: the next one begins at column 0.
        if len(self.rows) == 1:
            return self.clear()
        if self.joins:
            for layer in self.cache.layers:
                layer.remove(place)
            self.starts[place] = self.starts[-1]
            self.starts.pop()
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def step(self) -> Tensor:
        """Logits [rows, V] after the newest token of each row."""
        device = self.model.device
        newest = torch.tensor([[row.token_ids[-1]] for row in self.rows], device=device)
        if not self.joins:
            return torch.cat([self._alone(row, token[None]) for row, token in zip(self.rows, newest, strict=True)])

        if self.end == self.room:
            # Rows that began long ago may have left: their columns go.
            self._rearrange(self.end - min(self.starts), self.slots, None)
        self.end += 1
        # Made on the CPU, where the starts are: one copy of a small mask in place of one for every start.
        columns = torch.arange(self.end)
        mask = columns >= torch.tensor(self.starts)[:, None]
        return self._logits(self.rows, newest, mask, self.cache)

    def _alone(self, row: Row, token: Tensor) -> Tensor:
        """Logits [1, V] of a row that cannot join others, after its newest token [1, 1]."""
        length = len(row.query_ids) + len(row.token_ids)
        return self._logits([row], token, torch.ones(1, length, dtype=torch.bool), row.cache)

    def _rearrange(self, end: int, slots: int, like: Cache | None) -> None:
        """Make room: the columns that are in use end at column `end` from now on, with free ones behind."""
        first = min(self.starts, default=self.end)
        # At least one free column, for the token that comes next.
        self.room = (end // ROOM + 1) * ROOM
        layers = like.layers if like else [None] * len(self.cache.layers)
        for layer, pattern in zip(self.cache.layers, layers, strict=True):
            layer.rearrange(first, end, slots, self.room, pattern)
        self.starts = [start + end - self.end for start in self.starts]
        self.slots = slots
        self.end = end

    def _logits(self, rows: list[Row], tokens: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Logits [rows, V] after new tokens [rows, L], each row with its own adapters."""
        # In the order of the batch's rows, which is that of `leave` too.
        with self.adapters.active([row.adapters for row in rows]):
            return next_logits(self.model, tokens, mask.to(tokens.device), cache)[0]


def positions_of(model: PreTrainedModel) -> int:
    """Tokens that prompt and answer may have together, as the model has it, or MOST_POSITIONS."""
    text = model.config.get_text_config()
    # What the base was trained with: rotary positions would go on, and the answers would not.
    limit = getattr(text, "max_position_embeddings", None) or MOST_POSITIONS
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond it such a model computes all positions anew, and what is in the cache would not fit.
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return min(limit, MOST_POSITIONS)


def speed_up(model: nn.Module) -> None:
    """Let the wide linear layers of a model on a CPU compute by the kernel that takes half the time for a few rows."""
    for module in model.modules():
        # The exact type: a subclass computes something else. Narrow layers gain nothing.
        if type(module) is nn.Linear and module.weight.is_cpu and module.weight.numel() >= WIDE:
            module.forward = FrozenForward(module)
