"""A bench for every test: real commands, and a check after each that nothing of them is left."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Bench, Command

SMALL = """
[run]
name = "small"
dir = "{run_dir}"
workers = 2
device = "cpu"
steps = 8
start_timeout_s = 60.0

[model]
dim = 32
layers = 2
heads = 2
kv_heads = 1
ffn_dim = 64

[data]
source = "{text}"
seq_len = 64
val_fraction = 0.1

[batch]
size = 4

[optim]
lr = 1e-2
warmup_steps = 1
schedule = "constant"

[checkpoint]
every = 4
"""

# A user's own model that takes its time, so that a test can act at a known step.
PACED = '''
"""A model of a user's own that counts its training steps and can be told to misbehave."""
import ctypes
import os
import time

import torch
from torch import nn
from torch.distributed import get_rank


SEEDS = {}  # of the steps that this process has trained, in order: trained again, a step has the same one


class Paced(nn.Module):
    def __init__(self, vocab_size, pause_s, trouble, rank, step):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])
        self.head = nn.Linear(16, vocab_size)
        self.pause_s, self.trouble, self.rank, self.step = pause_s, trouble, rank, step

    def forward(self, tokens, *, positions, document_ids):
        number = SEEDS.setdefault(torch.initial_seed(), len(SEEDS) + 1) if self.training else 0
        time.sleep(self.pause_s)
        if self.trouble and number == self.step and get_rank() == self.rank:
            make_trouble(self.trouble)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def make_trouble(kind):
    if kind.endswith("_once"):
        kind = kind.removesuffix("_once")
        if os.path.exists(kind):
            return
        open(kind, "w").close()
    if kind == "lock":
        ctypes.PyDLL(None).sleep(3600)  # native code that keeps the interpreter
    if kind == "hog":
        torch.empty(1 << 50)
    if kind == "raise":
        raise ArithmeticError("the flux capacitor is empty")
    if kind == "sleep":
        time.sleep(3600)
    if kind == "exit":
        os._exit(3)


def build(vocab_size, pause_s=0.0, trouble="", rank=0, step=0):
    if trouble == "build":
        raise ValueError("no such crystal")
    return Paced(vocab_size, pause_s, trouble, rank, step)
'''


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Where commands run; after the test nothing that they started may be there any more."""
    made = Bench(tmp_path)
    try:
        yield made
        assert made.left_behind() == []
    finally:
        made.close()


@pytest.fixture
def driver(bench: Bench, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts a program in the bench's environment: a user's driver with a Ray of its own."""
    bench.env |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(bench.short / "ray"),
        "PYTHONWARNINGS": "ignore",
    }
    (bench.short / "ray").mkdir()
    started: list[Command] = []

    def program(*args: str | Path) -> Command:
        started.append(Command((sys.executable, *map(str, args)), cwd=tmp_path, env=bench.env))
        return started[-1]

    yield program
    for command in started:
        command.close()
    # Ray keeps the logs of a session that is over, and its dashboard's processes a folder each
    for path in (bench.short / "ray", *bench.short.glob("pymp-*")):
        shutil.rmtree(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of short texts."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        words = " ".join(f"word{(number * 7 + k * k) % 31}" for k in range(80))
        (folder / f"{number:02d}.txt").write_text(f"Text {number}. {words}.\n")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of the test's run."""
    return tmp_path / "run"


@pytest.fixture
def small(tmp_path: Path, text: Path, run_dir: Path) -> Path:
    """A configuration that trains a very small Llama for eight steps on two ranks."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(run_dir=run_dir, text=text))
    return path


@pytest.fixture
def paced(small: Path) -> Path:
    """The same with a user's own model: set model.pause_s, and model.trouble, rank and step."""
    (small.parent / "paced.py").write_text(PACED)
    head, _, tail = small.read_text().partition("[model]")
    tail = tail[tail.index("[data]") :]
    path = small.with_name("paced.toml")
    path.write_text(f'{head}[model]\nfamily = "paced:build"\n\n{tail}')
    return path
