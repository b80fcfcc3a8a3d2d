"""Which path an operator takes, and how a path that is not there is refused."""

import pytest
import torch

from rayfold.kernels.config import KernelsConfig
from rayfold.kernels.dispatch import OPERATORS, KernelError, choose


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_takes_the_cpu_path_where_it_has_one_and_says_why(operator: str) -> None:
    """fp32 on the CPU is what every laptop trains in: each operator is fast there."""
    choice = choose(operator, torch.empty(1))
    assert choice.path == "cpu"
    assert choice.why == OPERATORS[operator].cpu_why


def test_auto_falls_back_to_the_reference_and_says_why() -> None:
    """A dtype that no path claims still computes."""
    choice = choose("linear", torch.empty(1, dtype=torch.bfloat16))
    assert choice.path == "reference"
    assert "bfloat16 on cpu" in choice.why


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_path_that_cannot_run_here_names_those_that_can(operator: str) -> None:
    """Silently taking another path would make the configuration a lie."""
    with pytest.raises(KernelError, match=rf"kernels.{operator}.*reference, cpu"):
        choose(operator, torch.empty(1), "triton")


def test_an_operator_follows_the_default_until_it_is_named() -> None:
    """`kernels = "reference"` with one operator on its fast path is how a difference is hunted down."""
    config = KernelsConfig(default="reference", attention="cpu")
    assert config.of("attention") == "cpu"
    assert {config.of(name) for name in config.operators if name != "attention"} == {"reference"}


def test_every_configured_operator_has_a_rule() -> None:
    """A key that nothing reads would be a dead flag."""
    assert set(KernelsConfig().operators) <= set(OPERATORS)
