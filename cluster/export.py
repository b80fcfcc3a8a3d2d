"""`rayfold export`: from a run's newest checkpoint to a folder of standard weights."""

from pathlib import Path
from typing import Any

from ..models.llama_config import LlamaConfig
from ..models.registry import llama_shape
from ..runtime.checkpoint.format import read_index
from ..runtime.checkpoint.shelf import Shelf
from ..runtime.config import ConfigError, read_config
from ..runtime.data.tokenizer import resolve_tokenizer, tokenizer_file
from ..runtime.huggingface import export_weights
from ..runtime.resume import newest_step


def export_run(run_dir: Path, out: Path) -> dict[str, Any]:
    """Write the newest checkpoint of `run_dir` into the new folder `out`; returns what was written.

    Raises ConfigError for a folder without a checkpoint or a model of another family.
    """
    step = newest_step(run_dir)
    if not step:
        raise ConfigError(f"{run_dir}: no checkpoint in it; name a run's folder, such as runs/quickstart")
    config = read_config(run_dir / "config.toml")
    if not isinstance(config.model, LlamaConfig):
        raise ConfigError(
            f'model.family = "{config.model.family}": only llama has a Hugging Face counterpart here'
        )
    tokenizer = resolve_tokenizer(config.data)
    checkpoint = Shelf(run_dir / "checkpoints", keep=1).path(step)
    files = export_weights(
        checkpoint,
        read_index(checkpoint),
        llama_shape(config.model, tokenizer.vocab_size),
        out,
        seq_len=config.data.seq_len,
        end_id=tokenizer.end_id,
        tokenizer=tokenizer_file(config.data),
    )
    return {"step": step, "files": [str(path) for path in files]}
