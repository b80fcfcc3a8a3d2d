"""docs/layouts.md says what the code does: its table is made of the rules, its examples are planned."""

import re
from pathlib import Path

import pytest
from refusals import EXAMPLES, PAGE, refusals, remedies, with_table

from rayfold.parallel.folding import coordinate, dense_view
from rayfold.parallel.layout import SCHEDULES, Layout
from rayfold.parallel.rules import RULES
from rayfold.runtime.config import read_config
from rayfold.runtime.plan import make_run_plan

ROOT = PAGE.parents[1]
TEXT = PAGE.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


def test_the_table_of_refusals_is_that_of_the_code() -> None:
    """A rule that is added, changed or dropped shows on the page."""
    assert with_table(TEXT) == TEXT, (
        "docs/layouts.md does not list what parallel/rules.py refuses; write its table anew with "
        "`python tests/refusals.py`, and read what changed"
    )


def test_every_rule_has_an_example() -> None:
    """And no example outlives its rule."""
    assert set(EXAMPLES) == {rule.id for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_an_example_is_refused_and_each_remedy_accepted(rule: object) -> None:
    """As typed: the later of two words for a key wins."""
    example = EXAMPLES[rule.id]  # type: ignore[attr-defined]
    lines = refusals(example)
    assert lines
    for line in lines:
        for changes in remedies(line):
            typed = " ".join(f"{key}={value}" for key, value in changes.items())
            assert refusals(f"{example} {typed}") == [], f"{example} {typed}"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_command_can_be_planned(command: str) -> None:
    """Examples are copied before anything else is read."""
    program, verb, path, *overrides = command.split()
    assert (program, verb) == ("rayfold", "train")
    plan = make_run_plan(read_config(ROOT / path, overrides), cpus=8, gpus=0)
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("parallel."):
            assert f"{key.removeprefix('parallel.')}={value}" in str(plan.layout)


def test_an_example_configuration_can_be_planned(tmp_path: Path) -> None:
    """With the numbers that its comments give."""
    [block] = blocks("toml")
    (tmp_path / "large.toml").write_text(block)
    plan = make_run_plan(read_config(tmp_path / "large.toml"), cpus=8, gpus=8)
    assert plan.layout.dp_shard == 2
    assert [len(plan.layout.layers_of(stage, 80)) for stage in range(plan.layout.stages)] == [10] * 8


def test_the_places_of_ranks_are_those_of_the_mesh() -> None:
    """Whoever assigns machines to ranks reads the page."""
    [block] = [block for block in blocks("") if block.startswith("rank")]
    rows = {name: [int(n) for n in numbers] for name, *numbers in map(str.split, block.splitlines())}
    view = dense_view(Layout(dp_replicate=1, dp_shard=2, tp=2, pp=2))
    for rank in rows.pop("rank"):
        place = coordinate(view, rank)
        assert {axis: row[rank] for axis, row in rows.items()} == {axis: place[axis] for axis in rows}


def test_every_schedule_is_described() -> None:
    """By its name, with the stages that it takes by itself."""
    for name, schedule in SCHEDULES.items():
        stages = f"{schedule.stages_per_rank}{', or `stages_per_rank`' if schedule.any_stages else ''}"
        [row] = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}`")]
        assert row.split(" | ")[1] == stages
