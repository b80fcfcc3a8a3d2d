"""Every operator on this machine: the path that auto takes, why, and its time against the reference.

A case is one operator on sizes of a small model's step, forward and backward. Paths are timed in turn, so
that a machine whose speed drifts slows both.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .adamw import adamw_
from .attention import flashmask_attention
from .config import Path
from .cross_entropy import linear_cross_entropy
from .dispatch import OPERATORS, choose
from .flashmask import kinds
from .gate import swiglu
from .gated_attention import GatedAttentionWeights, gated_attention
from .linear import linear
from .norm import add_rms_norm
from .residual import bias_dropout_residual
from .rope import rotary_table, rotate_

TOKENS, WIDTH, INNER, HEADS, HEAD, VOCABULARY = 1024, 512, 1408, 8, 64, 4096
DOCUMENT = 256  # tokens
RESIDUES, CHANNELS = 64, 128


@dataclass(frozen=True)
class Case:
    """One operator on one dtype; `run(path)` computes it forward and backward."""

    operator: str
    dtype: torch.dtype
    run: Callable[[Path], Any]
    sample: torch.Tensor  # what the path is chosen by


@dataclass(frozen=True)
class Timing:
    """The path that auto takes and how long it and the reference take, medians in seconds."""

    operator: str
    dtype: str
    path: Path
    why: str
    seconds: float
    reference_seconds: float

    @property
    def ratio(self) -> float:
        """How many times faster than the reference."""
        return self.reference_seconds / self.seconds


def cases(device: torch.device) -> Iterator[Case]:
    """Every operator in fp32 and bf16 (the optimizer in fp32, as it is kept)."""
    for dtype in (torch.float32, torch.bfloat16):
        new = partial(torch.randn, device=device, dtype=dtype)
        for operator, run in _model_cases(new, device).items():
            yield Case(operator, dtype, run, new(1))
    flat = [torch.rand(2**20, device=device) for _ in range(4)]
    update = partial(
        adamw_, *([one] for one in flat), step=3, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    yield Case("adamw", torch.float32, lambda path: update(path=path), flat[0])


def measure(case: Case, *, repeats: int = 3) -> Timing:
    """Time a case on the path that auto takes and on the reference, in turn."""
    choice = choose(case.operator, case.sample)
    seconds: dict[str, list[float]] = {"auto": [], "reference": []}
    if choice.path == "reference":
        del seconds["auto"]  # the same thing: timed twice, it would show nothing but noise
    for repeat in range(repeats + 1):
        for path, found in seconds.items():
            took = _seconds(case, path)  # type: ignore[arg-type]
            if repeat:  # the first makes buffers, and kernels on a GPU
                found.append(took)
    dtype = str(case.dtype).removeprefix("torch.")
    reference = statistics.median(seconds["reference"])
    auto = statistics.median(seconds.get("auto", seconds["reference"]))
    return Timing(case.operator, dtype, choice.path, choice.why, auto, reference)


def _seconds(case: Case, path: Path) -> float:
    started = time.perf_counter()
    case.run(path)
    if case.sample.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _backward(outputs: torch.Tensor | tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])


def _model_cases(new: Callable[..., torch.Tensor], device: torch.device) -> dict[str, Callable[[Path], None]]:
    def leaf(*shape: int) -> torch.Tensor:
        return new(*shape).requires_grad_()

    x, other, weight, scale = leaf(TOKENS, WIDTH), leaf(TOKENS, WIDTH), leaf(INNER, WIDTH), leaf(WIDTH)
    gate, up, head = leaf(TOKENS, INNER), leaf(TOKENS, INNER), leaf(VOCABULARY, WIDTH)
    q, k, v = (leaf(1, TOKENS, HEADS, HEAD) for _ in range(3))
    labels = torch.randint(VOCABULARY, (TOKENS,), device=device)
    places = torch.arange(TOKENS, device=device)[None]
    mask, turns = kinds.causal_document(places // DOCUMENT), rotary_table(places, HEAD, 10_000.0)
    pair = leaf(1, RESIDUES, RESIDUES, CHANNELS)
    weights = _gated_weights(leaf)
    bias = leaf(1, 1, 4, RESIDUES, RESIDUES)
    dropout: dict[str, Any] = {"p": 0.1, "training": True, "seed": 1}
    return {
        "linear": lambda path: _backward(linear(x, weight, path), (x, weight)),
        "attention": lambda path: _backward(flashmask_attention(q, k, v, mask, path=path), (q, k, v)),
        "norm": lambda path: _backward(add_rms_norm(x, other, scale, eps=1e-5, path=path), (x, other, scale)),
        "rope": lambda path: _backward(rotate_(q * 1, turns, path=path), (q,)),
        "gate": lambda path: _backward(swiglu(gate, up, path=path), (gate, up)),
        "residual": lambda path: _backward(
            bias_dropout_residual(x, scale, other, **dropout, path=path), (x, scale, other)
        ),
        "cross_entropy": lambda path: _backward(
            linear_cross_entropy(x, head, labels, path=path)[0], (x, head)
        ),
        "gated_attention": lambda path: _backward(
            gated_attention(pair, pair, weights, mask_bias=None, pair_bias=bias, path=path), (pair, bias)
        ),
    }


def _gated_weights(leaf: Callable[..., torch.Tensor]) -> GatedAttentionWeights:
    heads, width = 4, CHANNELS // 4
    q, k, v, gate = (leaf(CHANNELS, heads, width) for _ in range(4))
    return GatedAttentionWeights(
        q=q,
        k=k,
        v=v,
        gate=gate,
        gate_bias=leaf(heads, width),
        out=leaf(heads, width, CHANNELS),
        out_bias=leaf(CHANNELS),
    )


def operators() -> dict[str, str]:
    """Every operator's name and what it computes."""
    return {name: operator.what for name, operator in OPERATORS.items()}
