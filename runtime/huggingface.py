"""Weights from and to Hugging Face folders: safetensors and config.json, one file in memory at a time."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.llama_config import LlamaShape, shape_to_hf
from ..parallel.model import Held
from .checkpoint.format import Index, TensorEntry
from .checkpoint.storage import read_chunk
from .part import Part

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as the hub's own tools split

_FIXED = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}


class WeightsError(ValueError):
    """A folder of weights that does not hold what the model needs."""


def hf_name(name: str) -> str:
    """The name that `transformers` gives to the parameter `name` of a Llama. Raises WeightsError for any
    other name.
    """
    if name in _FIXED:
        return _FIXED[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[2] in _IN_BLOCK:
        return f"model.layers.{parts[1]}.{_IN_BLOCK[parts[2]]}"
    raise WeightsError(
        f"the parameter {name} has no counterpart in a Hugging Face Llama; only family = llama is exchanged"
    )


@torch.no_grad()
def load_weights(held: Iterable[Held], folder: Path) -> None:
    """Fill what a rank holds of a Llama from `folder`; only its box of each tensor is read.

    Raises WeightsError when a tensor is missing, has another shape, or a file cannot be read.
    """
    files = _files_by_tensor(folder)
    for part in (Part.of(one, one.name) for one in held):
        source = hf_name(part.name)
        if source not in files:
            raise WeightsError(
                f"{folder}: no tensor {source} for {part.name}; is model.tied_embeddings as in config.json?"
            )
        with safe_open(files[source], framework="pt") as opened:
            stored = opened.get_slice(source)
            if tuple(stored.get_shape()) != part.shape:
                raise WeightsError(
                    f"{files[source]}: {source} has shape {list(stored.get_shape())}, the model needs "
                    f"{list(part.shape)}; leave model.preset and the sizes away to take the shape of "
                    "config.json"
                )
            if part.tensor.numel():
                part.tensor.copy_(stored[part.box])


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_FILE
    try:
        if index.exists():
            return {
                name: folder / Path(file).name
                for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        single = folder / "model.safetensors"
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{folder}: no readable model.safetensors or {INDEX_FILE} ({error})") from error


def export_weights(
    checkpoint: Path,
    index: Index,
    shape: LlamaShape,
    out: Path,
    *,
    seq_len: int,
    end_id: int,
    tokenizer: Path | None,
) -> list[Path]:
    """Write the model of a checkpoint as a Hugging Face folder; returns the files.

    `out` must not hold another model. At most one output file is in memory at a time: 5 GB, or a tensor that
    is larger by itself, and beside it the chunk of the checkpoint that is being read. Raises WeightsError for
    a folder in use and DamagedCheckpoint for a checkpoint that is not whole.
    """
    if out.exists() and any(out.iterdir()):
        raise WeightsError(f"{out}: exists and is not empty; choose a new folder, nothing was written")
    entries = {n.removeprefix("model."): e for n, e in index.tensors.items() if n.startswith("model.")}
    groups = list(_group(entries))
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        _write(out / file, {name: entries[name] for name in names}, checkpoint)
        weight_map |= dict.fromkeys(map(hf_name, names), file)
        written.append(out / file)
    if len(groups) > 1:
        total = sum(_bytes(entry) for entry in entries.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (out / INDEX_FILE).write_text(text)
        written.append(out / INDEX_FILE)
    (out / "config.json").write_text(
        json.dumps(shape_to_hf(shape, seq_len=seq_len, end_id=end_id), indent=2) + "\n"
    )
    written.append(out / "config.json")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, out / "tokenizer.json")
        written.append(out / "tokenizer.json")
    return written


def _write(file: Path, entries: dict[str, TensorEntry], checkpoint: Path) -> None:
    tensors = {hf_name(name): _assemble(checkpoint, entry) for name, entry in entries.items()}
    save_file(tensors, file, metadata={"format": "pt"})  # freed on return, before the next file is read


def _group(entries: dict[str, TensorEntry]) -> Iterator[list[str]]:
    """Names in order, cut into files of at most SHARD_BYTES."""
    names: list[str] = []
    size = 0
    for name, entry in entries.items():
        if names and size + _bytes(entry) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(entry)
    yield names


def _bytes(entry: TensorEntry) -> int:
    return sum(chunk.length for chunk in entry.chunks)


def _assemble(checkpoint: Path, entry: TensorEntry) -> torch.Tensor:
    whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    for chunk in entry.chunks:
        box = tuple(
            slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        whole[box] = read_chunk(checkpoint, entry, chunk)
    return whole
