"""Which path an operator takes: decided by device, dtype and what was asked, never by a measurement.

A measured choice could differ between two ranks or two runs, and with it the last bits of their numbers; a
rule cannot. Each operator has a reference in plain PyTorch that runs everywhere, a CPU path, and a Triton
path for CUDA devices. Asking for a path that cannot run here is an error that names one that can.
"""

from dataclasses import dataclass

import torch

from .config import Path

HALF = (torch.bfloat16, torch.float16)
WIDE = (torch.float32,)


class KernelError(ValueError):
    """The path that was asked for cannot run on this device or dtype."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What one operator offers: the dtypes that each path computes, and why auto takes it there."""

    what: str
    cpu: tuple[torch.dtype, ...]
    cpu_why: str
    triton: tuple[torch.dtype, ...]
    triton_why: str
    slower: tuple[
        torch.dtype, ...
    ] = ()  # the CPU path computes them and saves memory, but auto leaves it out
    opaque: bool = False  # whether a compiler passes around it as around one of torch's own operators


@dataclass(frozen=True)
class Choice:
    """A path and the reason for it."""

    path: Path
    why: str


EVERY = (*HALF, *WIDE)

OPERATORS: dict[str, Operator] = {
    "linear": Operator(
        what="matrix product with a weight",
        cpu=WIDE if torch.backends.mkldnn.is_available() else (),
        cpu_why="oneDNN multiplies fp32 on any AVX processor as fast as MKL does on Intel's alone",
        triton=(),
        triton_why="cuBLAS, behind torch's own product, is the fastest there",
    ),
    "attention": Operator(
        what="attention under column masks, packed documents among them",
        cpu=(*EVERY, torch.float64),
        cpu_why="one softmax over the visible columns of a row block; hidden tiles are never computed",
        triton=HALF,
        triton_why="masked tiles are skipped on the device, bounds are read once a key block",
        opaque=True,
    ),
    "norm": Operator(
        what="RMSNorm and LayerNorm, with the residual addition",
        cpu=EVERY,
        cpu_why="torch's fused pass over stretches that the cache holds; sums over rows in fp32",
        triton=EVERY,
        triton_why="one pass forward, one backward",
    ),
    "rope": Operator(
        what="rotary embedding, in place",
        cpu=EVERY,
        cpu_why="turns halves of a head in place, keeps nothing but the table for the backward pass",
        triton=EVERY,
        triton_why="one pass, in place",
    ),
    "gate": Operator(
        what="SwiGLU and GELU pairs",
        cpu=EVERY,
        cpu_why="keeps only its two inputs and computes the rest again in the backward pass",
        triton=EVERY,
        triton_why="one pass forward, one backward",
        slower=HALF,
    ),
    "residual": Operator(
        what="bias, dropout and residual addition",
        cpu=EVERY,
        cpu_why="the mask is drawn once at the size it is shared at, everything else is in place",
        triton=EVERY,
        triton_why="the mask is drawn again in the backward pass and never stored",
    ),
    "cross_entropy": Operator(
        what="output matrix with the loss behind it",
        cpu=(*EVERY, torch.float64),
        cpu_why="gradients are computed chunk by chunk in the forward pass; the logits are never whole",
        triton=EVERY,
        triton_why="one pass over each chunk of logits makes its gradient in place",
    ),
    "gated_attention": Operator(
        what="gated self-attention with pair bias of the Evoformer",
        cpu=EVERY,
        cpu_why="one product for queries, keys, values and gate; torch's fused attention with the bias",
        triton=HALF,
        triton_why="scores stay on the chip, gate and bias are applied there",
        slower=HALF,
    ),
    "adamw": Operator(
        what="AdamW over flat buffers, and norms of every tensor",
        cpu=WIDE,
        cpu_why="one call of torch's fused update over memory that holds all tensors of a group",
        triton=WIDE,
        triton_why="one launch over memory that holds all tensors of a group",
    ),
}


def choose(operator: str, tensor: torch.Tensor, asked: Path = "auto") -> Choice:
    """The path of `operator` for data like `tensor`. Raises KernelError if the one asked for is not there."""
    known = OPERATORS[operator]
    device, dtype = tensor.device.type, tensor.dtype
    paths = {"reference": "plain PyTorch runs everywhere"}
    if device in ("cpu", "meta") and dtype in known.cpu:
        paths["cpu"] = known.cpu_why
    if device == "cuda" and dtype in known.triton:
        paths["triton"] = known.triton_why
    if torch.compiler.is_compiling() and not known.opaque:
        return Choice("reference", "a compiler fuses the plain operations itself")
    if asked == "auto":
        if "triton" in paths:
            return Choice("triton", known.triton_why)
        if "cpu" in paths and dtype not in known.slower:
            return Choice("cpu", known.cpu_why)
        return Choice("reference", f"no faster path for {str(dtype).removeprefix('torch.')} on {device}")
    if asked not in paths:
        raise KernelError(
            f'kernels.{operator} = "{asked}" computes no {dtype} on {device}; here it has: {", ".join(paths)}'
        )
    return Choice(asked, "asked for")


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and exponentials of data of `dtype` are in."""
    return torch.promote_types(dtype, torch.float32)
