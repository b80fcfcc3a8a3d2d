"""What layouts cannot be: every rule with its reason. No torch here.

`parallel/legal.py` checks them, and `parallel/fit.py` puts a message together of what was found, why, and the
nearest layout that works. The table in docs/layouts.md is made of `RULES`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Two settings that may not fit together. The problem is told at the first."""

    id: str
    keys: tuple[str, str]
    refused: str  # when; for the documentation
    why: str


RANKS = Rule(
    "ranks",
    ("parallel.dp_shard", "run.workers"),
    "the axes do not multiply to the ranks, or with `dp_shard = -1` do not divide them",
    "each rank has exactly one place",
)
PLAN = Rule(
    "plan",
    ("parallel.tp", "model.family"),
    "`tp`, `cp` or `pp` above 1, and the model states no plan for it",
    "only its plan says how a model splits (give the model a `plan`, a ModelPlan: docs/models.md)",
)
TP_HEADS = Rule(
    "tp-heads",
    ("parallel.tp", "model.heads"),
    "`tp` does not divide `heads`",
    "a rank computes whole attention heads",
)
TP_KV_HEADS = Rule(
    "tp-kv-heads",
    ("parallel.tp", "model.kv_heads"),
    "`tp` does not divide `kv_heads`",
    "a rank computes whole key heads, those that its query heads read",
)
TP_FFN = Rule(
    "tp-ffn",
    ("parallel.tp", "model.ffn_dim"),
    "`ffn_dim`, dealt out in equal parts rounded up, does not reach every rank",
    "each rank computes at least one feature",
)
TP_VOCABULARY = Rule(
    "tp-vocabulary",
    ("parallel.tp", "model.vocab_size"),
    "`vocab_size`, dealt out in equal parts rounded up, does not reach every rank",
    "each rank knows at least one token",
)
TP_SEQUENCE = Rule(
    "tp-sequence",
    ("parallel.tp", "data.seq_len"),
    "`tp` does not divide the `seq_len / cp` tokens of a rank",
    "tensor parallel ranks share the sequence equally where no matrix is split",
)
CP_RING = Rule(
    "cp-ring",
    ("parallel.cp", "data.seq_len"),
    "`context` is ring, and `2 * cp` does not divide `seq_len`",
    "each rank takes an early and a late piece of every sequence, so that all have as much to attend to",
)
CP_ULYSSES = Rule(
    "cp-ulysses",
    ("parallel.cp", "data.seq_len"),
    "`context` is ulysses, and `cp` does not divide `seq_len`",
    "each rank takes an equal piece of every sequence",
)
CP_HEADS = Rule(
    "cp-heads",
    ("parallel.cp", "model.heads"),
    "`context` is ulysses, and `cp` does not divide the `heads / tp` of a rank",
    "ranks exchange their pieces of the sequence for whole heads",
)
CP_KV_HEADS = Rule(
    "cp-kv-heads",
    ("parallel.cp", "model.kv_heads"),
    "`context` is ulysses, and of `cp` and the `kv_heads / tp` of a rank neither divides the other",
    "ranks exchange whole key heads, or equal copies of them",
)
PP_LAYERS = Rule(
    "pp-layers",
    ("parallel.pp", "model.layers"),
    "more stages (`pp` times the stages of a rank) than `layers`",
    "a stage holds at least one layer",
)
STAGES_PER_RANK = Rule(
    "stages-per-rank",
    ("parallel.stages_per_rank", "parallel.pipeline_schedule"),
    "neither 0 nor 1 under gpipe and 1f1b, neither 0 nor 2 under zbv and dualpipev",
    "the schedule has no order for another number",
)
STAGE_COUNT = Rule(
    "stage-count",
    ("parallel.stage_layers", "parallel.pp"),
    "not one number for each stage (`pp` times the stages of a rank)",
    "each stage gets its number of layers",
)
STAGE_SUM = Rule(
    "stage-sum",
    ("parallel.stage_layers", "model.layers"),
    "the numbers do not add up to `layers`",
    "each layer has one place",
)
COMPILED = Rule(
    "compiled",
    ("kernels.compile", "parallel.pipeline_schedule"),
    "compiled blocks under interleaved_zero_bubble, zbv or dualpipev",
    "the schedule computes gradients of inputs and of weights apart, a compiled block both at once",
)
BATCH_SHARE = Rule(
    "batch-share",
    ("batch.size", "parallel.dp_shard"),
    "`dp_replicate * dp_shard` does not divide `batch.size`",
    "data parallel ranks take equal parts of a step",
)
BATCH_MICRO = Rule(
    "batch-micro",
    ("batch.micro_size", "batch.size"),
    "`micro_size` does not divide a rank's part of `batch.size`",
    "all micro-batches are of one size",
)
BATCH_STAGES = Rule(
    "batch-stages",
    ("batch.size", "parallel.pipeline_schedule"),
    "fewer micro-batches than stages under 1f1b or dualpipev",
    "the schedule keeps every stage at work on a micro-batch of its own",
)
BATCH_ROUNDS = Rule(
    "batch-rounds",
    ("batch.size", "parallel.pipeline_schedule"),
    "micro-batches under interleaved_1f1b or interleaved_zero_bubble that `n // pp` rounds do not divide",
    "the schedule takes equal rounds, of about as many micro-batches as there are pipeline ranks",
)

RULES = (
    *(RANKS, PLAN, TP_HEADS, TP_KV_HEADS, TP_FFN, TP_VOCABULARY, TP_SEQUENCE),
    *(CP_RING, CP_ULYSSES, CP_HEADS, CP_KV_HEADS),
    *(PP_LAYERS, STAGES_PER_RANK, STAGE_COUNT, STAGE_SUM, COMPILED),
    *(BATCH_SHARE, BATCH_MICRO, BATCH_STAGES, BATCH_ROUNDS),
)
OF_BATCH = frozenset((BATCH_SHARE, BATCH_MICRO, BATCH_STAGES, BATCH_ROUNDS))
