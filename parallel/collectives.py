"""The collectives of a run by name. Values that it exchanges are tensors or JSON text, nothing pickled."""

import json
from typing import Any

import torch
import torch.distributed as dist


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup, *, wait: bool = True) -> dist.Work | None:
    """Sum `tensor` in place over the ranks of `group`; with `wait=False` returns the handle to wait on."""
    return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=not wait)


def gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Every rank's JSON-able `value`, in rank order, on every rank."""
    world_size = dist.get_world_size(group)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([len(text)], dtype=torch.int64, device=device), group=group)
    longest = int(max(length.item() for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(bytes(part[: int(n.item())].cpu().numpy())) for part, n in zip(parts, lengths, strict=True)
    ]
