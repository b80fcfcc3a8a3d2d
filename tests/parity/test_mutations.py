"""Break each exchange, one at a time: a parity test that stays green without it would prove nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutate import sites

MUTATE = Path(__file__).parents[1] / "mutate.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MUTATE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500)


def test_the_list_holds_every_exchange() -> None:
    """It is read from the source; these must be in it, or the reading has gone wrong."""
    found = [str(site) for site in sites()]
    for part in (
        *("gather(x, SEQUENCE_DIM", "reduce_scatter(part", "max_over(x", "sum_over(flat", "self.mesh.ends"),
        *("ring_shift(sums", "all_to_all(torch.cat", "loss / count", "copies *= 2", "1 / copies"),
        *("set_gradient_divide_factor", "batch_isend_irecv", "sum_over(counts", "sum_over(sums"),
    ):
        assert any(part in site for site in found), part
    assert len(found) == len(set(found))


def test_a_broken_exchange_is_noticed() -> None:
    """A seeded sample; the campaign breaks them all."""
    done = run("--sample", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 noticed" in done.stdout


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_every_broken_exchange_is_noticed() -> None:
    """The score must be 100%."""
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
