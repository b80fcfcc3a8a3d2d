"""The baseline of `throughput.py`: the same model and data trained by hand with FSDP2 under torchrun, no Ray,
no Rayfold loop.

Written as one would write it with torch alone: `fully_shard` on every block, `clip_grad_norm_`, fused AdamW
on the sharded parameters, one all-reduce for the count and one for the loss. Rank 0 prints one JSON line with
the tokens/s of each step.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rayfold.kernels.config import KernelsConfig
from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaConfig
from rayfold.models.registry import llama_shape
from rayfold.runtime.config import read_config
from rayfold.runtime.data.dataset import Dataset
from rayfold.runtime.data.index import build_index
from rayfold.runtime.data.loader import Loader
from rayfold.runtime.data.tokenizer import resolve_tokenizer
from rayfold.runtime.optim.schedule import learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = read_config(args.config, args.overrides)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokenizer = resolve_tokenizer(config.data)
    dataset = Dataset(config.data, build_index(config.data, tokenizer), tokenizer, config.run.seed)

    torch.manual_seed(config.run.seed)
    assert isinstance(config.model, LlamaConfig)
    plain = KernelsConfig(default="reference")
    model = Llama(llama_shape(config.model, tokenizer.vocab_size), plain)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    mesh = init_device_mesh("cpu", (world_size,))
    compute = torch.bfloat16 if config.precision.compute == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)

    speeds = []
    loader = Loader(
        dataset,
        cursor=0,
        batch_size=config.batch.size,
        dp_rank=rank,
        dp_size=world_size,
        micro_size=config.batch.micro_size or config.batch.size // world_size,
        prefetch=config.data.prefetch,
    )
    with loader:
        for step in range(1, config.run.steps + 1):
            started = time.perf_counter()
            batches = loader.next()
            count = torch.tensor(sum(int((b.labels != -100).sum()) for b in batches))
            dist.all_reduce(count)
            loss_sum = torch.zeros(())
            for batch in batches:
                logits = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
                loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="sum")
                (loss / count).backward()
                loss_sum += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            if isinstance(norm, DTensor):
                norm = norm.full_tensor()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step=step, steps=config.run.steps)
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss_sum)
            figures = (loss_sum.item() / count.item(), norm.item())
            assert all(map(torch.isfinite, map(torch.tensor, figures))), figures
            speeds.append(count.item() / (time.perf_counter() - started))
    if rank == 0:
        print(json.dumps({"tokens_per_s": speeds, "final_loss": figures[0]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
