"""The operators against what torch has, on the CPU: alternating runs, medians, one JSON object a line.

    python benchmarks/kernels.py [--only NAME ...] [--repeats 5] [--threads 1]

Every line says the ratio (how many times faster than the other), its smallest and largest pair, and the goal.
Memory is the growth of the peak resident set in a fresh process, so that nothing else hides in it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rayfold.kernels.attention import flashmask_attention
from rayfold.kernels.config import KernelsConfig
from rayfold.kernels.cross_entropy import linear_cross_entropy
from rayfold.kernels.flashmask import kinds
from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.model import Held, Sharded
from rayfold.parallel.tensor import Piece
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.optim.config import OptimConfig

S, HEADS, HEAD, MEAN_DOCUMENT = 8192, 8, 64, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# a small model in which attention, blocks and loss all take their share
SHAPE = LlamaShape(
    dim=512,
    layers=4,
    heads=8,
    kv_heads=8,
    ffn_dim=1408,
    vocab_size=8192,
    rope_theta=1e4,
    tied_embeddings=True,
)
STEP_TOKENS = 4096
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.probe:
        print(json.dumps(probe(*args.probe)))
        return
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}"
    )
    for name in args.only:
        for line in BENCHES[name](args):
            print(json.dumps({"bench": name, **line, "machine": machine}), flush=True)


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> Line:
    """Time both in turn, the order changing from pair to pair; the first of each warms up."""
    ours(), theirs()
    mine, other = [], []
    for pair in range(repeats):
        for run, into in [(ours, mine), (theirs, other)][:: 1 if pair % 2 else -1]:
            started = time.perf_counter()
            run()
            into.append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": statistics.median(mine),
        "other_seconds": statistics.median(other),
    }


def documents(total: int, mean: int) -> torch.Tensor:
    """Ids of documents whose lengths are exponential, [1, total]."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(1 + int(rng.exponential(mean)), total - sum(lengths)))
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))[None]


def qkv(dtype: torch.dtype, *, grad: bool) -> list[torch.Tensor]:
    return [torch.randn(1, S, HEADS, HEAD, dtype=dtype, requires_grad=grad) for _ in range(3)]


def both_ways(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
    out = attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **how).transpose(1, 2)


def packed_documents(args: argparse.Namespace) -> Iterator[Line]:
    mask = kinds.causal_document(documents(S, MEAN_DOCUMENT))
    seen = ~mask.dense()
    for name, dtype in DTYPES.items():
        inputs = qkv(dtype, grad=True)
        found = compare(
            lambda inputs=inputs: both_ways(lambda q, k, v: flashmask_attention(q, k, v, mask), inputs),
            lambda inputs=inputs: both_ways(lambda q, k, v: sdpa(q, k, v, attn_mask=seen), inputs),
            args.repeats,
        )
        yield {"dtype": name, "against": "torch SDPA, dense mask, forward and backward", **found, "goal": 8.0}


def flex_forward(args: argparse.Namespace) -> Iterator[Line]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    docs = documents(S, MEAN_DOCUMENT)[0]
    mask = kinds.causal_document(docs[None])
    block = create_block_mask(
        lambda b, h, i, j: (j <= i) & (docs[i] == docs[j]), None, None, S, S, device="cpu", _compile=False
    )
    compiled = torch.compile(flex_attention)
    for name, dtype in DTYPES.items():
        q, k, v = qkv(dtype, grad=False)
        first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        with torch.no_grad():
            found = compare(
                lambda q=q, k=k, v=v: flashmask_attention(q, k, v, mask),
                lambda first=first: compiled(*first, block_mask=block),
                args.repeats,
            )
        yield {"dtype": name, "against": "FlexAttention compiled, forward", **found, "goal": 1.5}


def plain_causal(args: argparse.Namespace) -> Iterator[Line]:
    mask = kinds.causal(1, S)
    for name, dtype in DTYPES.items():
        inputs = qkv(dtype, grad=True)
        found = compare(
            lambda inputs=inputs: both_ways(lambda q, k, v: flashmask_attention(q, k, v, mask), inputs),
            lambda inputs=inputs: both_ways(lambda q, k, v: sdpa(q, k, v, is_causal=True), inputs),
            args.repeats,
        )
        yield {"dtype": name, "against": "torch SDPA, is_causal, forward and backward", **found, "goal": 0.95}


def visible_fraction(args: argparse.Namespace) -> Iterator[Line]:
    """Time over the share of scores in computed tiles, sliding windows of growing width."""
    inputs = qkv(torch.float32, grad=True)
    points = []
    for window in (128, 512, 1024, 2048, 4096, 8192):
        mask = kinds.sliding_window(1, S, window)
        run = lambda mask=mask: both_ways(lambda q, k, v: flashmask_attention(q, k, v, mask), inputs)  # noqa: E731
        run()
        times = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        points.append((mask.density(128, 32), statistics.median(times)))
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    r2 = 1 - float(((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    yield {
        "points": points,
        "r2": r2,
        "seconds_at_all": float(slope),
        "offset_seconds": float(offset),
        "goal": 0.98,
    }


def loss_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(4096, 512, dtype=dtype, requires_grad=True)
    weight = (torch.randn(32_000, 512) * 0.02).to(dtype).requires_grad_()
    return x, weight, torch.randint(32_000, (4096,))


def our_loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    torch.autograd.grad(linear_cross_entropy(x, weight, labels)[0], (x, weight))


def eager_loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    loss = F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")
    torch.autograd.grad(loss, (x, weight))


def cross_entropy(args: argparse.Namespace) -> Iterator[Line]:
    for name, dtype in DTYPES.items():
        inputs = loss_inputs(dtype)
        found = compare(lambda i=inputs: our_loss(*i), lambda i=inputs: eager_loss(*i), args.repeats)
        peaks = {which: run_probe("cross_entropy", name, which) for which in ("ours", "eager")}
        yield {
            "dtype": name,
            "against": "torch eager, 4,096 tokens x 32,000 vocabulary, width 512",
            **found,
            "time_fraction": 1 / found["ratio_median"],
            "memory_fraction": peaks["ours"] / peaks["eager"],
            "peak_mib": peaks["ours"] / 2**20,
            "other_peak_mib": peaks["eager"] / 2**20,
            "goal": "time <= 0.75, memory <= 0.125",
        }


def small_tensors(args: argparse.Namespace) -> Iterator[Line]:
    """Whole updates, gradients arriving one by one as autograd leaves them."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(256, 4096, size=5000).tolist()
    module = torch.nn.ParameterList([torch.randn(n // 16, 16) for n in sizes])
    others = [p.detach().clone().requires_grad_() for p in module]
    grads = [torch.randn_like(p) for p in others]
    config = OptimConfig(lr=1e-3)
    held = [
        Held(name=name, parameter=parameter, piece=Piece.whole(parameter), counted=1.0)
        for name, parameter in module.named_parameters()
    ]
    nobody: Any = None  # no mesh: these tensors are nobody's shards
    ours = ShardedAdamW(Sharded([module], held, nobody, nobody), config)
    torch_adamw = torch.optim.AdamW(others, lr=1e-3, weight_decay=config.weight_decay, fused=True)

    def give(parameters: Any) -> None:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad

    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for repeat in range(args.repeats + 1):
        for which in ("ours", "torch"):
            give(module if which == "ours" else others)
            started = time.perf_counter()
            if which == "ours":
                ours.step(1e-3)
            else:
                torch_adamw.step()
                torch_adamw.zero_grad(set_to_none=True)
            if repeat:
                times[which].append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(times["ours"], times["torch"], strict=True)]
    yield {
        "against": "torch.optim.AdamW(fused=True), 5,000 tensors of 256 to 4,096 numbers",
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": statistics.median(times["ours"]),
        "other_seconds": statistics.median(times["torch"]),
        "goal": 3.0,
    }


def model_step(kernels: KernelsConfig, dtype: torch.dtype) -> Callable[[], None]:
    """A step of the main job's model on one rank without its update: packed documents, forward, backward."""
    torch.manual_seed(0)
    model = Llama(SHAPE, kernels)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.to(dtype)
    tokens = torch.randint(SHAPE.vocab_size, (1, STEP_TOKENS))
    docs = documents(STEP_TOKENS, MEAN_DOCUMENT)
    batch = {"positions": torch.arange(STEP_TOKENS)[None], "document_ids": docs, "labels": tokens.roll(-1, 1)}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (model(tokens, **batch) / STEP_TOKENS).backward()

    return step


def main_job(args: argparse.Namespace) -> Iterator[Line]:
    for name, dtype in DTYPES.items():
        fast, plain = (model_step(KernelsConfig(default=which), dtype) for which in ("auto", "reference"))
        found = compare(fast, plain, args.repeats)
        peaks = {which: run_probe("main_job", name, which) for which in ("auto", "reference")}
        yield {
            "dtype": name,
            "against": f'kernels = "reference", {STEP_TOKENS} packed tokens',
            **found,
            "memory_fraction": peaks["auto"] / peaks["reference"],
            "peak_mib": peaks["auto"] / 2**20,
            "other_peak_mib": peaks["reference"] / 2**20,
            "goal": "ratio >= 1.15, memory <= 0.8",
        }


def narrow_step(args: argparse.Namespace) -> Iterator[Line]:
    fast = {name: model_step(KernelsConfig(), dtype) for name, dtype in DTYPES.items()}
    found = compare(fast["bf16"], fast["fp32"], args.repeats)
    has_amx = bool(torch.cpu._is_amx_tile_supported())
    yield {"against": "the same step in fp32", **found, "amx": has_amx, "goal": "2.5 where the CPU has AMX"}


def run_probe(bench: str, dtype: str, which: str) -> int:
    """Growth of the peak resident set in a process of its own, in bytes."""
    command = [sys.executable, __file__, "--probe", bench, dtype, which]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return int(json.loads(done.stdout)["peak_bytes"])


def probe(bench: str, dtype: str, which: str) -> Line:
    if bench == "cross_entropy":
        inputs = loss_inputs(DTYPES[dtype])
        run = lambda: (our_loss if which == "ours" else eager_loss)(*inputs)  # noqa: E731
    else:
        run = model_step(KernelsConfig(default=which), DTYPES[dtype])  # type: ignore[arg-type]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak: a new process begins with its parent's
    run()
    return {"peak_bytes": resident("VmHWM") - before}


def resident(what: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


BENCHES: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "packed_documents": packed_documents,
    "flex_forward": flex_forward,
    "plain_causal": plain_causal,
    "visible_fraction": visible_fraction,
    "cross_entropy": cross_entropy,
    "small_tensors": small_tensors,
    "main_job": main_job,
    "narrow_step": narrow_step,
}

if __name__ == "__main__":
    main()
