"""Every Triton kernel as it is shipped, compiled for each architecture without a GPU.

The compiler runs in a process of its own, one an architecture: the kernels of this one belong to the
interpreter. They are found by listing `kernels/gpu/`, so a new module is checked from its first day.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from rayfold.kernels.gpu.artifact import modules
from rayfold.kernels.gpu.tiles import ARCHITECTURES, SHARED_LIMIT


@pytest.fixture(scope="module")
def reports() -> dict[int, list[dict[str, Any]]]:
    """Reports of all variants by architecture; the compilers run side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rayfold.kernels.gpu.artifact", "--arch"]
    started = {
        arch: subprocess.Popen(
            [*command, str(arch)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for arch in ARCHITECTURES
    }
    try:
        ended = {arch: (compiler, *compiler.communicate(timeout=600)) for arch, compiler in started.items()}
    finally:
        for compiler in started.values():
            compiler.kill()  # those that one failure would leave running
    for compiler, _, errors in ended.values():
        assert compiler.returncode == 0, errors[-4000:]
    return {arch: [json.loads(line) for line in out.splitlines()] for arch, (_, out, _) in ended.items()}


@pytest.mark.timeout(900)  # some hundred kernels, three times; a cached one takes no time
@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def test_every_kernel_compiles_and_fits(reports: dict[int, list[dict[str, Any]]], arch: int) -> None:
    """A spilled register is a trip to memory in the innermost loop; too much shared memory, a failed launch.

    Where tiles are multiplied, the tensor cores of that architecture have to do it: a shape or a type that
    they cannot take would be computed all the same, an order of magnitude slower.
    """
    compiled = reports[arch]
    assert {one["module"] for one in compiled} == {module.__name__.rpartition(".")[2] for module in modules()}
    for one in compiled:
        assert one["spilled_bytes"] == 0, one
        assert one["shared_bytes"] <= SHARED_LIMIT[one["arch"]], one
        assert one["blocks_per_sm"] >= 1, one
        assert one["expected"] is None or one["expected"] in one["products"], one
