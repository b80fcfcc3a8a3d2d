"""A model of the user's, looked at before anything starts."""

import torch

from ..models.registry import build_model, limits_of, load_factory
from ..runtime.config import CustomModel
from ..runtime.plan import RunPlan, check_model


def check_own_model(plan: RunPlan, model: CustomModel) -> None:
    """Import the factory, and compare the layout with what the model's plan says where there is more than
    data parallelism.

    Raises ModelError when it cannot be imported or called so, ConfigError when it does not split so.
    """
    load_factory(model.family, model.fields)
    layout = plan.layout
    if layout.tp * layout.cp * layout.pp == 1:
        return
    with torch.device("meta"):  # one token is as good as the tokenizer's all: nothing is computed
        built = build_model(model.family, model.fields, vocab_size=layout.tp)
    check_model(plan, limits_of(built, family=model.family, seq_len=plan.config.data.seq_len))
