"""A run from its first line to its report, as a user sees it."""

import json
import tomllib
from pathlib import Path

import pytest
from commands import Bench, events, lines, wait_until

METRIC_KEYS = {
    "step",
    "time_unix",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_s",
    "step_time_s",
    "data_wait_s",
    "snapshot_stall_s",
    "exposed_comm_s",
    "memory_bytes",
}
VALIDATED = {"val_loss", "val_bits_per_byte"}
SUMMARY_KEYS = {
    "status",
    "steps",
    "tokens",
    "first_loss",
    "final_loss",
    "tokens_per_s",
    "wall_s",
    "world_size",
    "layout",
    "restarts",
    "lost_steps",
    "goodput",
    "skipped_data",
}
FORMED_KEYS = {"spare_pids", "time_unix", "kind", "step", "epoch", "world_size", "layout", "nodes", "pids"}


@pytest.mark.ray
@pytest.mark.timeout(600)  # two runs of 15 s and three short commands, on a machine that may be busy
def test_a_run_keeps_its_contract_and_the_same_command_goes_on(
    bench: Bench, small: Path, run_dir: Path
) -> None:
    """Everything other tools read, in one run: record, JSON line, going on, report and export."""
    command = bench.start("train", small, "--json", "run.eval_every=4")
    wait_until(lambda: events(run_dir, "formed"), 60, "forming")
    assert bench.remember_ports(), "a run with no open port would make the check after it worthless"
    ended = command.wait()
    assert ended.status == 0, ended.err
    assert len(ended.out.splitlines()) == 1, "nothing but one JSON object on standard output"
    assert not {"\x1b", "\r"} & set(ended.err), "plain lines without a terminal"
    assert "step 8/8" in ended.err
    assert "checkpoint of step 8 is durable" in ended.err
    check_record(run_dir, ended.result)

    again = bench.run("train", small, "run.eval_every=4", timeout_s=30)
    assert again.status == 0
    assert "finished at step 8" in again.err
    assert "run.steps" in again.err, "how to go on"
    assert len(events(run_dir, "run_started")) == 1, "nothing was started"

    further = bench.start("train", small, "run.steps=12", "run.eval_every=4", on_terminal=True).wait()
    assert further.status == 0, further.out
    assert "goes on from step 8" in further.out
    assert "\x1b[" in further.out, "a live line on a terminal"
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == list(range(1, 13))
    told = {"source": "disk", "from_step": 8, "lost_steps": 0}
    assert events(run_dir, "restored")[0].items() >= told.items()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["restarts"], summary["lost_steps"]) == (12, 1, 0)

    (run_dir / "summary.json").write_text(json.dumps(summary | {"status": "failed", "verdict": "old"}))
    again = bench.run("train", small, "run.steps=12", "--json", timeout_s=30)
    assert (again.status, again.result["status"]) == (0, "finished"), (
        "a kill before the summary made it stale"
    )

    report = bench.run("report", run_dir, timeout_s=60)
    assert report.status == 0, report.err
    assert "<svg" in (run_dir / "report.html").read_text()
    export = bench.run("export", run_dir, bench.folder / "hf", "--to", "hf", "--json", timeout_s=60)
    assert export.status == 0, export.err
    assert export.result["step"] == 12
    assert json.loads((bench.folder / "hf" / "config.json").read_text())["model_type"] == "llama"


def check_record(run_dir: Path, result: dict[str, object]) -> None:
    """The four files of a run of eight steps that was validated every four."""
    resolved = tomllib.loads((run_dir / "config.toml").read_text())
    assert resolved["run"]["workers"] == 2
    assert set(resolved) == {
        "run",
        "model",
        "data",
        "batch",
        "optim",
        "precision",
        "parallel",
        "kernels",
        "checkpoint",
        "snapshot",
    }
    metrics = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    for line in metrics:
        assert set(line) == METRIC_KEYS | (VALIDATED if line["step"] % 4 == 0 else set())
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["val_loss"] < metrics[3]["val_loss"]
    kinds = [event["kind"] for event in lines(run_dir / "events.jsonl")]
    assert kinds == ["run_started", "formed", "checkpoint", "checkpoint", "run_finished"]
    (formed,) = events(run_dir, "formed")
    assert set(formed) == FORMED_KEYS
    assert (formed["epoch"], formed["world_size"], len(formed["nodes"])) == (1, 2, 2)
    assert len(set(formed["pids"])) == 2
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS | VALIDATED
    assert summary == result
    assert (summary["status"], summary["steps"], summary["world_size"]) == ("finished", 8, 2)
    assert summary["tokens"] == sum(line["tokens"] for line in metrics)


def test_every_key_is_documented_where_a_user_looks(bench: Bench) -> None:
    """`rayfold config` and `rayfold train --help` print the same keys, each with its meaning."""
    documented = bench.run("config", "--json", timeout_s=30).result["keys"]
    assert len(documented) > 40
    assert all(key["doc"].endswith(".") and key["type"] for key in documented)
    shown = bench.run("train", "--help", timeout_s=30)
    assert shown.status == 0
    for key in documented:
        assert f"{key['section']}.{key['name']}" in shown.out
