"""Causal attention that respects document boundaries, in plain PyTorch.

Packed rows hold several documents. Every document is a run of positions, so attention over a row is causal
attention over each run by itself; equal adjacent runs are batched into one call of torch's fused kernel. No
mask is built and no score between documents is ever computed.
"""

from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F


def document_runs(document_ids: torch.Tensor) -> list[tuple[int, int]]:
    """Run lengths of a packed batch: [B, S] ids -> [(count, length), ...] over the flattened B * S positions.

    A run ends where the id changes and at the end of every row; `count` adjacent runs of equal length share
    an entry. Reads the ids on the host: call it once a forward pass, not once a layer.
    """
    ids = np.array(
        document_ids.tolist()
    )  # unlike numpy(), also from another device and beside pretended tensors
    starts = np.ones(ids.shape, dtype=bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    lengths = np.diff(np.append(np.flatnonzero(starts), ids.size)).tolist()
    return [(len(list(group)), length) for length, group in groupby(lengths)]


def document_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: list[tuple[int, int]]
) -> torch.Tensor:
    """Causal attention inside each run: q [B, S, H, D], k and v [B, S, Hkv, D] -> [B, S, H, D] in q's dtype.

    `runs` comes from `document_runs`. Heads of q share the heads of k and v in equal groups.
    """
    sizes = [count * length for count, length in runs]
    # split's backward is one concatenation; slicing would write a full-size zero tensor for every run
    parts = zip(*(x.flatten(0, 1).split(sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for (count, length), qkv in zip(runs, parts, strict=True):
        heads_first = [x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv]
        out = causal_attention(*heads_first)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).view_as(q)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's fused causal attention: q [N, H, L, D], k and v [N, Hkv, L, D] -> [N, H, L, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
