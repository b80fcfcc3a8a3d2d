"""The table of docs/layouts.md, made of the rules and of one refused configuration each.

python tests/refusals.py       writes it anew
"""

import re
from pathlib import Path

from rayfold.parallel.layout import UNBUILT_AXES
from rayfold.parallel.rules import RULES, Rule
from rayfold.runtime.config import ConfigError, CustomModel, read_config
from rayfold.runtime.plan import check_model, make_run_plan

PAGE = Path(__file__).parents[1] / "docs" / "layouts.md"
BEGIN, END = "<!-- made by tests/refusals.py: begin -->\n", "<!-- end -->\n"

# rule -> the smallest change of the defaults (a tiny Llama: 4 layers, 4 heads, 2 key heads) that it refuses
EXAMPLES = {
    "ranks": "run.workers=4 parallel.tp=2 parallel.dp_shard=1",
    "plan": "run.workers=2 model.family=my_model:build parallel.tp=2",
    "tp-heads": "run.workers=3 model.kv_heads=1 data.seq_len=96 parallel.tp=3 batch.size=30",
    "tp-kv-heads": "run.workers=4 parallel.tp=4",
    "tp-ffn": "run.workers=4 model.kv_heads=4 model.ffn_dim=5 parallel.tp=4",
    "tp-vocabulary": "run.workers=4 model.kv_heads=4 model.vocab_size=5 parallel.tp=4",
    "tp-sequence": "run.workers=2 data.seq_len=255 parallel.tp=2",
    "cp-ring": "run.workers=2 data.seq_len=258 parallel.cp=2",
    "cp-ulysses": "run.workers=2 data.seq_len=255 parallel.cp=2 parallel.context=ulysses",
    "cp-heads": "run.workers=8 parallel.cp=8 parallel.context=ulysses",
    "cp-kv-heads": "run.workers=4 model.dim=96 model.heads=12 model.kv_heads=6 "
    "parallel.cp=4 parallel.context=ulysses",
    "pp-layers": "run.workers=8 parallel.pp=8",
    "stages-per-rank": "run.workers=2 parallel.pp=2 parallel.stages_per_rank=2",
    "stage-count": "run.workers=2 parallel.pp=2 parallel.stage_layers=[1,2,1]",
    "stage-sum": "run.workers=2 parallel.pp=2 parallel.stage_layers=[3,2]",
    "compiled": "run.workers=2 parallel.pp=2 parallel.pipeline_schedule=zbv kernels.compile=true",
    "batch-share": "run.workers=3",
    "batch-micro": "run.workers=2 batch.size=12 batch.micro_size=4",
    "batch-stages": "run.workers=4 parallel.pp=4 batch.micro_size=16",
    "batch-rounds": "run.workers=2 parallel.pp=2 parallel.pipeline_schedule=interleaved_1f1b "
    "batch.size=5 batch.micro_size=1",
}


def refusals(example: str) -> list[str]:
    """The lines that refuse a configuration; a model of the user's is one without a plan."""
    try:
        config = read_config(None, example.split())
        plan = make_run_plan(config, cpus=8, gpus=0)
        if isinstance(config.model, CustomModel):
            check_model(plan, None)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def remedies(line: str) -> list[dict[str, str]]:
    """What a message says to set, as it is typed; more than one where there is a choice."""
    advice = line.rpartition("; set ")[2]
    assignment = r"(\w+\.\w+)=(\[[^\]]*\]|[^\s,]+)"
    return [dict(re.findall(assignment, choice)) for choice in advice.split(", or ")]


def table() -> str:
    """The rows of `RULES`, and of the axes that are not there yet."""
    rows = ["| settings | refused | because | for example | nearest that works |", "|---|---|---|---|---|"]
    rows += [_row(rule) for rule in RULES]
    axes = ", ".join(f"`parallel.{axis}`" for axis in UNBUILT_AXES)
    rows.append(
        f"| {axes} | other than 1 | this version has no such axis | `parallel.ep=2` | `parallel.ep=1` |"
    )
    return "\n".join(rows) + "\n"


def _row(rule: Rule) -> str:
    [line] = [line for line in refusals(EXAMPLES[rule.id]) if f": {rule.why}; set " in line]
    nearest = ", or ".join(
        f"`{' '.join(f'{key}={value}' for key, value in changes.items())}`" for changes in remedies(line)
    )
    keys = ", ".join(f"`{key}`" for key in rule.keys)
    return f"| {keys} | {rule.refused} | {rule.why} | `{EXAMPLES[rule.id]}` | {nearest} |"


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
