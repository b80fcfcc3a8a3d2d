"""Shape of a Llama: the configuration section, its presets, and the numbers that result. No torch here.

Published shapes: "The Llama 3 Herd of Models" (arXiv 2407.21783), table 3, and the released `config.json`
files.
"""

import difflib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..parallel.limits import ModelLimits


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Every number that decides which parameters a Llama has and what it computes."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int = 0  # 0: as many as the tokenizer has
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    def limits(self, seq_len: int) -> ModelLimits:
        """What decides over how many ranks of each axis this model can be laid out."""
        return ModelLimits(
            family="llama",
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            ffn_dim=self.ffn_dim,
            vocab_size=self.vocab_size or None,
            seq_len=seq_len,
            tied=self.tied_embeddings,
        )

    def problems(self) -> list[tuple[str, str]]:
        """Every pair of numbers that do not fit, as (key, what is wrong and what to write instead)."""
        found = []
        for key in ("dim", "layers", "heads", "kv_heads", "ffn_dim"):
            if getattr(self, key) < 1:
                found.append((key, f"is {getattr(self, key)}; must be at least 1"))
        if found:
            return found
        if self.dim % self.heads or self.head_dim % 2:
            step = 2 * self.heads
            nearest = max(step, round(self.dim / step) * step)
            found.append(
                (
                    "dim",
                    f"is {self.dim}, which model.heads = {self.heads} does not divide into even heads; use "
                    f"{nearest}",
                )
            )
        if self.heads % self.kv_heads:
            nearest = min(
                (k for k in range(1, self.heads + 1) if self.heads % k == 0),
                key=lambda k: abs(k - self.kv_heads),
            )
            found.append(
                ("kv_heads", f"is {self.kv_heads}, which does not divide heads = {self.heads}; use {nearest}")
            )
        if self.norm_eps <= 0:
            found.append(("norm_eps", f"is {self.norm_eps}; must be above 0, usually 1e-5"))
        if self.rope_theta <= 1:
            found.append(("rope_theta", f"is {self.rope_theta}; must be above 1, usually 10000 or 500000"))
        if self.vocab_size < 0:
            found.append(("vocab_size", f"is {self.vocab_size}; use 0 to take the tokenizer's, or its size"))
        return found


PRESETS: dict[str, LlamaShape] = {
    "tiny": LlamaShape(
        dim=128, layers=4, heads=4, kv_heads=2, ffn_dim=384, rope_theta=10_000.0, tied_embeddings=True
    ),
    "mini": LlamaShape(
        dim=384, layers=8, heads=6, kv_heads=2, ffn_dim=1024, rope_theta=10_000.0, tied_embeddings=True
    ),
    "llama3-8b": LlamaShape(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, vocab_size=128_256),
    "llama3-70b": LlamaShape(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28672, vocab_size=128_256),
    "llama3-405b": LlamaShape(
        dim=16384, layers=126, heads=128, kv_heads=8, ffn_dim=53248, vocab_size=128_256
    ),
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Section `[model]` of the llama family. A key that is not given takes the preset's number."""

    family: Annotated[str, "Model family: llama, or your own as package.module:factory."] = "llama"
    preset: Annotated[
        str | None,
        "Shape to start from: tiny, mini, llama3-8b, llama3-70b, llama3-405b. Without one: tiny, or the "
        "shape found in init_from.",
    ] = None
    init_from: Annotated[
        str | None, "Folder with Hugging Face weights (config.json, *.safetensors) to start from."
    ] = None
    dim: Annotated[int | None, "Width of the residual stream.", "features"] = None
    layers: Annotated[int | None, "Number of transformer blocks.", "blocks"] = None
    heads: Annotated[int | None, "Query heads.", "heads"] = None
    kv_heads: Annotated[int | None, "Key and value heads, shared by groups of query heads.", "heads"] = None
    ffn_dim: Annotated[int | None, "Width inside the feed-forward part.", "features"] = None
    vocab_size: Annotated[int | None, "Vocabulary; 0 takes the tokenizer's.", "tokens"] = None
    rope_theta: Annotated[float | None, "Base of the rotary frequencies."] = None
    norm_eps: Annotated[float | None, "Added to the mean square before the root."] = None
    tied_embeddings: Annotated[bool | None, "Use the embedding as the output matrix too."] = None

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        if self.preset is not None and self.preset not in PRESETS:
            near = difflib.get_close_matches(self.preset, PRESETS, n=1, cutoff=0.0)[0]
            return [
                ("preset", f'is "{self.preset}", which is none of {", ".join(PRESETS)}; nearest: "{near}"')
            ]
        try:
            return self.shape().problems()
        except (OSError, ValueError, KeyError) as error:
            return [("init_from", f'is "{self.init_from}", where no Llama could be read: {error}')]

    def shape(self) -> LlamaShape:
        """The preset (or the shape found in `init_from`) with the given keys put over it.

        Raises OSError, ValueError or KeyError when `init_from` holds no readable Llama `config.json`.
        """
        if self.preset is None and self.init_from is not None:
            base = shape_from_hf(json.loads((Path(self.init_from) / "config.json").read_text()))
        else:
            base = PRESETS[self.preset or "tiny"]
        given = {f.name: getattr(self, f.name, None) for f in fields(LlamaShape)}
        return replace(base, **{key: value for key, value in given.items() if value is not None})

    def limits(self, seq_len: int) -> ModelLimits:
        """What the shape says of itself; raises what `shape` raises."""
        return self.shape().limits(seq_len)


def shape_from_hf(config: dict[str, Any]) -> LlamaShape:
    """Read a Hugging Face `config.json`. Raises ValueError for what this family does not compute."""
    if config.get("model_type") != "llama":
        raise ValueError(
            f'config.json says model_type = "{config.get("model_type")}", this family reads "llama"'
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f'config.json asks for rope_type = "{kind}", this family computes "default" only')
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("config.json asks for biases, this family has none")
    if config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]):
        raise ValueError(
            f"config.json asks for head_dim = {config['head_dim']}, other than hidden_size / heads"
        )
    return LlamaShape(
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=config["rms_norm_eps"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def shape_to_hf(shape: LlamaShape, *, seq_len: int, end_id: int) -> dict[str, Any]:
    """The `config.json` that `transformers` reads as the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "torch_dtype": "float32",
    }
