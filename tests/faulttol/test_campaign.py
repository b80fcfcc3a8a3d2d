"""Campaigns: a file of faults becomes the same list each time, or says what is wrong with it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.faulttol.campaign import (
    INJECTIONS,
    WITHOUT_RANK,
    CampaignError,
    parse_campaign,
    read_campaign,
    schedule,
)
from rayfold.faulttol.outcome import PROMISES
from rayfold.parallel.layout import Layout

FOUR = Layout(dp_replicate=1, dp_shard=4)
TEXT = """
name = "mixed"

[[fault]]
kind = "stop"
rank = 1
every_s = 15
count = 2

[[fault]]
kind = "kill_in_update"
at_step = [5, 20]
count = 3

[[fault]]
kind = "kill_all"
at_step = 2
"""


def campaign(*faults: dict[str, Any]) -> Any:
    return parse_campaign({"fault": list(faults)}, source="chaos.toml")


def test_a_file_becomes_a_list_in_the_order_of_time(tmp_path: Path) -> None:
    """What an injector needs: what, whom and when."""
    path = tmp_path / "mixed.toml"
    path.write_text(TEXT)
    planned = schedule(read_campaign(path), 1, FOUR)
    assert [fault.index for fault in planned] == list(range(6))
    assert [fault.kind for fault in planned] == ["kill_all"] + ["kill_in_update"] * 3 + ["stop"] * 2
    assert [(fault.at_step, fault.rank) for fault in planned[:1]] == [(2, -1)]
    assert [(fault.at_s, fault.rank) for fault in planned[4:]] == [(15.0, 1), (30.0, 1)]
    steps = [fault.at_step for fault in planned[1:4]]
    assert steps == sorted(steps)  # type: ignore[type-var]


faults = st.builds(
    lambda kind, rank, when, count: (
        {"kind": kind, "count": count} | ({} if kind in WITHOUT_RANK else {"rank": rank}) | when
    ),
    st.sampled_from(INJECTIONS),
    st.sampled_from(["random", 0, 3]),
    st.sampled_from([{"at_step": 7}, {"at_step": [5, 20]}, {"every_s": 1.5}]),
    st.integers(1, 5),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(faults, min_size=1, max_size=4), st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_faults(some: list[dict[str, Any]], seed: int) -> None:
    """A failure that only one draw shows can be had again; another seed looks elsewhere."""
    planned = schedule(campaign(*some), seed, FOUR)
    assert planned == schedule(campaign(*some), seed, FOUR)
    assert len(planned) == sum(fault["count"] for fault in some)
    for fault in planned:
        assert (fault.at_step is None) != (fault.at_s is None)
        assert fault.rank in (range(-1, 0) if fault.kind in WITHOUT_RANK else range(4))
        assert fault.at_step is None or 5 <= fault.at_step <= 20
        assert 0 <= fault.draw < 2**32


def test_another_seed_draws_other_ranks_steps_and_bits() -> None:
    """Twenty repetitions must not be the same one twenty times."""
    many = campaign({"kind": "kill", "at_step": [1, 1000], "count": 20})
    one, two = schedule(many, 1, FOUR), schedule(many, 2, FOUR)
    assert len({fault.rank for fault in one}) == 4
    assert len({fault.draw for fault in one}) == 20
    assert [fault.at_step for fault in one] != [fault.at_step for fault in two]
    twice = schedule(campaign(*[{"kind": "kill", "at_step": 1, "count": 10}] * 2), 1, FOUR)
    assert len({fault.draw for fault in twice}) == 20, "two equal sections are not the same faults twice"


def test_a_section_that_is_added_leaves_the_others_alone() -> None:
    """So that a campaign can grow while a failure in it is being looked for."""
    kill = {"kind": "kill", "at_step": [1, 100], "count": 5}
    before = schedule(campaign(kill), 1, FOUR)
    after = schedule(campaign(kill, {"kind": "stop", "at_step": 3}), 1, FOUR)
    found = {(f.rank, f.at_step, f.draw) for f in after if f.kind == "kill"}
    assert found == {(f.rank, f.at_step, f.draw) for f in before}


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"kind": "kil", "at_step": 1}, 'fault[0].kind: is "kil"; nearest: "kill" of kill, kill_in_update'),
        ({"at_step": 1}, "fault[0].kind: is missing; nearest:"),
        ({"kind": "kill", "at_step": 1, "rnk": 2}, 'fault[0].rnk: there is no such key; nearest: "rank" of'),
        ({"kind": "kill", "at_step": 1, "rank": -1}, "fault[0].rank: is -1; give a rank from 0 on"),
        ({"kind": "kill", "at_step": 1, "rank": "all"}, 'fault[0].rank: is "all"; give a rank from 0 on'),
        ({"kind": "kill", "at_step": 1, "rank": True}, "fault[0].rank: is true; give"),
        ({"kind": "kill_all", "at_step": 1, "rank": 1}, "fault[0].rank: kill_all takes none"),
        ({"kind": "kill", "at_step": 1, "count": 0}, "fault[0].count: is 0; give a number from 1 on"),
        ({"kind": "kill"}, "fault[0].at_step: neither at_step nor every_s is given; say when"),
        (
            {"kind": "kill", "at_step": 1, "every_s": 1},
            "fault[0].at_step: both at_step and every_s are given",
        ),
        ({"kind": "kill", "at_step": 0}, "fault[0].at_step: is 0; give a step from 1 on"),
        (
            {"kind": "kill", "at_step": [5, 2]},
            "fault[0].at_step: is [5, 2]; give a step from 1 on, or [first",
        ),
        ({"kind": "kill", "at_step": [1, 2, 3]}, "fault[0].at_step: is [1, 2, 3]; give"),
        ({"kind": "kill", "every_s": 0}, "fault[0].every_s: is 0; give seconds above 0"),
        ({"kind": "kill", "every_s": float("inf")}, "fault[0].every_s: is inf; give seconds above 0"),
        ({"kind": "kill", "every_s": "1"}, 'fault[0].every_s: is "1"; give seconds above 0'),
    ],
)
def test_what_is_wrong_is_said_with_file_key_and_what_would_work(fault: dict[str, Any], problem: str) -> None:
    """A campaign runs for hours: a misspelt key must not be one that does nothing."""
    with pytest.raises(CampaignError) as error:
        campaign(fault)
    assert f"chaos.toml: {problem}" in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    """One round of corrections, not one a key."""
    with pytest.raises(CampaignError) as error:
        parse_campaign({"nam": "x", "fault": [{"kind": "kil", "count": 0}]}, source="chaos.toml")
    assert [line.split(":")[1].strip() for line in str(error.value).splitlines()] == [
        "nam",
        "fault[0].kind",
        "fault[0].count",
        "fault[0].at_step",
    ]


@pytest.mark.parametrize("values", [{}, {"fault": []}, {"fault": {"kind": "kill"}}, {"fault": [1]}])
def test_a_campaign_without_faults_is_refused(values: dict[str, Any]) -> None:
    """It would report that every promise was kept."""
    with pytest.raises(CampaignError, match=r"chaos.toml: fault: .* \[\[fault\]\]"):
        parse_campaign(values, source="chaos.toml")


def test_how_many_spares_a_fault_waits_for_is_a_number() -> None:
    """None unless that is said."""
    fault = [{"kind": "kill", "at_step": 1}]
    assert parse_campaign({"fault": fault}, source="chaos.toml").spares == 0
    assert parse_campaign({"fault": fault, "spares": 2}, source="chaos.toml").spares == 2
    with pytest.raises(CampaignError, match=r"chaos.toml: spares: is -1; give how many a fault waits for"):
        parse_campaign({"fault": fault, "spares": -1}, source="chaos.toml")


def test_a_rank_beyond_the_layout_is_refused() -> None:
    """Known only where the layout is."""
    with pytest.raises(CampaignError, match=r"chaos.toml: fault\[0\].rank: is 4, .* ranks 0 to 3"):
        schedule(campaign({"kind": "kill", "at_step": 1, "rank": 4}), 1, FOUR)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, or no TOML."""
    with pytest.raises(CampaignError, match=r"none.toml: cannot be read"):
        read_campaign(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[[fault]\n")
    with pytest.raises(CampaignError, match=r"bad.toml: is not TOML"):
        read_campaign(tmp_path / "bad.toml")


def test_every_kind_of_fault_has_a_promise() -> None:
    """A fault whose outcome nothing can break shows nothing."""
    assert set(PROMISES) == set(INJECTIONS)
