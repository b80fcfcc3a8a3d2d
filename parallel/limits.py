"""What a layout has to carry: the numbers of a model and of a batch that decide which layouts can be.

Models make their own `ModelLimits`; the rules (`parallel/rules.py`) read nothing else of them. No torch here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a model says of itself; None where only building it would tell, which is not checked then."""

    family: str
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    seq_len: int | None = None
    tied: bool = False  # the embedding is the output matrix too
    axes: tuple[str, ...] = ("tp", "cp", "pp")  # those that the model's plan says how to split over


@dataclass(frozen=True, kw_only=True)
class Load:
    """A model, the batch of a step, and how the blocks run. Without a model: one that has no plan."""

    model: ModelLimits | None
    batch_size: int
    micro_size: int = 0
    compiled: bool = False
