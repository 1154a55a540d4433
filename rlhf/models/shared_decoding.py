"""Decoding with a base in shards: in place, or over gathered layers in step with the other processes.

In place (tensor_parallel.py) every process computes its part of the rows of all. Over gathered layers each computes
its own rows, and all take as many steps as the longest answer needs: a process whose rows have ended, or that has
none, runs the layers on one token, whose result nobody looks at.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from rlhf.models import decoding
from rlhf.models.forward import forward
from rlhf.models.shards import any_of, mesh_of, missing
from rlhf.models.tensor_parallel import exchange, prepare
from rlhf.run.stopping import received


def decoder_of(model: PreTrainedModel, query_ids: Tensor, query_mask: Tensor, total: int, static: bool):
    """The decoder for this model and device, for queries [B, Q] padded on the left and `total` tokens at most.

    `static` allows the one of static shapes, which only a GPU gains from.
    """
    in_place = getattr(model, "decodes_over", None)
    if in_place is not None:
        return InPlace(model, in_place, query_ids, query_mask, total, static)
    mesh = mesh_of(model)
    if mesh is None:
        return decoding.decoder_of(model, query_ids, query_mask, total, static)
    # Layers that are gathered as they run cannot be recorded.
    decoder = decoding.GrowingDecoder(model, query_ids, query_mask, total)
    return InStep(decoder, mesh, len(query_ids))


# ---- in step ----
class InStep:
    """A growing decoder over a base in shards: as many forwards on each process as on the others.

    A process whose rows have all ended gets no rows back: it neither records nor draws anything.
    """

    every = decoding.GrowingDecoder.every

    def __init__(self, decoder: decoding.GrowingDecoder, mesh: DeviceMesh, rows: int):
        self.decoder = decoder
        self.mesh = mesh
        self.rows = rows
        self.shrink = decoder.shrink

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and hidden [B, H] after the queries."""
        own = len(self.decoder.query_parts()) if self.rows else 0
        # Asked first: the forwards of one process meet those of the others.
        spare = missing(self.mesh, own)
        output = self.decoder.prefill() if own else idle(self.decoder.model)
        # A process without rows has made one forward already, in place of its own.
        for _ in range(spare if own else spare - 1):
            idle(self.decoder.model)
        return output

    def goes_on(self, ended: Tensor) -> bool:
        """Return True if any process has rows [B] that have not ended, and none of them got a signal. Collective."""
        # Both in one meeting: a process that stopped at its own signal would leave the others waiting in the next
        # layer.
        unfinished, signum = any_of(self.mesh, bool((~ended).any()), received())
        return bool(unfinished) and not signum

    def next(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and hidden states after one more token [B] per row."""
        return self.decoder.next(tokens) if self.rows else idle(self.decoder.model)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.rows = len(rows)
        if self.rows:
            self.decoder.keep(rows)


@torch.no_grad()
def idle(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Run the layers on one token; returns no rows of logits [0, V] and hidden states [0, H]."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    logits, hidden = forward(model, (slice(None), -1), token, use_cache=False)
    return logits[:0], hidden[:0]


# ---- in place ----
class InPlace:
    """A decoder of the rows of all processes that share the base, on each of them; it shows this process its own.

    Rows leave the batch as they would if the process were alone, so that each row has the same draws.
    """

    def __init__(self, twin: PreTrainedModel, mesh: DeviceMesh, query_ids: Tensor, query_mask: Tensor, total, static):
        prepare(twin)
        self.group = mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()
        # Rows that each process still computes; all processes know of all.
        self.counts = [int(count) for count in self.exchange(query_ids.new_tensor([len(query_ids)]))[:, 0]]
        width = int(self.exchange(query_ids.new_tensor([query_ids.shape[1]])).max())
        ids, mask = (self.rows_of_all(x, width) for x in (query_ids, query_mask.to(query_ids.dtype)))
        self.decoder = decoding.decoder_of(twin, ids, mask.bool(), total, static)
        self.every = self.decoder.every
        self.shrink = self.decoder.shrink

    def exchange(self, x: Tensor) -> Tensor:
        """[size, N, *] of what each process has, x [N, *]."""
        return exchange(self.group, self.size, x)

    def rows_of_all(self, x: Tensor, width: int) -> Tensor:
        """[rows of all, width] of this process's rows x [rows, *], padded on the left."""
        padded = x.new_zeros(max(self.counts), width)
        padded[: len(x), width - x.shape[1] :] = x
        parts = self.exchange(padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        """This process's rows of x [rows of all, *]."""
        start = sum(self.counts[: self.rank])
        return x[start : start + self.counts[self.rank]]

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and hidden [B, H] after the queries."""
        logits, hidden = self.decoder.prefill()
        return self.own(logits), self.own(hidden)

    def next(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and hidden states after one more token [B] per row."""
        logits, hidden = self.decoder.next(self.rows_of_all(tokens[:, None], 1)[:, 0])
        return self.own(logits), self.own(hidden)

    def goes_on(self, ended: Tensor) -> bool:
        """Return True if any process has rows [B] that have not ended, and none of them got a signal.

        Collective; the rows that each process is about to leave out are left out here, on all.
        """
        marks = ended.new_zeros(max(self.counts) + 1, dtype=torch.int32)
        marks[: len(ended)] = ended.int()
        marks[-1] = received()
        gathered = self.exchange(marks)
        if gathered[:, -1].any():
            return False

        kept = []
        counts = []
        start = 0
        for marked, count in zip(gathered[:, :-1].bool(), self.counts, strict=True):
            rows = (~marked[:count]).nonzero().squeeze(1)
            # The rule of `generate`.
            leaves = len(rows) <= self.shrink * count and len(rows) < count
            rows = rows if leaves else torch.arange(count, device=rows.device)
            kept.append(rows + start)
            counts.append(len(rows))
            start = start + count
        unfinished = bool((gathered[:, :-1] == 0)[self._real(gathered)].any())
        if unfinished and counts != self.counts:
            self.decoder.keep(torch.cat(kept))
            self.counts = counts
        return unfinished

    def _real(self, gathered: Tensor) -> Tensor:
        """[size, most rows] bool: the marks of rows, not of padding."""
        columns = torch.arange(gathered.shape[1] - 1, device=gathered.device)
        return columns[None] < torch.tensor(self.counts, device=gathered.device)[:, None]

    def keep(self, rows: Tensor) -> None:
        """Nothing is left to do: `goes_on` left these rows and no others."""
