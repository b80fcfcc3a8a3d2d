"""The optimizer on plain and on sharded models: torch's AdamW tensor by tensor, memory shared as before."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from plain import as_sharded, held_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rayfold.kernels.config import Path
from rayfold.runtime.optim.adamw import BUFFER_BYTES, SMALL_BYTES, ShardedAdamW, memory_needed
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.part import local_of

CONFIG = OptimConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
STEPS = 4


class Mixed(nn.Module):
    """Small matrices and vectors of odd sizes, and one matrix that is large to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 7 if n % 2 else 5) for n in range(6)])
        self.out = nn.Linear(7, SMALL_BYTES["cpu"] // 4 // 7 + 1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            total = total + layer(x).square().mean()
        return total + self.out(torch.cat([x, x[:, :2]], 1)).square().mean()


def gradient_of(name: str, parameter: torch.Tensor, step: int) -> torch.Tensor | None:
    """Any numbers; one layer has none in the second step, one parameter never."""
    if name == "unused" or (name.startswith("layers.3.") and step == 2):
        return None
    return torch.sin(torch.arange(parameter.numel()) * (step + 1.7) + len(name)).view(parameter.shape)


def by_torch(**how: Any) -> nn.Module:
    model = Mixed()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": CONFIG.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=CONFIG.betas, eps=CONFIG.eps, **how)
    for step in range(1, STEPS + 1):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(name, parameter, step)
        adamw.step()
    return model


def by_us(model: nn.Module, optimizer: ShardedAdamW, steps: range = range(1, STEPS + 1)) -> None:
    for step in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(name, parameter, step)
        optimizer.step(CONFIG.lr)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_path_is_torchs_formula_bit_by_bit() -> None:
    """Decay groups, steps of a parameter's own and missing gradients are torch's, as the formula is."""
    model = Mixed()
    by_us(model, ShardedAdamW(as_sharded(model), CONFIG, path="reference"))
    expected = dict(by_torch(foreach=False, fused=False).named_parameters())
    assert [name for name, p in model.named_parameters() if not torch.equal(p, expected[name])] == []


def test_the_fast_path_is_torchs_fused_update() -> None:
    """Equal but for the last elements of odd tensors, which torch rounds otherwise (test_adamw.py)."""
    model = Mixed()
    by_us(model, ShardedAdamW(as_sharded(model), CONFIG))
    for name, wanted in by_torch(fused=True).named_parameters():
        got = model.get_parameter(name)
        whole = got.numel() // 16 * 16
        assert torch.equal(got.flatten()[:whole], wanted.flatten()[:whole]), name
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * CONFIG.lr)


def test_small_tensors_share_memory_and_large_ones_stay() -> None:
    """What a call costs is saved where it counts, and no large tensor is ever copied."""
    model = Mixed()
    large = model.out.weight.data_ptr()
    ShardedAdamW(as_sharded(model), CONFIG)
    assert model.out.weight.data_ptr() == large
    vectors = [parameter for name, parameter in model.layers.named_parameters() if "bias" in name]
    assert len({vector.untyped_storage().data_ptr() for vector in vectors}) == 1
    assert vectors[0].untyped_storage().nbytes() <= BUFFER_BYTES["cpu"]


class Kept:
    """A memory whose pieces outlive the optimizer; full of anything at first."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.next = 0
        self.kept = False

    def take(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        if not self.kept:
            self.pieces.append(torch.full((numel,), 7, dtype=dtype))
        self.next += 1
        return self.pieces[self.next - 1], self.kept


def test_a_state_comes_home_to_the_memory_that_it_lay_in() -> None:
    """All of it lies there, frozen parameters and buffers too, and a second life goes on bit by bit."""

    def made() -> nn.Module:
        model = Mixed()
        model.unused.requires_grad_(False)
        model.register_buffer("seen", torch.arange(3))
        return model

    straight, first, second = made(), made(), made()
    by_us(straight, ShardedAdamW(as_sharded(straight), CONFIG))
    memory = Kept()
    needed = memory_needed(as_sharded(first))
    optimizer = ShardedAdamW(as_sharded(first), CONFIG, memory=memory)
    assert needed == [(len(piece), piece.dtype) for piece in memory.pieces]
    inside = {piece.untyped_storage().data_ptr() for piece in memory.pieces}
    held = [*first.parameters(), *first.buffers(), *(part.tensor for part in optimizer.parts())]
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == inside
    by_us(first, optimizer, range(1, 2))
    first.seen += 1

    memory.kept, memory.next = True, 0
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(torch.nan)
    optimizer = ShardedAdamW(as_sharded(second), CONFIG, memory=memory)
    optimizer.set_steps(1)
    assert second.seen.tolist() == [1, 2, 3]
    by_us(second, optimizer, range(2, STEPS + 1))
    names = [name for name, _ in straight.named_parameters() if not name.startswith("layers.3.")]
    assert [n for n in names if not torch.equal(straight.get_parameter(n), second.get_parameter(n))] == []


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_loading_moments_and_steps_goes_on_bit_by_bit(path: Path) -> None:
    """Moments are written through `parts()` and parameters through the model, as a checkpoint does."""
    names = [name for name, p in Mixed().named_parameters() if gradient_of(name, p, 2) is not None]

    def run(model: nn.Module, optimizer: ShardedAdamW, steps: range) -> None:
        for step in steps:
            for name in names:
                parameter = model.get_parameter(name)
                parameter.grad = gradient_of(name, parameter, step)
            optimizer.step(CONFIG.lr)

    whole, first, second = Mixed(), Mixed(), Mixed()
    optimizers = [ShardedAdamW(as_sharded(model), CONFIG, path=path) for model in (whole, first, second)]
    run(whole, optimizers[0], range(1, 7))
    run(first, optimizers[1], range(1, 4))
    second.load_state_dict(first.state_dict())
    for target, stored in zip(optimizers[2].parts(), optimizers[1].parts(), strict=True):
        assert target.name == stored.name
        target.tensor.copy_(stored.tensor)
    optimizers[2].set_steps(3)
    run(second, optimizers[2], range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_strided_parameter_is_updated_where_it_belongs() -> None:
    """torch's fused kernel ignores strides; a parameter that is a transposed view must not be scrambled."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(300 * 200.0).view(200, 300).t())
    expected = model.weight.detach().clone()
    grad = torch.ones_like(expected).tril()
    model.weight.grad = grad
    ShardedAdamW(as_sharded(model), OptimConfig(weight_decay=0.0)).step(0.5)
    torch.testing.assert_close(model.weight.detach(), expected - 0.5 * grad, rtol=0, atol=1e-2)


def test_copies_of_one_parameter_stay_equal() -> None:
    """A tied embedding in two stages of one rank is updated twice; neighbours in buffers must not show."""
    parts = [
        nn.ParameterDict({"tied": torch.ones(9, 7), other: torch.ones(n)})
        for other, n in (("a", 5), ("b", 70))
    ]
    model = replace(as_sharded(parts[0]), parts=parts, held=[h for part in parts for h in held_of(part)])
    optimizer = ShardedAdamW(model, CONFIG)
    for step in range(1, STEPS + 1):
        for part in parts:
            for name, parameter in part.items():
                parameter.grad = gradient_of(name, parameter, step)
        optimizer.step(CONFIG.lr)
    copies = {
        name: [p.tensor for p in optimizer.parts() if p.name == name]
        for name in ("exp_avg.tied", "exp_avg_sq.tied")
    }
    copies["tied"] = [part["tied"] for part in parts]
    for name, (one, other) in copies.items():
        assert torch.equal(one, other), name
        assert not torch.equal(one, torch.ones(9, 7)), name


def test_every_gradient_comes_with_the_share_it_counts() -> None:
    """What several ranks hold must count once in a norm; what has no gradient counts nothing."""
    module = nn.ParameterDict({name: torch.zeros(2) for name in ("split", "copied", "tied", "idle")})
    shares = {"split": 1.0, "copied": 0.25, "tied": 0.25, "idle": 0.5}
    held = [replace(h, counted=shares[h.name]) for h in held_of(module)]
    optimizer = ShardedAdamW(replace(as_sharded(module), held=held), CONFIG)
    for number, name in enumerate(("split", "copied", "tied")):
        module[name].grad = torch.full((2,), float(number))
    found = [
        (counted, [grad.tolist() for grad in grads]) for counted, grads in optimizer.gradients_by_share()
    ]
    assert sorted(found) == [(0.25, [[1.0, 1.0], [2.0, 2.0]]), (1.0, [[0.0, 0.0]])]
    assert sorted(grad.tolist() for grad in optimizer.gradients()) == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_models_compute_with_what_was_updated(world_size: int) -> None:
    """FSDP gathers from the buffers: losses, norms and parameters are those of an unsharded model.

    Five and seven rows over 2 and 4 ranks: shards are padded, and some ranks hold nothing of a tensor.
    """
    x = torch.sin(torch.arange(40.0)).view(8, 5)

    def train(model: Any) -> tuple[list[float], list[int]]:
        optimizer = ShardedAdamW(as_sharded(model), CONFIG)
        losses, counts = [], []
        for _ in range(STEPS):
            loss = model(x)
            loss.backward()
            losses.append(loss.item())
            counts.append(len(optimizer.gradients()))
            optimizer.step(CONFIG.lr)
        for part in optimizer.parts():
            assert part.shape == model.get_parameter(part.name.partition(".")[2]).shape
        return losses, counts

    plain = Mixed()
    expected, _ = train(plain)

    def on_rank() -> list[float]:
        model: Any = Mixed()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(float(dist.get_world_size()))
                module.set_force_sum_reduction_for_comms(True)
        losses, _ = train(model)
        rows = [local_of(layer.bias) for layer in model.layers if local_of(layer.bias).numel()]
        assert len({row.untyped_storage().data_ptr() for row in rows}) <= 1, "FSDP moved a shard again"
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.full_tensor().detach(), plain.get_parameter(name).detach(), rtol=1e-4, atol=1e-5
            )
        return losses

    for losses in run_ranks(world_size, on_rank):
        assert losses == pytest.approx(expected, rel=1e-5)
