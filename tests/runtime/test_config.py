"""Configuration: every mistake is found before anything starts, and its message says what else.

The remedy is tested, not the wording: a message names its source, the key, and a value or a name that works.
"""

import dataclasses
import json
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.models.llama_config import PRESETS, LlamaConfig
from rayfold.runtime.config import (
    SECTIONS,
    ConfigError,
    CustomModel,
    RunConfig,
    check_config,
    documented_keys,
    read_config,
    write_toml,
)
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.plan import make_run_plan
from rayfold.runtime.resume import check_goes_on, newest_step
from rayfold.runtime.sections import RunSection


def problems_of(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        read_config(path, overrides)
    return str(raised.value).splitlines()


# override -> what the one line of its message must name beside the key
IMPOSSIBLE = {
    # unknown names
    "optim.lrr=1": ["nearest: optim.lr"],
    "optim.seq_len=1": ["nearest: data.seq_len"],
    "run.zzzzzz=1": ["nearest: run."],
    "model.dims=64": ["nearest: model.dim"],
    # types
    'run.steps="ten"': ['"ten"', "int", "without quotes"],
    "run.steps=1.5": ["1.5", "int"],
    "run.steps=true": ["true", "int"],
    'optim.lr="fast"': ['"fast"', "float", "without quotes"],
    "optim.lr=false": ["false", "float"],
    "optim.betas=[0.9]": ["[0.9]", "float"],
    "optim.betas=0.9": ["0.9", "float"],
    "data.shuffle=1": ["1", "bool"],
    "run.name=1": ["1", "text"],
    "data.source=[1, 2]": ["[1, 2]"],
    "run.seed=1979-05-27": ["1979-05-27", "int"],
    # choices
    "run.device=gpu": ['"gpu"', '"cpu"', '"cuda"', "nearest"],
    "run.workers=many": ['"many"', '"auto"'],
    "optim.schedule=cosin": ["nearest: ", '"cosine"'],
    "optim.name=adam": ["nearest: ", '"adamw"'],
    "optim.clip=value": ['"norm"', '"none"'],
    "precision.compute=fp16": ["nearest: ", '"bf16"', '"fp32"'],
    "precision.params=bf16": ['"fp32"'],
    "precision.reduce=bf16": ['"fp32"'],
    "parallel.recompute=some": ["nearest: ", '"none"'],
    "data.format=csv": ["nearest: ", '"text"'],
    "data.packing=all": ['"documents"', '"none"'],
    "model.preset=llama3-7b": ["llama3-7b", 'nearest: "llama3-', "tiny"],
    # run
    'run.name=""': ["first"],
    "run.name=a/b": ["a/b", "run.dir"],
    "run.name=.hidden": [".hidden"],
    "run.steps=0": ["0", "at least 1"],
    "run.seed=-1": ["-1", "0 or more"],
    "run.workers=0": ["0", '"auto"'],
    "run.workers=-2": ["-2", '"auto"'],
    "run.eval_every=-1": ["-1", "0 or more"],
    "run.eval_samples=-1": ["-1", "0 or more"],
    "run.start_timeout_s=0": ["above 0"],
    "run.collective_timeout_s=-1.0": ["above 0"],
    "run.collective_timeout_s=nan": ["NaN", "float"],
    # model
    "model.dim=0": ["0", "at least 1"],
    "model.layers=0": ["0", "at least 1"],
    "model.heads=0": ["0", "at least 1"],
    "model.kv_heads=0": ["0", "at least 1"],
    "model.ffn_dim=0": ["0", "at least 1"],
    "model.dim=130": ["130", "use 128"],
    "model.dim=132": ["132", "use 128", "use 136"],
    "model.kv_heads=3": ["3", "use 2"],
    "model.norm_eps=0.0": ["above 0", "1e-5"],
    "model.rope_theta=1.0": ["above 1", "10000"],
    "model.vocab_size=-1": ["-1", "use 0"],
    'model.init_from="/nowhere"': ["/nowhere"],
    # data
    'data.source=""': ["stdlib"],
    "data.source=[]": ["stdlib"],
    'data.source=[{path="a"}, {weight=1.0}]': ["path", "stdlib"],
    'data.source=[{path="a", weight=0.0}]': ["weight", "1.0"],
    'data.source=[{path="a", format="x"}]': ["format", "data.format"],
    'data.column=""': ["text"],
    'data.tokenizer=""': ["bytes"],
    "data.seq_len=0": ["0", "256"],
    "data.shuffle_blocks=0": ["0", "8"],
    "data.block_bytes=10": ["10", "4194304"],
    "data.prefetch=0": ["0", "2"],
    "data.val_fraction=1.0": ["1.0", "0.01"],
    "data.val_fraction=-0.1": ["-0.1", "0.01"],
    # batch
    "batch.size=0": ["0", "at least 1"],
    "batch.micro_size=-1": ["-1", "0 "],
    # optim
    "optim.lr=-1.0": ["-1.0", "3e-4"],
    "optim.lr=inf": ["Infinity", "float"],
    "optim.lr=nan": ["NaN", "float"],
    "optim.betas=[0.9, 1.0]": ["1.0", "[0.9, 0.95]"],
    "optim.eps=0.0": ["1e-8"],
    "optim.weight_decay=-0.1": ["0.1"],
    "optim.warmup_steps=-1": ["use 0"],
    "optim.decay_steps=-1": ["use 0"],
    "optim.min_lr_ratio=1.5": ["1.5", "from 0 to 1"],
    "optim.clip_norm=0.0": ["above 0", '"none"'],
    # parallel
    "parallel.dp_replicate=0": ["0", "use 1"],
    "parallel.dp_shard=0": ["0", "use -1"],
    **{f"parallel.{axis}=0": ["0", "use 1"] for axis in ("tp", "cp", "pp")},
    **{f"parallel.{axis}=2": ["2", "use 1"] for axis in ("ep", "etp", "bp", "dap")},
    "parallel.context=rings": ['"rings"', 'nearest: "ring"', '"ulysses"'],
    "parallel.pipeline_schedule=1f1p": ['"1f1p"', 'nearest: "1f1b"', '"zbv"'],
    "parallel.stages_per_rank=-1": ["-1", "use 0"],
    "parallel.stage_layers=[2, 0]": ["[2, 0]", "use [2, 1]", "[]"],
    'parallel.stage_layers=["a"]': ['["a"]', "tuple[int, ...]"],
    # kernels
    "kernels.linear=triton": ["triton", '"reference"'],
    "kernels.default=fast": ["fast", '"auto"'],
    # checkpoint
    "checkpoint.every=-1": ["-1", "0"],
    "checkpoint.keep=0": ["0", "at least 1"],
    # snapshot
    "snapshot.enabled=on": ['"on"', '"auto" | bool'],
    "snapshot.every=-1": ["-1", "0"],
    "snapshot.slots=1": ["1", "at least 2"],
    "snapshot.spares=-2": ["-2", "use -1"],
    "snapshot.memory_share=0.0": ["0.0", "0.5"],
}


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_an_impossible_value_says_where_what_and_what_else(override: str) -> None:
    """One line, the place it came from, the key, and something that works."""
    key = override.partition("=")[0]
    [line] = problems_of(override)
    assert line.startswith(f"command line: {key}: ")
    message = line.removeprefix(f"command line: {key}: ")
    wanted = IMPOSSIBLE[override]
    alternatives = [word for word in wanted if word.startswith("use 1")]
    if len(alternatives) > 1:  # two values are as near
        assert any(word in message for word in alternatives)
        wanted = [word for word in wanted if word not in alternatives]
    for word in wanted:
        assert word in message, message


def test_every_validated_section_has_impossible_values() -> None:
    """The table above must not forget a section that is added."""
    assert {override.partition(".")[0] for override in IMPOSSIBLE} == set(SECTIONS)


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_a_file_is_named_as_the_place(override: str, tmp_path: Path) -> None:
    """The same mistake in a file points to the file."""
    section, _, assignment = override.partition(".")
    key, _, raw = assignment.partition("=")
    try:
        tomllib.loads(f"v = {raw}")
    except tomllib.TOMLDecodeError:
        raw = json.dumps(raw)  # a bare word on the command line is a string
    path = tmp_path / "run.toml"
    path.write_text(f"[{section}]\n{key} = {raw}\n")
    [line] = problems_of(path=path)
    assert line.startswith(f"{path}: {section}.{key}: ")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """One mistake a run of the command would cost an afternoon; file and command line are told apart."""
    path = tmp_path / "run.toml"
    path.write_text("steps = 3\n[run]\nstep = 5\nseed = -1\n[optims]\nlr = 1\n[batch]\nsize = 'x'\n")
    lines = problems_of("optim.lr=-1", "bad", "checkpoint.keep=0", path=path)
    assert len(lines) == 8
    starts = (
        *(f"{path}: steps: ", f"{path}: run.step: ", f"{path}: run.seed: ", f"{path}: [optims]: "),
        *(f"{path}: batch.size: ", "command line: optim.lr: ", 'command line: "bad": '),
        "command line: checkpoint.keep: ",
    )
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start


def test_an_unknown_section_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt section must not be ignored with everything in it."""
    path = tmp_path / "run.toml"
    path.write_text("[modell]\ndim = 64\n")
    [line] = problems_of(path=path)
    assert line.startswith(f"{path}: [modell]: ")
    assert "[model]" in line
    [line] = problems_of("paralel.tp=1")
    assert line.startswith("command line: [paralel]: ")
    assert "[parallel]" in line


def test_a_key_outside_a_section_names_its_section(tmp_path: Path) -> None:
    """TOML's top level is the usual slip; the message says under which heading the key belongs."""
    path = tmp_path / "run.toml"
    path.write_text("lr = 1e-3\nnothing = 2\n")
    lines = problems_of(path=path)
    assert [line.split(": ")[:2] for line in lines] == [[str(path), "lr"], [str(path), "nothing"]]
    assert "[optim]" in lines[0]


@pytest.mark.parametrize(
    "text", ["[run\nsteps = 1", "[run]\nsteps = \n", "[run]\nsteps = 1\nsteps = 2\n", "\x00"]
)
def test_malformed_toml_names_file_and_line(text: str, tmp_path: Path) -> None:
    """The parser's own position is the best hint there is."""
    path = tmp_path / "run.toml"
    path.write_text(text)
    [line] = problems_of(path=path)
    assert line.startswith(f"{path}: ")
    assert re.search(r"line \d+|end of document", line)


@pytest.mark.parametrize("section", ["run = 3\n", "[[run]]\nsteps = 1\n", "run.steps.x = 1\n"])
def test_a_section_of_the_wrong_shape_is_an_error(section: str, tmp_path: Path) -> None:
    """A list of tables or a plain value where a section belongs must not crash the reader."""
    path = tmp_path / "run.toml"
    path.write_text(section)
    [line] = problems_of(path=path)
    assert line.startswith(f"{path}: run")


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    """Somebody will pass a checkpoint."""
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    [line] = problems_of(path=path)
    assert line.startswith(f"{path}: ")
    [line] = problems_of(path=tmp_path)
    assert line.startswith(f"{tmp_path}: ")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    """The usual reason is a typing slip in the name."""
    for name in ("quickstart.toml", "other.toml"):
        (tmp_path / name).write_text("")
    [line] = problems_of(path=tmp_path / "quikstart.toml")
    assert str(tmp_path / "quikstart.toml") in line
    assert str(tmp_path / "quickstart.toml") in line
    [line] = problems_of(path=tmp_path / "no folder" / "a.toml")
    assert line.endswith("no such file")


@pytest.mark.parametrize("text", ["steps", "run.steps", "steps=1", "=1", "run.=1", ""])
def test_an_override_has_one_spelling(text: str) -> None:
    """The message shows it with an example."""
    [line] = problems_of(text)
    assert line.startswith(f'command line: "{text}": ')
    assert "section.key=value" in line


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    """Later beats earlier, the command line beats the file; values are TOML, bare words are text."""
    path = tmp_path / "run.toml"
    path.write_text("[run]\nsteps = 5\nseed = 4\n")
    config = read_config(path, ["run.steps=6", "run.steps = 7", "run.name=first", "optim.betas=[0.8, 0.9]"])
    assert (config.run.steps, config.run.seed, config.run.name) == (7, 4, "first")
    assert config.optim.betas == (0.8, 0.9)


def test_an_int_serves_for_a_float_and_a_bool_for_nothing_else() -> None:
    """`lr = 1` is what people write; `steps = true` is a mistake."""
    assert read_config(None, ["optim.lr=1"]).optim.lr == 1.0
    assert isinstance(read_config(None, ["optim.clip_norm=1"]).optim.clip_norm, float)
    assert read_config(None, ["run.workers=2"]).run.workers == 2


def test_defaults_are_possible() -> None:
    """An empty file is a run."""
    assert read_config(None) == RunConfig()
    assert make_run_plan(RunConfig(), cpus=2, gpus=0).layout.world_size == 2


def test_every_key_is_documented() -> None:
    """`rayfold config` is the manual: a sentence, a type and a default for each key, and units."""
    keys = documented_keys()
    assert len(keys) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())
    for key in keys:
        assert key.doc.endswith("."), f"{key.section}.{key.name}"
        assert key.type, f"{key.section}.{key.name}"
        assert len(key.doc.split()) >= 1
        json.dumps(key.default)
    named = {f"{key.section}.{key.name}": key for key in keys}
    assert named["run.start_timeout_s"].unit == "seconds"
    assert named["model.preset"].type == "text"
    assert named["run.workers"].type == '"auto" | int'
    assert not [name for name, key in named.items() if name.endswith("_s") and key.unit != "seconds"]


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)
FLOATS = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)


@given(
    name=TEXT.filter(lambda text: "/" not in text and not text.startswith(".")),
    folder=TEXT,
    seed=st.integers(0, 2**62),
    lr=FLOATS,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    source=st.lists(TEXT.filter(str.strip), min_size=1, max_size=3),
    preset=st.sampled_from([None, *PRESETS]),
    tied=st.sampled_from([None, True, False]),
)
@settings(max_examples=40, deadline=None)
def test_a_written_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    folder: str,
    seed: int,
    lr: float,
    betas: tuple[float, float],
    source: list[str],
    preset: str | None,
    tied: bool | None,
) -> None:
    """`config.toml` of a run is compared when it goes on; a quote or a newline in a name must survive."""
    config = dataclasses.replace(
        RunConfig(),
        run=RunSection(name=name, dir=folder, seed=seed),
        optim=OptimConfig(lr=lr, betas=betas),
        model=LlamaConfig(preset=preset, tied_embeddings=tied),
        data=dataclasses.replace(RunConfig().data, source=source),
    )
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(write_toml(config), encoding="utf-8")
    assert read_config(path) == config
    assert check_config(config.to_dict()) == config
    assert check_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 3, "names": ["a", "b"], "options": {"deep": {"er": 1.5}}},
        {"odd key": 1, "x.y": True, "most": float("inf"), "since": date(2020, 1, 31)},
    ],
)
def test_a_custom_model_keeps_any_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    """Fields of a user's factory are the user's: tables and odd names pass through a file unchanged."""
    config = check_config({"model": {"family": "my_model:build", **fields}})
    assert config.model == CustomModel(family="my_model:build", fields=fields)
    path = tmp_path / "written.toml"
    path.write_text(write_toml(config))
    assert read_config(path) == config


@pytest.mark.parametrize("family", ["lama", "my_model", "my model:build", ":build", "my_model:"])
def test_a_family_that_is_no_factory_is_an_error(family: str) -> None:
    """The message shows how a factory is named, and the built-in family where that may be meant."""
    [line] = problems_of(f'model.family="{family}"')
    assert line.startswith("command line: model.family: ")
    assert "package.module:factory" in line
    assert ('"llama"' in line) == (":" not in family)
    [line] = problems_of("model.family=3")
    assert line.startswith("command line: model.family: ")


def test_a_custom_family_takes_no_preset_silently() -> None:
    """Every key beside `family` belongs to the factory."""
    config = read_config(None, ["model.family=a.b:c", "model.dim=3"])
    assert config.model == CustomModel(family="a.b:c", fields={"dim": 3})


# --- what a configuration comes to on given resources


def plan_problems(*overrides: str, cpus: int = 8, gpus: int = 0) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        make_run_plan(read_config(None, overrides), cpus=cpus, gpus=gpus)
    return str(raised.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.workers=4", "parallel.dp_shard=3"], ["dp_shard", "run.workers=3", "dp_shard=-1"]),
        (
            ["run.workers=6", "parallel.dp_replicate=4"],
            ["dp_replicate: is 4", "run.workers = 6", "dp_replicate=3"],
        ),
        (["run.workers=3", "batch.size=32"], ["batch.size", "32", "parallel.dp_shard", "batch.size=33"]),
        (
            ["run.workers=2", "batch.size=12", "batch.micro_size=4"],
            ["batch.micro_size", "4", "batch.micro_size=3"],
        ),
        (["run.workers=4", "parallel.tp=4"], ["parallel.tp", "model.kv_heads = 2", "parallel.tp=2"]),
        (["run.workers=6", "parallel.pp=4"], ["parallel.pp", "run.workers = 6", "parallel.pp=3"]),
        (["parallel.pp=8"], ["parallel.pp", "model.layers = 4", "parallel.pp=4"]),
        (["parallel.cp=8", "data.seq_len=136"], ["parallel.cp", "data.seq_len = 136", "parallel.cp=4"]),
        (
            ["parallel.pp=2", "batch.size=1"],
            ["batch.size", "parallel.pipeline_schedule = 1f1b", "batch.size=2"],
        ),
        (["run.workers=1", "run.eval_every=5"], ["run.eval_every", "data.val_fraction=0.05"]),
        (["run.device=cuda"], ["run.device", "cpu"]),
    ],
)
def test_what_does_not_fit_names_both_sides_and_the_nearest(overrides: list[str], words: list[str]) -> None:
    """An unsupported composition is an error at planning time, with a value that works."""
    [line] = plan_problems(*overrides)
    for word in words:
        assert word in line, line


def test_plan_problems_are_told_together() -> None:
    """Two mistakes, two lines."""
    assert len(plan_problems("run.workers=3", "run.eval_every=5")) == 2


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus", "expected"),
    [
        ([], 2, 0, (1, 2, "cpu")),
        ([], 64, 0, (1, 8, "cpu")),
        ([], 64, 16, (1, 16, "cuda")),
        (["run.device=cpu"], 4, 2, (1, 4, "cpu")),
        (["batch.size=30"], 8, 0, (1, 6, "cpu")),
        (["batch.size=7"], 4, 0, (1, 1, "cpu")),
        (["parallel.dp_replicate=3", "batch.size=12"], 8, 0, (3, 2, "cpu")),
        (["parallel.dp_shard=4"], 2, 0, (1, 4, "cpu")),
        (["parallel.dp_shard=2", "parallel.dp_replicate=2"], 2, 0, (2, 2, "cpu")),
        (["batch.size=8", "batch.micro_size=4"], 8, 0, (1, 2, "cpu")),
        (["parallel.tp=2"], 8, 0, (1, 4, "cpu")),
        (["parallel.tp=2", "parallel.cp=2", "parallel.dp_replicate=2"], 64, 16, (2, 2, "cuda")),
        (["parallel.tp=2", "parallel.pp=2"], 2, 0, (1, 1, "cpu")),
        (["parallel.tp=2", "parallel.dp_shard=3", "batch.size=30"], 2, 0, (1, 3, "cpu")),
        (["parallel.pp=2", "batch.size=6"], 16, 0, (1, 3, "cpu")),
    ],
)
def test_auto_takes_the_ranks_that_fit(
    overrides: list[str], cpus: int, gpus: int, expected: tuple[int, int, str]
) -> None:
    """`auto` must come to a layout that works on the machine at hand, never to an error of its own making."""
    plan = make_run_plan(read_config(None, overrides), cpus=cpus, gpus=gpus)
    assert (plan.layout.dp_replicate, plan.layout.dp_shard, plan.device) == expected
    assert plan.config.run.workers == plan.layout.world_size
    assert plan.config.run.device == plan.device


# --- going on in a run's folder


def start_run(folder: Path, *overrides: str) -> RunConfig:
    """A run folder as the command leaves it: a configuration and a committed checkpoint."""
    config = read_config(None, [f'run.dir="{folder}"', *overrides])
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "config.toml").write_text(write_toml(config))
    return config


@pytest.mark.parametrize(
    "override",
    [
        *("run.steps=500", "run.workers=4", "optim.lr=1", "batch.size=64", "parallel.dp_replicate=2"),
        *("checkpoint.every=7", "precision.compute=bf16", 'data.source="/elsewhere"', "data.prefetch=4"),
        "kernels=reference",
    ],
)
def test_what_does_not_change_the_data_or_the_model_may_change(override: str, tmp_path: Path) -> None:
    """Layout, rates and length belong to a command, not to the run."""
    started = start_run(tmp_path)
    asked = read_config(None, [f'run.dir="{tmp_path}"', override])
    assert asked != started
    check_goes_on(tmp_path, asked)
    assert read_config(tmp_path / "config.toml") == started  # and the record is left alone


@pytest.mark.parametrize(
    ("override", "before", "after"),
    [
        ("run.seed=3", "0", "3"),
        ("model.dim=64", "None", "64"),
        ("data.seq_len=64", "256", "64"),
        ("model.family=a:b", "'llama'", "'a:b'"),
    ],
)
def test_what_changes_the_numbers_is_refused_with_both_values(
    override: str, before: str, after: str, tmp_path: Path
) -> None:
    """A checkpoint under another model or another order of samples would train nonsense."""
    start_run(tmp_path)
    with pytest.raises(ConfigError) as raised:
        check_goes_on(tmp_path, read_config(None, [override]))
    line = str(raised.value).splitlines()[0]
    assert override.partition("=")[0] in line
    assert before in line
    assert after in line
    assert "run.name" in line


def test_a_folder_without_a_checkpoint_may_start_anew(tmp_path: Path) -> None:
    """Nothing is lost by starting over where nothing was reached."""
    start_run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000010").rmdir()
    check_goes_on(tmp_path, read_config(None, ["run.seed=3"]))
    assert newest_step(tmp_path) == 0
