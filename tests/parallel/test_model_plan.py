"""A model's plan: what it cuts, and what is said when it does not fit the model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rayfold.models.llama import Llama, llama_plan
from rayfold.models.llama_config import LlamaShape
from rayfold.models.registry import limits_of
from rayfold.parallel.mesh import Axis
from rayfold.parallel.plan import ModelPlan, PlanError, Role, Split, Stages, check_plan
from rayfold.parallel.tensor import apply_tensor, share

SHAPE = LlamaShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=47, vocab_size=61)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_of_a_llama_fits_it(tied: bool) -> None:
    """Every pattern names something, tied or not, and no matrix is left whole on every rank."""
    model = Llama(replace(SHAPE, tied_embeddings=tied))
    check_plan(model.plan, model)
    assert all(model.plan.split_of(name) for name, p in model.named_parameters() if p.ndim == 2)


def test_a_pattern_that_names_nothing_is_refused() -> None:
    """A slip of the pen would leave a matrix whole on every rank, and still compute something."""
    plan = llama_plan(tied=False)
    wrong = replace(plan, parameters={**plan.parameters, "blocks.*.ffn.gte.weight": Split.COLUMN})
    with pytest.raises(PlanError, match=r'parameter "blocks\.\*\.ffn\.gte\.weight".*has none'):
        check_plan(wrong, Llama(SHAPE))


def test_cut_parameters_need_both_ends_of_the_sequence() -> None:
    """Who splits matrices splits the sequence between them, so its ends must be named."""
    plan = llama_plan(tied=False)
    wrong = replace(plan, modules={name: role for name, role in plan.modules.items() if role != Role.LOSS})
    with pytest.raises(PlanError, match=r"Role\.LOSS"):
        check_plan(wrong, Llama(SHAPE))


def test_a_bias_behind_a_sum_is_refused() -> None:
    """Each of the ranks would add it."""
    model = Llama(SHAPE)
    model.blocks[0].ffn.down = nn.Linear(47, 32)
    with pytest.raises(PlanError, match=r"every rank would add blocks\.0\.ffn\.down\.bias"):
        check_plan(model.plan, model)


def test_a_bias_is_cut_as_its_matrix_is() -> None:
    """A rank computes some of the outputs, and has the biases of those."""
    model = Llama(SHAPE)
    model.blocks[1].attention.q = nn.Linear(32, 32)
    with pytest.raises(PlanError, match=r"leaves blocks\.1\.attention\.q\.bias whole"):
        check_plan(model.plan, model)
    biases = {**model.plan.parameters, "blocks.1.attention.q.bias": Split.COLUMN}
    check_plan(replace(model.plan, parameters=biases), model)


def test_an_embedding_that_splits_the_sequence_must_be_cut() -> None:
    """Without, the sequence would stay whole behind it, and be gathered twice over."""
    plan = llama_plan(tied=False)
    cuts = {name: split for name, split in plan.parameters.items() if name != "embedding.weight"}
    with pytest.raises(PlanError, match=r"embedding\.weight is not cut.*Split\.VOCABULARY"):
        check_plan(replace(plan, parameters=cuts), Llama(SHAPE))


def test_vocabularies_are_of_one_size() -> None:
    """Ranks know the same tokens at the entry and in the loss."""
    model = Llama(SHAPE)
    model.head = nn.Linear(32, 64, bias=False)
    with pytest.raises(PlanError, match="vocabularies of several sizes"):
        check_plan(model.plan, model)


def test_a_cut_at_nothing_is_refused() -> None:
    """Stages are attributes of the model."""
    plan = ModelPlan(stages=Stages(entry=("embeding",), blocks="blocks", exit=("norm",)))
    with pytest.raises(PlanError, match='cuts at "embeding"'):
        check_plan(plan, Llama(SHAPE))


@pytest.mark.parametrize(("rows", "size"), [(8, 2), (63, 2), (63, 4), (5, 4), (97, 8)])
def test_rows_are_dealt_out_once(rows: int, size: int) -> None:
    """Pieces follow each other, the last ones may be smaller, none is left out."""
    pieces = [share(rows, Axis("tp", size, rank)) for rank in range(size)]
    assert [first for first, _ in pieces] == [min(rank * -(-rows // size), rows) for rank in range(size)]
    assert sum(count for _, count in pieces) == rows


def test_pieces_of_all_ranks_are_the_whole() -> None:
    """What the ranks hold, put side by side where they say it lies, is the matrix that was cut."""
    for name, whole in Llama(SHAPE).named_parameters():
        found = torch.full(whole.shape, torch.nan)
        for rank in range(2):
            model = Llama(SHAPE)
            with torch.no_grad():
                for each in model.parameters():
                    each.copy_(torch.arange(each.numel(), dtype=torch.float32).view(each.shape))
            piece = apply_tensor(model, model.plan, Axis("tp", 2, rank))[name]
            part = model.get_parameter(name).detach()
            assert piece.shape == tuple(whole.shape)
            assert piece.split == (part.shape != whole.shape)
            where = tuple(slice(o, o + n) for o, n in zip(piece.offsets, part.shape, strict=True))
            found[where] = part
        assert torch.equal(found, torch.arange(whole.numel(), dtype=torch.float32).view(whole.shape)), name


class Own(nn.Module):
    """A model of the user's that says how it splits over a pipeline, and nothing else."""

    plan = ModelPlan(stages=Stages(entry=("embedding",), blocks="layers", exit=("head",)))

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_a_plan_says_which_axes_a_model_can_use() -> None:
    """Without one there is data parallelism; with one, what it speaks of."""
    assert limits_of(nn.Linear(2, 2), family="a:b", seq_len=8) is None
    limits = limits_of(Own(), family="a:b", seq_len=8)
    assert limits is not None
    assert (limits.axes, limits.layers) == (("pp",), 3)
    llama = limits_of(Llama(SHAPE), family="llama", seq_len=8)
    assert llama is not None
    assert (llama.axes, llama.vocab_size) == (("tp", "cp", "pp"), 61)
