"""The examples that users start from, and text tokenized once for many runs."""

import importlib.util
import json
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import Bench, events, lines, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"


def custom_model() -> ModuleType:
    """The example's module, loaded as any file is."""
    spec = importlib.util.spec_from_file_location("custom_model_example", EXAMPLES / "custom_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_custom_model_sees_no_later_token_and_no_other_document() -> None:
    """An example teaches: the logits of a document in a packed row are those of the document alone."""
    torch.manual_seed(0)
    model = custom_model().build(vocab_size=50, dim=16, layers=2, taps=5)
    tokens = torch.randint(50, (1, 13))
    documents = torch.tensor([[0] * 6 + [1] * 7])
    positions = torch.tensor([[*range(6), *range(7)]])
    packed = model(tokens, positions=positions, document_ids=documents)
    alone = model(tokens[:, 6:], positions=positions[:, 6:], document_ids=documents[:, 6:])
    torch.testing.assert_close(packed[:, 6:], alone)
    shorter = model(tokens[:, :9], positions=positions[:, :9], document_ids=documents[:, :9])
    torch.testing.assert_close(packed[:, :9], shorter)


@pytest.mark.ray
def test_a_users_own_model_trains_on_two_ranks(bench: Bench, run_dir: Path, text: Path) -> None:
    """The example as it is printed, on less data; its module is found beside its configuration."""
    small = ("run.steps=10", "batch.size=4", "data.seq_len=64", f"data.source={text}", f"run.dir={run_dir}")
    ended = bench.run("train", EXAMPLES / "custom_model.toml", *small, "--quiet")
    assert (ended.status, ended.out, ended.err) == (0, "", ""), "quiet is quiet"
    metrics = lines(run_dir / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert events(run_dir, "formed")[0]["world_size"] == 2
    export = bench.run("export", run_dir, bench.folder / "hf", timeout_s=60)
    assert export.status == 2, "a model of one's own has no counterpart there"
    assert "custom_model:build" in export.err


@pytest.mark.ray
@pytest.mark.timeout(600)  # four tokenizations and a run
def test_interrupted_tokenizing_goes_on_to_the_same_bytes_and_trains(
    bench: Bench, small: Path, run_dir: Path, tmp_path: Path
) -> None:
    """Killed at any time, the same command ends with the shards that an undisturbed one writes."""
    large = tmp_path / "large"
    large.mkdir()
    for number in range(3000):
        words = " ".join(f"w{(number * 13 + k * k) % 997}" for k in range(400))
        (large / f"{number:04d}.txt").write_text(f"{number} {words}\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--vocab-size", "512")
    ended = bench.run("data", "tokenize", large, whole, *options, "--json")
    assert ended.status == 0, ended.err
    assert ended.result["documents"] == 3000

    command = bench.start("data", "tokenize", large, killed, *options)
    wait_until(lambda: (killed / "tokenizer.json").exists(), 60, "a trained tokenizer")
    command.kill()
    assert command.wait(10).status == -signal.SIGKILL
    assert bench.run("train", small, f"data.source={killed}").status == 2, "half of it is no source"
    assert bench.run("data", "tokenize", large, killed, *options).status == 0
    for path in whole.iterdir():
        if path.suffix == ".arrow" or path.name == "tokenizer.json":
            assert path.read_bytes() == (killed / path.name).read_bytes(), path.name

    ended = bench.run("train", small, f"data.source={killed}")
    assert ended.status == 0, ended.err
    vocab = json.loads((killed / "index.json").read_text())["vocab_size"]
    assert "embedding" in (run_dir / "checkpoints/step-00000008/index.json").read_text()
    assert f"[{vocab},32]" in (run_dir / "checkpoints/step-00000008/index.json").read_text()
