"""Llama against the published one: transformers' logits, parameter counts, and what documents may see.

Logits are compared with transformers 5 in fp32, norm-wise: two implementations add up in different orders,
and 1e-5 relative covers it as in every parity test.
"""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from plain import held_of
from training import train_on_ranks, write_corpus

from rayfold.kernels.rope import rotary_table, rotate
from rayfold.models import llama as llama_module
from rayfold.models.llama import Llama
from rayfold.models.llama_config import PRESETS, LlamaConfig, LlamaShape, shape_from_hf, shape_to_hf
from rayfold.models.registry import ModelError, build_model, llama_shape, load_factory
from rayfold.parallel.initial import Constant, fill
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import make_mesh
from rayfold.parallel.parallelize import Workings, parallelize
from rayfold.runtime import huggingface
from rayfold.runtime.checkpoint.format import read_index
from rayfold.runtime.huggingface import WeightsError, export_weights, load_weights
from rayfold.runtime.part import Part

TOLERANCE = 1e-5
SHAPE = LlamaShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=47, vocab_size=257, rope_theta=10_000.0)


def started(shape: LlamaShape) -> Llama:
    """A model in memory, started as the runtime does."""
    model = Llama(shape)
    for name, parameter in model.named_parameters():
        fill(parameter, model.initial(name), seed=3, name=name)
    return model


def plain_inputs(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions and ids of rows that are one document each."""
    return {
        "positions": torch.arange(tokens.shape[1]).expand_as(tokens),
        "document_ids": torch.zeros_like(tokens, dtype=torch.int32),
    }


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LlamaShape]:
    """A real run's last checkpoint, written by two shards, as a Hugging Face folder."""
    run_dir = tmp_path_factory.mktemp("run")
    tied = f"model.tied_embeddings={str(request.param).lower()}"
    source = write_corpus(tmp_path_factory.mktemp("corpus"))
    train_on_ranks(2, run_dir, source, "run.steps=3", "optim.lr=1e-2", tied, "data.seq_len=24")
    shape = LlamaShape(**{**vars(SHAPE), "tied_embeddings": request.param})
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    out = run_dir / "hf"
    export_weights(checkpoint, read_index(checkpoint), shape, out, seq_len=24, end_id=256, tokenizer=None)
    return out, shape


def loaded_alone(folder: Path, shape: LlamaShape) -> Llama:
    model = Llama(shape)
    load_weights(held_of(model), folder)
    return model


def test_logits_equal_transformers(exported: tuple[Path, LlamaShape]) -> None:
    """An exported model must be the same elsewhere: norms, rotary pairs, shared heads, tied output."""
    from transformers import LlamaForCausalLM

    folder, shape = exported
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 257, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = loaded_alone(folder, shape)(tokens, **plain_inputs(tokens))
    assert error_of(got, expected) < TOLERANCE


def test_packed_documents_are_separate_forwards(exported: tuple[Path, LlamaShape]) -> None:
    """A packed row is its documents side by side: transformers, given one at a time, must agree."""
    from transformers import LlamaForCausalLM

    folder, shape = exported
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lengths = [7, 1, 11, 5]
    tokens = torch.randint(0, 257, (1, 24), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)]], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        got = loaded_alone(folder, shape)(tokens, positions=positions, document_ids=ids)
        expected = torch.cat([theirs(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    assert error_of(got, expected) < TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_replicate=1, dp_shard=2),
        Layout(dp_replicate=2, dp_shard=2),
        Layout(dp_replicate=1, dp_shard=2, tp=2),
        Layout(dp_replicate=1, dp_shard=1, tp=2, pp=2),
    ],
    ids=str,
)
def test_weights_load_into_shards(exported: tuple[Path, LlamaShape], layout: Layout) -> None:
    """Each rank reads the boxes it holds; put together they are the file, bit for bit."""
    folder, shape = exported
    expected = {name: p.detach() for name, p in loaded_alone(folder, shape).named_parameters()}

    def on_rank() -> dict[str, int]:
        model = parallelize(lambda: Llama(shape), make_mesh(layout, torch.device("cpu")), seed=9)
        load_weights(model.held, folder)
        parts = [Part.of(held, held.name) for held in model.held]
        wrong = [part.name for part in parts if not torch.equal(part.tensor, expected[part.name][part.box])]
        assert wrong == []
        return {part.name: part.tensor.numel() for part in parts}

    counts = run_ranks(layout.world_size, on_rank)
    for name, whole in expected.items():
        assert sum(count.get(name, 0) for count in counts) >= whole.numel(), name


def test_the_shape_is_read_back_from_the_folder(exported: tuple[Path, LlamaShape]) -> None:
    """`init_from` alone must be enough to build the same model."""
    folder, shape = exported
    assert LlamaConfig(init_from=str(folder)).shape() == shape


def test_an_export_never_overwrites(exported: tuple[Path, LlamaShape], tmp_path: Path) -> None:
    """A folder with anything in it may be somebody's model."""
    (tmp_path / "notes.txt").write_text("mine")
    folder, shape = exported
    checkpoint = folder.parent / "checkpoints" / "step-00000003"
    index = read_index(checkpoint)
    with pytest.raises(WeightsError, match=str(tmp_path)):
        export_weights(checkpoint, index, shape, tmp_path, seq_len=24, end_id=0, tokenizer=None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_holds_one_file_in_memory(
    exported: tuple[Path, LlamaShape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model larger than the machine can still be exported: what is written is let go of."""
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = huggingface._assemble

    def watched(*args: Any) -> torch.Tensor:
        nonlocal most
        tensor = real(*args)
        made.append(weakref.ref(tensor))
        most = max(most, sum(alive.nbytes for ref in made if (alive := ref()) is not None))
        return tensor

    folder, shape = exported
    checkpoint = folder.parent / "checkpoints" / "step-00000003"
    monkeypatch.setattr(huggingface, "_assemble", watched)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    out = tmp_path / "hf"
    export_weights(checkpoint, read_index(checkpoint), shape, out, seq_len=24, end_id=256, tokenizer=None)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert most <= 40_000
    whole, parts = loaded_alone(folder, shape), loaded_alone(out, shape)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 64}, ["embed_tokens", "[257, 32]", "[257, 64]"]),
        ({"layers": 3}, ["model.layers.2"]),
        ({"ffn_dim": 48}, ["[47, 32]", "[48, 32]"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    exported: tuple[Path, LlamaShape], change: dict[str, Any], words: list[str]
) -> None:
    """The message names the tensor and both shapes."""
    folder, shape = exported
    with pytest.raises(WeightsError) as raised:
        load_weights(held_of(Llama(LlamaShape(**{**vars(shape), **change}))), folder)
    for word in words:
        assert word in str(raised.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A wrong path is the usual mistake; a cut file the next."""
    with pytest.raises(WeightsError, match=str(tmp_path)):
        load_weights(held_of(Llama(SHAPE)), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(WeightsError, match=str(tmp_path)):
        load_weights(held_of(Llama(SHAPE)), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 128},
    ],
)
def test_a_config_that_would_compute_something_else_is_refused(change: dict[str, Any]) -> None:
    """Loading what the family does not compute would train a wrong model in silence."""
    config = shape_to_hf(SHAPE, seq_len=8, end_id=0)
    assert shape_from_hf(json.loads(json.dumps(config))) == SHAPE
    with pytest.raises(ValueError, match=r"config\.json"):
        shape_from_hf(config | change)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3-405b", 405_853_388_800)],
)
def test_presets_have_the_published_numbers_of_parameters(preset: str, expected: int) -> None:
    """The published counts pin every size at once. 405B: 126 blocks, by hand in the next test."""
    with torch.device("meta"):
        model = build_model("llama", LlamaConfig(preset=preset), vocab_size=128_256)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_parameter_count_follows_from_the_shape() -> None:
    """405B by hand: two embeddings, a last norm, and 126 blocks of attention, feed-forward and two norms."""
    s = PRESETS["llama3-405b"]
    kv = s.kv_heads * s.dim // s.heads
    block = 2 * s.dim * s.dim + 2 * kv * s.dim + 3 * s.dim * s.ffn_dim + 2 * s.dim
    assert 2 * s.vocab_size * s.dim + s.dim + s.layers * block == 405_853_388_800


def test_documents_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of one document's logits by another's embeddings is exactly zero."""
    model = started(SHAPE)
    tokens = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.embedding.register_forward_hook(keep)
    logits = model(tokens, positions=positions, document_ids=ids)
    for place in range(12):
        [gradient] = torch.autograd.grad(logits[0, place].sum(), embedded[0], retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        first = 0 if place < 5 else 5
        assert reached.tolist() == [first <= other <= place for other in range(12)]


def test_rotary_angles_are_fp32_under_bf16() -> None:
    """bf16 cannot tell position 1000 from 1001; the angles must not go through it."""
    positions = torch.tensor([[1000, 1001]])
    turns = rotary_table(positions, 8, 10_000.0)
    assert turns.dtype == torch.complex64
    x = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = rotate(x, turns)
    angles = positions[0, :, None].double() * 10_000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    pairs = torch.complex(x[0, :, 0, :4].double(), x[0, :, 0, 4:].double())
    turned = torch.polar(torch.ones_like(angles), angles) * pairs
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    assert got.dtype == torch.bfloat16
    # one rounding to bf16 at the end is all that is lost
    assert error_of(got[0, :, 0].double(), expected) < 2.0**-8


def test_the_model_in_bf16_uses_fp32_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision casts the inputs of modules it wraps; the tables must reach the heads uncast."""
    seen: list[torch.dtype] = []
    real = llama_module.rotate

    def watched(x: torch.Tensor, turns: torch.Tensor, **path: Any) -> torch.Tensor:
        seen.extend((x.dtype, turns.dtype))
        return real(x, turns, **path)

    monkeypatch.setattr(llama_module, "rotate", watched)

    def on_rank() -> list[str]:
        mesh = make_mesh(Layout(dp_replicate=1, dp_shard=1), torch.device("cpu"))
        workings = Workings(compute="bf16")
        [model] = parallelize(lambda: Llama(SHAPE), mesh, seed=0, workings=workings).parts
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        assert dist.get_world_size() == 1
        model(tokens, **plain_inputs(tokens))
        return [str(dtype) for dtype in seen[:2]]

    assert run_ranks(1, on_rank) == [["torch.bfloat16", "torch.complex64"]]


def test_every_parameter_has_a_start() -> None:
    """Norms start at one, matrices with a spread of their own; the residual stream keeps its scale."""
    model = started(SHAPE)
    for name, parameter in model.named_parameters():
        initial = model.initial(name)
        if isinstance(initial, Constant):
            assert name.endswith("norm.weight")
            assert bool((parameter == 1).all())
        else:
            assert parameter.std().item() == pytest.approx(initial.std, rel=0.1), name


# --- the registry

FACTORIES = """
from torch import nn


def build(vocab_size, width=4, *, names=()):
    return nn.Embedding(vocab_size, width)


def greedy(vocab_size, **fields):
    return nn.Embedding(vocab_size, len(fields))
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's own module on the search path."""
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    (tmp_path / "my_broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_factories"


def test_a_users_factory_gets_its_fields(factories: str) -> None:
    """Keys of the section are arguments of the factory."""
    model = build_model(f"{factories}:build", {"width": 3}, vocab_size=11)
    assert tuple(next(model.parameters()).shape) == (11, 3)
    model = build_model(f"{factories}:greedy", {"a": 1, "b": 2}, vocab_size=5)
    assert tuple(next(model.parameters()).shape) == (5, 2)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("no_such_module_here:build", {}, ["no_such_module_here", "cannot be imported"]),
        ("my_broken:build", {}, ["my_broken", "not_installed_anywhere"]),
        ("my_factories:biuld", {}, ["biuld", "build"]),
        ("my_factories:build", {"widht": 3}, ["widht", "width"]),
        ("my_factories:nn", {}, ["nn"]),
    ],
)
def test_a_factory_that_cannot_be_called_says_why(
    factories: str, name: str, fields: dict[str, Any], words: list[str]
) -> None:
    """The message names what was asked for and what is there."""
    with pytest.raises(ModelError) as raised:
        load_factory(name, fields)
    for word in (name, *words):
        assert word in str(raised.value)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    """An id without an embedding would be read beside the table."""
    assert llama_shape(LlamaConfig(), 300).vocab_size == 300
    assert llama_shape(LlamaConfig(vocab_size=512), 300).vocab_size == 512
    with pytest.raises(ModelError, match=r"model\.vocab_size=0"):
        llama_shape(LlamaConfig(vocab_size=256), 257)
