"""Attention over packed rows, registered with transformers under a name of its own; one kernel for all rows on a GPU.

Source: Dao 2023, arXiv:2307.08691 (attention).
"""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.fusing import cache_kernels

# Name of `attend_by_row` among transformers' kinds of attention.
BY_ROW = "sdpa_by_row"


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if there is a flash attention kernel for these queries [1, heads, N, dim], keys and values.

    Keys and values may have fewer heads. The kernel needs a GPU that has it and half precision, and is not used where
    torch.backends.cuda.enable_flash_sdp switched it off.
    """
    # PyTorch's own attention pads heads of another size for the kernel, which is called directly here.
    if not query.is_cuda or query.shape[-1] % 8:
        return False
    # Grouped queries: not every kernel takes keys of fewer heads.
    fewer = key.shape[1] != query.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, fewer))


def flash_by_row(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """[1, N, heads, dim]: causal attention within each row of queries [1, heads, N, dim], keys and values.

    bounds: [B + 1] int32, where each row begins, and N. longest: length of the longest row.
    """
    # The kernel takes tokens first, [N, heads, dim], the rows one after the other. The backward of an index would copy
    # each gradient into zeros; that of `squeeze` is a view.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # Bounds and longest row stand twice, for queries and for keys; then dropout, causal, and no debug mask.
    output = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return output[0][None]


# ---- packed rows ----
def attend_by_row(
    module, query, key, value, attention_mask, row_lengths=None, row_bounds=None, columns=None, **kwargs
):
    """Attention of transformers' interface: [1, heads, N, dim] row by row, or without `row_lengths` the usual one.

    row_lengths: list of B numbers. row_bounds: [B + 1] int32, where each row begins, and N. columns: in decoding on a
    GPU, the first column [B] of the cache that each row uses, and the last [1]; for one new token a row.

    Returns: [1, N, heads, dim], and None for the weights.
    Raises: ValueError where a model lost the lengths, or made a mask of its own: it would be computed wrongly.
    """
    # `pack` hands in a mask with a single entry, which says nothing; the row lengths count instead.
    placeholder = attention_mask is not None and attention_mask.numel() == 1
    if columns is not None:
        return cache_kernels().attend_to_cache(query, key, value, *columns, kwargs["scaling"]), None
    if row_lengths is None:
        if placeholder and key.shape[2] > 1:
            raise ValueError(f"{type(module).__name__} is not told where rows end")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if not placeholder:
        raise ValueError(f"{type(module).__name__} attends by a mask of its own")

    # One kernel for all rows where there is one, else one for each row.
    if not kwargs.get("dropout") and flash_takes(query, key, value):
        return flash_by_row(query, key, value, row_bounds, max(row_lengths), kwargs.get("scaling")), None
    # Said aloud: transformers would otherwise judge by the length of the queries.
    kwargs["is_causal"] = True
    rows = zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None


# At import, so that every entry point (scripts, tests, benchmarks) can ask for attention by this name.
AttentionInterface.register(BY_ROW, attend_by_row)
AttentionMaskInterface.register(BY_ROW, sdpa_mask)
