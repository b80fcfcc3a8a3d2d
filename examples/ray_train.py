"""The quick start inside Ray Train: the same run, placed and watched by a `TorchTrainer`. Run it with

    python examples/ray_train.py

and put keys over the configuration as in `python examples/ray_train.py run.steps=500 optim.lr=1e-3`. It needs
Ray Train: pip install 'rayfold[train]'.
"""

import sys
from pathlib import Path

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from rayfold.cluster.train import durable_checkpoint, loop_config, train_loop


def main() -> None:
    """Train on two workers of a Ray of this machine's own; on a cluster, ray.init(address="auto")."""
    ray.init(num_cpus=2, include_dashboard=False)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=loop_config(Path(__file__).with_name("quickstart.toml"), *sys.argv[1:]),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="quickstart",
            storage_path=str(Path("runs/ray_train").absolute()),
            failure_config=FailureConfig(max_failures=3),  # a lost worker costs a restart and at most a step
        ),
    )
    result = trainer.fit()
    durable = durable_checkpoint(result.checkpoint)  # what Ray Train holds is a pointer to it
    print(f"loss {result.metrics['loss']:.4f} at step {result.metrics['step']}")
    print(f"checkpoint of step {durable.step}: {durable.folder}")
    print(f"record of the run: {durable.run_dir}, as `rayfold report` takes it")


if __name__ == "__main__":
    main()
