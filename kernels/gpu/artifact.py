"""Compile a Triton kernel without a GPU and read what came out: registers, spills, memory, instructions.

Runs in a process that is not in Triton's interpreter mode. Uses the `cuobjdump` that Triton brings along.
`python -m rayfold.kernels.gpu.artifact --arch 90` compiles all that is shipped for an architecture.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .tiles import ARCHITECTURES

TENSOR_CORE = ("mma.sync", "wgmma", "tcgen05.mma")  # how PTX multiplies tiles from sm_80, sm_90, sm_100 on
REGISTERS_PER_SM = 65_536
THREADS_PER_SM = {80: 2048, 90: 2048, 100: 2048}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
WARP = 32


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel as shipped for one architecture: types of its arguments, its constants, how it is run."""

    name: str
    kernel: Any  # a triton.jit function
    signature: Mapping[str, str]  # argument -> "*bf16", "i32", "fp32", ...; constants are left out
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16; pointers always are
    products: Mapping[int, str] = field(default_factory=dict)  # architecture -> the instruction it must use


@dataclass(frozen=True)
class Artifact:
    """What the compiler made of a variant."""

    registers: int  # a thread
    spilled_bytes: int  # a thread, stack that the compiler needed because registers ran out
    shared_bytes: int  # a block
    products: tuple[str, ...]  # the tensor-core instructions in it
    blocks_per_sm: int  # as many as registers, shared memory and threads allow

    def occupancy(self, arch: int, num_warps: int) -> float:
        """Share of the threads of a multiprocessor that can be resident."""
        return min(1.0, self.blocks_per_sm * num_warps * WARP / THREADS_PER_SM[arch])


def build(variant: Variant, arch: int) -> Artifact:
    """Compile `variant` for compute capability `arch` / 10."""
    signature = dict(variant.signature) | dict.fromkeys(variant.constants, "constexpr")
    places = {name: place for place, name in enumerate(variant.kernel.arg_names)}
    aligned = [n for n, kind in variant.signature.items() if kind.startswith("*") or n in variant.aligned]
    source = ASTSource(
        variant.kernel,
        signature={name: signature[name] for name in places},
        constexprs={(places[name],): value for name, value in variant.constants.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    registers, stack, local = _resources(made.asm["cubin"])
    shared = made.metadata.shared
    by_registers = REGISTERS_PER_SM // max(1, registers * variant.num_warps * WARP)
    by_shared = SHARED_PER_SM[arch] // max(1, shared + 1024)  # a block's own kilobyte is the system's
    by_threads = THREADS_PER_SM[arch] // (variant.num_warps * WARP)
    return Artifact(
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=shared,
        products=tuple(name for name in TENSOR_CORE if name in made.asm["ptx"]),
        blocks_per_sm=min(by_registers, by_shared, by_threads, 32),
    )


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) a thread of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        )
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return usage["REG"], usage["STACK"], usage["LOCAL"]


def modules() -> list[ModuleType]:
    """The modules of this folder that ship kernels: those with `variants`."""
    names = sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    here = [importlib.import_module(f".{name}", __package__) for name in names]
    return [module for module in here if hasattr(module, "variants")]


def report(module: ModuleType, variant: Variant, arch: int) -> dict[str, Any]:
    """What is known of one variant, as plain values."""
    artifact = build(variant, arch)
    return {
        "module": module.__name__.rpartition(".")[2],
        "name": variant.name,
        "arch": arch,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        **asdict(artifact),
        "occupancy": artifact.occupancy(arch, variant.num_warps),
        "expected": variant.products.get(arch),  # the instruction it has to use, if it multiplies tiles
    }


def main() -> None:
    """Compile every variant of every module for one architecture; print one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m rayfold.kernels.gpu.artifact", description=main.__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, required=True, help="capability times ten")
    arch = parser.parse_args().arch
    for module in modules():
        for variant in module.variants(arch):
            print(json.dumps(report(module, variant, arch)), flush=True)


if __name__ == "__main__":
    main()
