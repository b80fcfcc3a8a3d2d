"""The vocabulary in which a model says how it splits. `parallel/` carries it out; the model knows no rank.

A model has one `plan: ModelPlan`. Names are patterns as in shell globs, `*` stands for anything. What a plan
does not name is the same on every rank of an axis: replicated over tensor parallel ranks.

Between the modules of a plan the sequence is split over tensor parallel ranks too (sequence parallelism,
arXiv 2205.05198): norms and additions are done once for each token, not once on each rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from torch import nn


class PlanError(ValueError):
    """A plan that does not fit its model."""


class Split(Enum):
    """How a parameter is cut over tensor parallel ranks."""

    COLUMN = "column"  # [out, in]: a rank computes some of the outputs (whole heads, hidden features)
    ROW = "row"  # [out, in]: a rank takes some of the inputs; the sum over ranks is due
    VOCABULARY = "vocabulary"  # [V, D]: a rank knows some of the tokens

    @property
    def dim(self) -> int:
        """The dimension that is dealt out."""
        return 1 if self is Split.ROW else 0


class Role(Enum):
    """What a module does when ranks share its work."""

    SEQUENCE = "sequence"  # takes the whole sequence, gives a part of a sum: gathered before, summed after
    EMBEDDING = "embedding"  # tokens [B, S] to vectors, of which a rank knows those of its vocabulary
    LOSS = "loss"  # forward(x, weight, labels, shard=None) -> sum of losses; weight is split by vocabulary
    ATTENTION = "attention"  # forward(q, k, v, mask): the one place where tokens meet


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Where a pipeline may cut. `entry` and `exit` are attributes of the model that the first and the last
    stage keep, `blocks` is the `nn.ModuleList` in between. `shared` are entry modules whose parameters the
    exit uses too: both stages hold them.
    """

    entry: tuple[str, ...]
    blocks: str
    exit: tuple[str, ...]
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """How a model splits. Without `stages` it has no pipeline, without an attention core no context axis."""

    parameters: Mapping[str, Split] = field(default_factory=dict)
    modules: Mapping[str, Role] = field(default_factory=dict)
    stages: Stages | None = None

    def split_of(self, name: str) -> Split | None:
        """How the parameter `name` is cut; None where every rank has it whole."""
        return next((split for pattern, split in self.parameters.items() if fnmatchcase(name, pattern)), None)

    def modules_with(self, role: Role, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that have `role`, in order."""
        patterns = [pattern for pattern, said in self.modules.items() if said is role]
        return [m for name, m in model.named_modules() if any(fnmatchcase(name, p) for p in patterns)]


def check_plan(plan: ModelPlan, model: nn.Module) -> None:
    """Raises PlanError for a pattern that names nothing in the whole `model`: a slip of the pen would leave
    something unsplit and still compute.
    """
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    for what, patterns, names in (
        ("parameter", plan.parameters, parameters),
        ("module", plan.modules, modules),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlanError(
                    f'the plan of {type(model).__name__} names the {what} "{pattern}", and the model has '
                    f"none of that name; it has {', '.join(names[:6])}, ..."
                )
    if plan.parameters:
        _check_cuts(plan, model)
    if plan.stages is not None:
        for name in (*plan.stages.entry, plan.stages.blocks, *plan.stages.exit):
            if not hasattr(model, name):
                raise PlanError(
                    f'the plan of {type(model).__name__} cuts at "{name}", which the model does not have'
                )


def _check_cuts(plan: ModelPlan, model: nn.Module) -> None:
    """Raises PlanError where ranks that hold pieces would compute something else than one that holds all."""
    who, parameters = type(model).__name__, dict(model.named_parameters())
    if not {Role.EMBEDDING, Role.LOSS} <= set(plan.modules.values()):
        raise PlanError(
            f"the plan of {who} cuts parameters, and names no module with Role.EMBEDDING or none with "
            "Role.LOSS: the sequence is split behind the one and whole again in the other; name both"
        )
    for module in plan.modules_with(Role.EMBEDDING, model):
        weight = next(name for name, p in parameters.items() if p is module.weight)
        if plan.split_of(weight) is not Split.VOCABULARY:
            raise PlanError(
                f"the plan of {who} gives an embedding Role.EMBEDDING, and {weight} is not cut: a rank knows "
                "the tokens of its own rows there; cut it by Split.VOCABULARY"
            )
    rows = {name: p.shape[0] for name, p in parameters.items() if plan.split_of(name) is Split.VOCABULARY}
    if len(set(rows.values())) > 1:
        raise PlanError(
            f"the plan of {who} cuts vocabularies of several sizes, {rows}: ranks hold the same tokens of all"
        )
    for name in parameters:
        bias = name.removesuffix("weight") + "bias"
        if bias not in parameters or bias == name:
            continue
        if plan.split_of(name) is Split.ROW:
            raise PlanError(
                f"the plan of {who} cuts {name} by rows, and every rank would add {bias} to its part of the "
                "sum; leave the bias away"
            )
        if plan.split_of(name) is Split.COLUMN and plan.split_of(bias) is not Split.COLUMN:
            raise PlanError(
                f"the plan of {who} cuts {name} by columns and leaves {bias} whole; cut both by Split.COLUMN"
            )
