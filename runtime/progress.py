"""How far a run is, as plain values. No torch here: vaults write it beside the tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Progress:
    """How far the run is."""

    step: int = 0
    cursor: int = 0  # samples consumed by finished steps, over all ranks
    tokens: int = 0  # valid target tokens trained on

    @staticmethod
    def among(values: Mapping[str, Any]) -> "Progress":
        """The progress that is told among other values. Raises KeyError where a part of it is not."""
        return Progress(**{each.name: values[each.name] for each in fields(Progress)})
