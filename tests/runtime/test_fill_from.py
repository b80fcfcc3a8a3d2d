"""A state filled from an image: straight into its memory where that is laid out as stored, else by a copy."""

from pathlib import Path

import pytest
import torch

from rayfold.faulttol.image import Image, PartIndex, encode_index
from rayfold.faulttol.slots import Slot
from rayfold.runtime.images import ImagesLost, fill_from
from rayfold.runtime.part import Part

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)
BIAS = torch.arange(5, dtype=torch.float32) - 2


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """Rows 2 to 4 of a weight of 6, and a bias with a hole before it."""
    weight, bias = WEIGHT.view(torch.uint8).numpy(), BIAS.view(torch.uint8).numpy()
    parts = [PartIndex("weight", "float32", (6, 4), (2, 0), (3, 4), 0, 48)]
    parts.append(PartIndex("bias", "float32", (5,), (0,), (5,), 64, 20))
    slot = Slot.create(tmp_path / "slot", 84)
    slot.begin(84, encode_index(parts))
    slot.put(0, torch.cat([torch.as_tensor(a.ravel()) for a in (weight, bias[:16], bias)]).numpy())
    slot.seal(step=1, epoch=1, fingerprint="f", progress={})
    return Image.open(slot.path)


@pytest.mark.parametrize("way", ["as stored", "transposed", "another dtype", "held twice"])
def test_every_tensor_gets_its_own_box(image: Image, way: str) -> None:
    """How a tensor lies in memory, or in what precision, is no matter of the image."""
    dtype = torch.float64 if way == "another dtype" else torch.float32
    weight = torch.zeros(4, 3, dtype=dtype).T if way == "transposed" else torch.zeros(3, 4, dtype=dtype)
    parts = [Part("weight", weight, (6, 4), (2, 0)), Part.whole("bias", torch.zeros(5))]
    parts += [Part("weight", torch.zeros(3, 4), (6, 4), (2, 0))] if way == "held twice" else []
    fill_from(image, [*parts, Part("weight", torch.zeros(0, 4), (6, 4), (6, 0))])
    for part in parts:
        assert torch.equal(part.tensor, (WEIGHT if part.name == "weight" else BIAS).to(part.tensor.dtype))


def test_a_box_that_is_not_there_is_named(image: Image) -> None:
    """Nobody trains on half a state."""
    with pytest.raises(ImagesLost, match=r"holds no weight \[3, 4\] at \(0, 0\)"):
        fill_from(image, [Part("weight", torch.zeros(3, 4), (6, 4), (0, 0))])
