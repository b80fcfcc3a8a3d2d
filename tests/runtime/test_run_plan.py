"""Plans of layouts: what a command asks for and what it is told, with every number of ranks left open."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import remedies

from rayfold.parallel.limits import ModelLimits
from rayfold.runtime.config import ConfigError, read_config, read_settings
from rayfold.runtime.plan import RunPlan, check_model, make_run_plan, plan_settings

SIZES = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 6])


def plan(*overrides: str, cpus: int = 8) -> RunPlan:
    return make_run_plan(read_config(None, overrides), cpus=cpus, gpus=0)


@given(
    axes=st.fixed_dictionaries({"tp": SIZES, "cp": SIZES, "pp": SIZES, "dp_replicate": SIZES}),
    schedule=st.sampled_from(["1f1b", "interleaved_1f1b", "zbv", "dualpipev"]),
    batch=st.sampled_from([1, 6, 8, 30, 32]),
    cpus=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_with_open_ranks_a_plan_is_made_or_the_remedy_makes_one(
    axes: dict[str, int], schedule: str, batch: int, cpus: int
) -> None:
    """Nobody said how many ranks: a remedy must not depend on a number that nobody typed."""
    asked = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    asked += [f"parallel.pipeline_schedule={schedule}", f"batch.size={batch}"]
    try:
        assert plan(*asked, cpus=cpus).layout.world_size % axes["tp"] == 0
    except ConfigError as error:
        for line in str(error).splitlines():
            for changes in remedies(line):
                assert "run.workers" not in changes
                plan(*asked, *(f"{key}={value}" for key, value in changes.items()), cpus=cpus)


def test_layout_problems_come_with_all_others() -> None:
    """One command, one list; each line begins with where its key stands."""
    words = ["parallel.tp=3", "parallel.pp=8", "run.eval_every=5", "optim.lrr=1", "run.workers=24"]
    with pytest.raises(ConfigError) as raised:
        plan_settings(read_settings(None, words), cpus=8, gpus=0)
    lines = str(raised.value).splitlines()
    assert all(line.startswith("command line: ") for line in lines)
    told = {line.split(": ")[1] for line in lines}
    assert told == {"parallel.tp", "parallel.pp", "run.eval_every", "optim.lrr"}


def test_a_model_of_the_users_is_held_against_its_layout_when_it_is_there() -> None:
    """It is not imported to be planned; what it then says of itself is checked by the same rules."""
    made = plan("run.workers=4", "model.family=my_model:build", "parallel.tp=2", "parallel.pp=2")
    check_model(made, ModelLimits(family="my_model:build", layers=2, heads=4, kv_heads=4))
    for limits, words in (
        (None, ["parallel.tp", "parallel.pp", "ModelPlan"]),
        (ModelLimits(family="my_model:build", axes=("tp",)), ["parallel.pp", "my_model:build", "ModelPlan"]),
        (ModelLimits(family="my_model:build", layers=1), ["parallel.pp", "model.layers = 1"]),
        (ModelLimits(family="my_model:build", heads=3), ["parallel.tp", "model.heads = 3"]),
    ):
        with pytest.raises(ConfigError) as raised:
            check_model(made, limits)
        for word in words:
            assert word in str(raised.value)


def test_a_micro_batch_of_the_plan_suits_its_layout() -> None:
    """What the trainer reads, the memory estimate assumes and the rules checked is one number."""
    for overrides, size in (
        (["run.workers=2"], 16),
        (["run.workers=2", "batch.micro_size=4"], 4),
        (["run.workers=4", "parallel.pp=2"], 4),  # 16 sequences in 4 micro-batches over 2 stages
        (["run.workers=2", "parallel.pp=2", "parallel.pipeline_schedule=zbv"], 4),  # 4 stages
        (["run.workers=4", "parallel.pp=4", "batch.size=5"], 1),
    ):
        made = plan(*overrides)
        assert made.config.batch.micro(made.layout) == size, overrides
