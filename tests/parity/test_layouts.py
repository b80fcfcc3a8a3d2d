"""The same numbers under every layout: losses, norms, gradients and parameters against a plain PyTorch loop.

How it is measured, and why so, stands in `alike.py`.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import pytest
from alike import (
    BF16_LR,
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    SHAPE,
    Case,
    assert_parity,
    assert_same,
    error_of,
    plain_run,
    run_layout,
)

from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.layout import CONTEXTS, SCHEDULES, Layout
from rayfold.parallel.legal import legal_layouts
from rayfold.parallel.limits import Load

CASE = Case()
UNTIED = Case(shape=replace(SHAPE, tied_embeddings=False))
# 3 rows over 4 ranks: one rank holds no part of these matrices
THIN = Case(shape=replace(SHAPE, layers=1, ffn_dim=3, tied_embeddings=False))
BF16 = Case(compute="bf16", lr=BF16_LR, micro_size=1)  # the same rows at once, or bf16 rounds other sums
LOAD = Load(model=CASE.shape.limits(CASE.seq_len), batch_size=CASE.rows, micro_size=1)


def layouts(world_size: int) -> list[Layout]:
    """Every legal layout of `world_size` ranks, with every kind of context and every schedule."""
    return legal_layouts(LOAD, world_size=world_size, contexts=CONTEXTS, schedules=tuple(SCHEDULES))  # type: ignore[arg-type]


def of_four_ranks() -> list[Layout]:
    """Every layout with the default schedule, and each other schedule beside one more axis, in turn."""
    found = layouts(4)
    usual = [layout for layout in found if layout.schedule == "1f1b"]
    alone = [layout for layout in found if layout.schedule != "1f1b" and layout.pp == 4]
    beside = [layout for layout in found if layout.schedule != "1f1b" and layout.pp == 2]
    schedules = list(dict.fromkeys(layout.schedule for layout in beside))
    turns = [[x for x in beside if x.schedule == name] for name in schedules]
    return [*usual, *alone, *(of[number % len(of)] for number, of in enumerate(turns))]


def sample(of: Sequence[Layout], count: int) -> list[Layout]:
    """The same ones in every run."""
    return random.Random(20).sample(list(of), count)


def plain_ones(world_size: int) -> Iterator[Layout]:
    """Those with the default context and schedule."""
    return (x for x in layouts(world_size) if x.context == "ring" and x.schedule == "1f1b")


def test_the_reference_clips_and_learns() -> None:
    """Parity about clipping says something only where clipping is active, and the losses where they move."""
    plain = plain_run(CASE)
    assert min(plain.norms) > CASE.clip_norm
    assert plain.losses[2] < plain.losses[0]


@pytest.mark.parametrize("layout", [*layouts(1), *layouts(2), *of_four_ranks()], ids=str)
def test_every_layout_trains_as_one_plain_process(layout: Layout) -> None:
    """Uneven valid tokens, ranks without any, accumulation, clipping: nothing shows where samples lie."""
    assert_parity(CASE, layout)


@pytest.mark.parametrize("layout", sample(layouts(8), 3), ids=str)
def test_eight_ranks_train_as_one_plain_process(layout: Layout) -> None:
    """Three axes at once; a seeded sample of all."""
    assert_parity(CASE, layout)


@pytest.mark.campaign
@pytest.mark.parametrize("layout", [*layouts(4), *layouts(8)], ids=str)
def test_all_layouts_and_schedules_train_as_one_plain_process(layout: Layout) -> None:
    """Three axes at once, every combination with every schedule."""
    assert_parity(CASE, layout)


COMBINED = [
    Layout(dp_replicate=1, dp_shard=2, tp=2),
    Layout(dp_replicate=1, dp_shard=1, cp=2, tp=2),
    Layout(dp_replicate=1, dp_shard=1, cp=2, context="ulysses", pp=2),
    Layout(dp_replicate=2, dp_shard=1, pp=2, schedule="zbv"),
    Layout(dp_replicate=2, dp_shard=2),
]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [(layout, ("selective", "full")[number % 2]) for number, layout in enumerate(COMBINED)],
    ids=str,
)
def test_recompute_does_not_show(layout: Layout, recompute: Literal["selective", "full"]) -> None:
    """What is computed again, exchanges included, is what was computed first."""
    assert_parity(replace(CASE, recompute=recompute), layout)


@pytest.mark.parametrize("layout", [COMBINED[1], Layout(dp_replicate=1, dp_shard=1, pp=2)], ids=str)
def test_plain_operators_and_untied_embeddings_do_not_show(layout: Layout) -> None:
    """The reference path of every operator knows parts of vocabularies and contexts too."""
    assert_parity(replace(UNTIED, kernels="reference"), layout)


@pytest.mark.parametrize("layout", [*plain_ones(1), COMBINED[0], COMBINED[2]], ids=str)
def test_accumulation_does_not_show(layout: Layout) -> None:
    """A rank that takes row after row computes what one that takes several at once does."""
    assert_parity(replace(CASE, micro_size=4 if layout.pp > 1 else 1), layout)


@pytest.mark.parametrize(
    "layout", [Layout(dp_replicate=1, dp_shard=4), Layout(dp_replicate=1, dp_shard=2)], ids=str
)
def test_a_rank_may_hold_no_part_of_a_tensor(layout: Layout) -> None:
    """Three rows over four ranks leave one without; norms and updates still count each row once."""
    assert_parity(THIN, layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_replicate=1, dp_shard=1, pp=2, stage_layers=(1, 3)),
        Layout(dp_replicate=1, dp_shard=1, pp=2, schedule="interleaved_1f1b", stage_layers=(1, 1, 1, 2)),
        Layout(dp_replicate=1, dp_shard=1, pp=3),
    ],
    ids=str,
)
def test_uneven_stages_do_not_show(layout: Layout) -> None:
    """Stages may hold any number of layers, given or fitted."""
    shape: LlamaShape = replace(SHAPE, layers=sum(layout.stage_layers) or 4)
    assert_parity(replace(CASE, shape=shape, rows=6), layout)


# Stages and data parallel ranks compute what one rank does, bit for bit, and sum gradients in fp32. (One rank
# alone adds the two gradients of a tied embedding in bf16, so it is not tied here.)
DATA = [Layout(dp_replicate=r, dp_shard=s) for r, s in ((1, 2), (2, 1), (1, 4), (2, 2))]
DATA += [Layout(dp_replicate=1, dp_shard=2, pp=2), Layout(dp_replicate=1, dp_shard=1, pp=2, schedule="zbv")]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [*((layout, "none") for layout in DATA), (DATA[3], "selective"), (DATA[5], "full")],
    ids=str,
)
def test_bf16_data_and_pipeline_parallel_train_as_one_bf16_rank(
    layout: Layout, recompute: Literal["none", "selective", "full"]
) -> None:
    """Gradients are summed in fp32, so these add no rounding of their own to those of bf16."""
    case = replace(BF16, shape=UNTIED.shape)
    got = run_layout(replace(case, recompute=recompute), layout)
    alone = run_layout(case, Layout(dp_replicate=1, dp_shard=1))
    assert_same(got, alone, tolerance=BF16_TOLERANCE, first_step_tolerance=FP32_TOLERANCE)


SHARING = [x for x in plain_ones(2) if x.tp * x.cp > 1] + [
    Layout(dp_replicate=1, dp_shard=1, cp=2, context="ulysses"),
    Layout(dp_replicate=1, dp_shard=1, cp=2, tp=2),
    Layout(dp_replicate=1, dp_shard=1, tp=4),
]


@pytest.mark.parametrize("layout", SHARING, ids=str)
def test_bf16_ranks_that_share_work_round_no_worse_than_one(layout: Layout) -> None:
    """What ranks add up was rounded to bf16 before: a sum over n ranks rounds 2n - 1 times where one rank
    rounds once. Roundings are independent, so two runs differ by no more than sqrt(1 + 2n) times the error
    that one rank has against fp32, which is measured here; for the loss and the norm, whose errors are sums
    of many of either sign, by the largest of these.
    """
    case = replace(BF16, steps=1)
    exact, alone = (
        plain_run(replace(case, compute="fp32")),
        run_layout(case, Layout(dp_replicate=1, dp_shard=1)),
    )
    got = run_layout(case, layout)
    factor = (1 + 2 * layout.tp * layout.cp) ** 0.5
    errors = {name: error_of(alone.gradients[0][name], g) for name, g in exact.gradients[0].items()}
    for name, error in errors.items():
        # four roundings' worth a block, forward and back
        most = 4 * case.shape.layers * 2.0**-8
        assert 2.0**-12 < error < most, f"{name}: bf16 computes in bf16, and keeps its 8 bits"
        apart = error_of(got.gradients[0][name], alone.gradients[0][name])
        assert apart <= factor * error, f"{name}: {apart:.1e} apart, {error:.1e} from fp32"
    largest = factor * max(errors.values())
    assert got.losses[0] == pytest.approx(alone.losses[0], rel=largest)
    assert got.norms[0] == pytest.approx(alone.norms[0], rel=largest)
