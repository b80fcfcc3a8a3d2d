"""Whichever path operators take, a run trains alike; a path that cannot run is refused beforehand."""

import shutil
from pathlib import Path

import pytest
from training import metrics, small_config, train_on_ranks, write_corpus

from rayfold.runtime.config import ConfigError, check_config, read_config, write_toml
from rayfold.runtime.plan import make_run_plan

# updates as smooth as their gradients: see tests/parity/test_layouts.py
SMOOTH = ("optim.eps=1e-2", "optim.lr=1e-2", "run.steps=5", "data.val_fraction=0.1", "run.eval_every=5")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def figures(run_dir: Path, source: Path, *overrides: str, ranks: int = 2) -> list[float]:
    """Losses and gradient norms of every step, and the validation loss."""
    train_on_ranks(ranks, run_dir, source, *SMOOTH, *overrides)
    lines = metrics(run_dir)
    assert lines[-1]["loss"] < lines[0]["loss"]
    return [value for line in lines for value in (line["loss"], line["grad_norm"])] + [lines[-1]["val_loss"]]


@pytest.mark.parametrize("extra", [(), ("parallel.recompute=selective",), ("data.anchor=true",)], ids=str)
def test_plain_pytorch_trains_the_same_run(source: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """fp32 to 1e-5, losses, norms and validation: the fast paths are no other computation."""
    fast = figures(tmp_path / "fast", source, *extra)
    plain = figures(tmp_path / "plain", source, *extra, "kernels=reference")
    assert fast == pytest.approx(plain, rel=1e-5)
    assert fast != plain  # or the choice did not reach the model


def test_one_operator_can_be_chosen_by_name(source: Path, tmp_path: Path) -> None:
    """A difference is hunted down by putting one operator at a time on its other path."""
    plain = figures(tmp_path / "plain", source, "kernels=reference", ranks=1)
    one = figures(tmp_path / "one", source, "kernels=reference", "kernels.attention=cpu", ranks=1)
    assert one == pytest.approx(plain, rel=1e-5)
    assert one != plain


@pytest.mark.timeout(600)  # inductor compiles C++
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch imports what it has deprecated itself
@pytest.mark.filterwarnings("ignore::UserWarning")  # .grad of activations, rotary tables that stay uncompiled
@pytest.mark.parametrize(
    ("replicate", "shard", "recompute"),
    [pytest.param(1, 2, "none", marks=pytest.mark.campaign), (2, 1, "full")],
)
def test_compiled_blocks_train_the_same_run(
    source: Path, tmp_path: Path, replicate: int, shard: int, recompute: str
) -> None:
    """torch.compile under sharding, and under copies with recompute: the same numbers."""
    layout = (f"parallel.dp_replicate={replicate}", f"parallel.dp_shard={shard}")
    layout += (f"parallel.recompute={recompute}",)
    plain = figures(tmp_path / "plain", source, *layout)
    compiled = figures(tmp_path / "compiled", source, *layout, "kernels.compile=true")
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert compiled != plain  # or nothing was compiled


def test_a_path_that_the_device_does_not_have_is_refused(source: Path, tmp_path: Path) -> None:
    """Before anything starts, by name, with what can be written instead."""
    config = small_config(tmp_path, source, "kernels.norm=triton", "kernels.rope=triton")
    with pytest.raises(ConfigError, match=r"kernels.norm: .*triton.*cpu(.|\n)*kernels.rope"):
        make_run_plan(config, cpus=1, gpus=0)


def test_compiling_refuses_to_choose_what_a_block_keeps(source: Path, tmp_path: Path) -> None:
    """Selective recompute sees operators, and a compiled block has none left that it knows."""
    config = small_config(tmp_path, source, "kernels.compile=true", "parallel.recompute=selective")
    with pytest.raises(ConfigError, match=r"kernels.compile: .*selective.*full"):
        make_run_plan(config, cpus=1, gpus=0)


def test_compiling_without_a_compiler_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour into a queue inductor would fail in the middle of the first step."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    config = small_config(tmp_path, source, "kernels.compile=true")
    with pytest.raises(ConfigError, match=r"kernels.compile: .*g\+\+.*kernels.compile=false"):
        make_run_plan(config, cpus=1, gpus=0)


def test_the_short_form_is_the_default_of_the_section(tmp_path: Path) -> None:
    """`kernels = "reference"` in a file or on the command line, and the file that is written reads back."""
    path = tmp_path / "run.toml"
    path.write_text('kernels = "reference"\n[run]\nname = "x"\n')
    config = read_config(path)
    assert config.kernels.default == "reference"
    assert read_config(None, ["kernels=reference"]).kernels == config.kernels
    assert check_config(config.to_dict()) == config
    path.write_text(write_toml(config))
    assert read_config(path) == config
    with pytest.raises(ConfigError, match=r'kernels.default: is "fast".*nearest: "auto"'):
        read_config(None, ["kernels=fast"])
