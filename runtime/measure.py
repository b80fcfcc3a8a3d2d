"""What a rank can read about itself."""

import os
from pathlib import Path

import torch


def memory_bytes(device: str) -> int:
    """Memory of this rank: the peak of the allocator on CUDA, the resident set of the process on CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
