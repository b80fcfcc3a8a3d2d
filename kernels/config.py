"""Section `[kernels]`: which path each operator takes. No torch here."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

Path = Literal["auto", "reference", "cpu", "triton"]


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """A path an operator: auto takes what is fastest for device, dtype and shape (`kernels/dispatch.py`)."""

    default: Annotated[
        Literal["auto", "reference"],
        "Path of every operator that is not named below; reference is plain PyTorch. Also written "
        'kernels = "reference".',
    ] = "auto"
    compile: Annotated[
        bool,
        "Compile every block with torch.compile; the operators that a compiler fuses itself are left to it.",
    ] = False
    attention: Annotated[Path | None, "Path of the attention over packed documents."] = None
    linear: Annotated[Literal["auto", "reference", "cpu"] | None, "Path of matrix products with weights."] = (
        None
    )
    norm: Annotated[Path | None, "Path of RMSNorm and LayerNorm, with the residual addition."] = None
    rope: Annotated[Path | None, "Path of the rotary embedding."] = None
    gate: Annotated[Path | None, "Path of SwiGLU and GELU pairs."] = None
    cross_entropy: Annotated[Path | None, "Path of the output matrix with the loss behind it."] = None
    adamw: Annotated[Path | None, "Path of the optimizer update."] = None

    def problems(self) -> list[tuple[str, str]]:
        """Every path fits some device, so only the device can tell whether it is there (`problems_on`)."""
        return []

    def problems_on(self, device: str) -> list[tuple[str, str]]:
        """Paths that `device` ("cpu" or "cuda") does not have, as (key, what is wrong and what to write)."""
        other, here = ("triton", "cpu") if device == "cpu" else ("cpu", "triton")
        return [
            (name, f'is "{other}", which does not run on {device}; use "auto", "reference" or "{here}"')
            for name in self.operators
            if self.of(name) == other
        ]

    def of(self, operator: str) -> Path:
        """The path asked for one operator."""
        named: Path | None = getattr(self, operator)
        return named or self.default

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators that a model and its optimizer use."""
        return tuple(f.name for f in fields(self) if f.name not in ("default", "compile"))


AUTO = KernelsConfig()
