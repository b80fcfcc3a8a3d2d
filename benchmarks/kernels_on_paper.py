"""The GPU kernels without a GPU: what the compiler made of each, and the least time that a chip allows.

    python benchmarks/kernels_on_paper.py [--arch 80 90 100] [--markdown]

Compiles every shipped kernel for the architecture and puts beside it the operations and bytes of a stated
problem. The roofline bound is the larger of operations / peak and bytes / bandwidth of the chip's data sheet;
no kernel is faster, and how near one comes only a GPU can say. One JSON object a line, or the table of
docs/kernels.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOKENS, HEADS, FFN, PARAMETERS, VOCABULARY = 8192, 16, 14_336, 10**8, 32_000
ROWS, RESIDUES, EVOFORMER_HEADS = 128, 256, 8


@dataclass(frozen=True)
class Chip:
    """Dense peaks of a data sheet."""

    name: str
    bf16: float  # operations a second on tensor cores
    fp32: float
    bandwidth: float  # bytes a second


CHIPS = {
    80: Chip("A100", 312e12, 19.5e12, 2.0e12),
    90: Chip("H100", 989e12, 67e12, 3.35e12),
    100: Chip("B200", 2250e12, 80e12, 8.0e12),
}


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one launch on the stated problem."""

    flops: float
    bytes: float
    problem: str


def work_of(module: str, name: str) -> Work:
    """What the kernel `name` does; bytes are those that must cross the memory bus once."""
    width = 4 if "fp32" in name or module == "adamw" else 2
    words = name.split()
    if module == "attention":
        head = int(words[2])
        products = {"attention_forward": 2, "attention_backward_keys": 4, "attention_backward_rows": 3}
        tensors = {"attention_forward": 4, "attention_backward_keys": 6, "attention_backward_rows": 5}
        flops = products.get(words[0], 0) * 2 * HEADS * TOKENS**2 / 2 * head
        size = HEADS * TOKENS * head * width
        return Work(
            flops, tensors.get(words[0], 2) * size, f"{HEADS} heads of {head}, {TOKENS} tokens, causal"
        )
    if module == "gated_attention":
        head = int(words[-1])
        products = {"forward": 2, "queries": 3, "keys": 4, "pairs": 3}.get(words[2], 0)
        flops = products * 2 * ROWS * EVOFORMER_HEADS * RESIDUES**2 * head
        size = ROWS * EVOFORMER_HEADS * RESIDUES * head * width
        pairs = EVOFORMER_HEADS * RESIDUES**2 * width
        problem = f"{ROWS} rows of {RESIDUES}, {EVOFORMER_HEADS} heads of {head}"
        return Work(flops, {"forward": 5, "gate": 6}.get(words[2], 6) * size + pairs, problem)
    if module == "adamw":
        tensors = 7 if name.startswith("adamw") else 1
        return Work(15 * PARAMETERS, tensors * 4 * PARAMETERS, "100 M parameters")
    if module == "cross_entropy":
        size = TOKENS / 8 * VOCABULARY * width
        return Work(10 * size / width, 3 * size, f"{TOKENS // 8} tokens x {VOCABULARY} vocabulary")
    return _elementwise(module, words, width)


def _elementwise(module: str, words: list[str], width: int) -> Work:
    back = "backward" in words
    if module == "gate":
        size, tensors, flops = TOKENS * FFN, 5 if back else 3, 20
        problem = f"{TOKENS} tokens of {FFN}"
    elif module == "norm":
        columns = next(int(word) for word in words if word.isdigit()) if "row" not in words else 16_384
        size, tensors, flops = TOKENS * columns, 4, 10
        problem = f"{TOKENS} tokens of {columns}"
    elif module == "residual":
        size, tensors, flops = TOKENS * 4096, 3 + ("gate" in words), 20
        problem = f"{TOKENS} tokens of 4096"
    else:
        size, tensors, flops = TOKENS * 32 * 128, 2, 6
        problem = f"{TOKENS} tokens of 32 heads of 128"
    return Work(flops * size, tensors * size * width, problem)


def compiled(arch: int) -> Iterator[dict[str, Any]]:
    """Reports of every shipped kernel, from a process that is not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rayfold.kernels.gpu.artifact", "--arch", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=900)
    yield from map(json.loads, done.stdout.splitlines())


def on_paper(report: dict[str, Any]) -> dict[str, Any]:
    """A report with its work and the bound of its chip."""
    chip, work = CHIPS[report["arch"]], work_of(report["module"], report["name"])
    peak = chip.bf16 if report["products"] else chip.fp32
    times = {"operations": work.flops / peak, "bytes": work.bytes / chip.bandwidth}
    bound = max(times, key=lambda name: times[name])
    return {
        "bench": "kernels_on_paper",
        "chip": chip.name,
        **report,
        "problem": work.problem,
        "gflop": work.flops / 1e9,
        "mbytes": work.bytes / 1e6,
        "bound_us": 1e6 * times[bound],
        "bound_by": bound,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a kernel, its three chips beside each other."""
    chips = " | ".join(chip.name for chip in CHIPS.values())
    out = [f"| kernel | problem | GFLOP | MB | {chips} |", "|---|---|---|---|" + "---|" * len(CHIPS)]
    by_name: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault((line["module"], line["name"]), {})[line["arch"]] = line
    for (_, name), found in by_name.items():
        one = next(iter(found.values()))
        cells = [
            f"{x['registers']}, {x['shared_bytes'] / 1024:.0f}, {100 * x['occupancy']:.0f}%, "
            f"{x['bound_us']:.0f} µs ({x['bound_by']})"
            if (x := found.get(arch))
            else "not shipped"
            for arch in CHIPS
        ]
        figures = f"{one['gflop']:,.1f} | {one['mbytes']:,.0f}"
        out.append(f"| {name} | {one['problem']} | {figures} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument(
        "--markdown", action="store_true", help="the table, of bf16 kernels and the optimizer"
    )
    args = parser.parse_args()
    lines = [on_paper(report) for arch in args.arch for report in compiled(arch)]
    if args.markdown:
        print(table([line for line in lines if "bf16" in line["name"] or line["module"] == "adamw"]))
    else:
        for line in lines:
            print(json.dumps(line))


if __name__ == "__main__":
    main()
