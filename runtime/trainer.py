"""The loop of one rank. It holds references and calls; what it calls computes.

The loop is SPMD: every rank runs it, under any launcher, and nothing on the step path talks to anyone but the
other ranks. What happened is told to a `Recorder`, which must not wait.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..models.llama_config import LlamaConfig
from ..models.registry import build_model, limits_of
from ..parallel.mesh import FoldedMesh, make_mesh
from ..parallel.model import Sharded
from ..parallel.parallelize import Workings, parallelize, start_numbers
from .attempt import begin
from .checkpoint.checkpoint import Checkpointer, CheckpointNotWritten, Loaded
from .checkpoint.shelf import Shelf
from .corpus import Corpus, open_corpus, share_corpus
from .data.loader import Loader, val_batches
from .data.order import order_key
from .evaluate import Validation, evaluate
from .huggingface import load_weights
from .journal import EventKind
from .measure import memory_bytes
from .optim.adamw import ShardedAdamW
from .optim.schedule import learning_rate
from .optim.shards import Memory
from .place import SnapshotPlace, Warm
from .plan import RunPlan, check_model
from .progress import Progress
from .restore import Found, Makers, look_around, on_disk
from .snapshots import Snapshots
from .state import TrainState
from .step import NonFiniteLoss, NonFinitePeer, StepResult, on_device, train_step

logger = logging.getLogger(__name__)

ABANDON_S = 10.0  # for a checkpoint's writer to notice that the other ranks are gone


class Recorder(Protocol):
    """Where a rank tells what happened; neither method waits for anyone."""

    def metric(self, values: dict[str, Any]) -> Any:
        """One optimizer step."""

    def event(self, kind: EventKind, step: int, **fields: Any) -> Any:
        """Something worth remembering."""

    def flush(self) -> None:
        """Return when all that was told is written down."""


@dataclass(frozen=True)
class Outcome:
    """How a rank's loop ended."""

    status: str  # "finished" or "stopped"
    step: int


class Trainer:
    """Trains one rank of `plan` from where the run directory stands to its last step.

    The default process group must be initialised with `plan.layout.world_size` ranks before `run` is called.
    """

    def __init__(
        self,
        plan: RunPlan,
        recorder: Recorder,
        stop: threading.Event,
        *,
        place: SnapshotPlace | None = None,
        warm: Warm | None = None,
    ) -> None:
        """With a `place` the state is kept in memory beside checkpoints, and the newest of either counts.

        What `warm` has is used, and filled for another trainer in this process; all ranks have one or none.
        """
        self._plan = plan
        self._place = place if plan.config.snapshot.enabled is not False else None
        self._warm = warm
        self._config = plan.config
        self._recorder = recorder
        self._stop = stop
        self.step = 0  # the step being trained, for whoever asks while this runs
        self.phase = "setting up"

    def run(self) -> Outcome:
        """Train to the end, or until some rank's stop event is set; the last step reached has a durable
        checkpoint.
        """
        timeout = timedelta(seconds=self._config.run.collective_timeout_s)
        mesh = make_mesh(self._plan.layout, _device(self._plan.device), timeout=timeout)
        found = look_around(self._place, mesh) if self._place is not None else None
        self.phase = "reading the data"
        corpus = self._open_corpus(mesh, goes_on=found is not None and bool(found.sources))
        self._tell_skipped(mesh, corpus)
        self.phase = "building the model"
        checkpointer = self._make_checkpointer(mesh)
        with ExitStack() as to_close:
            if self._warm is None:
                to_close.enter_context(closing(corpus.dataset))
            else:
                to_close.callback(checkpointer.abandon, ABANDON_S)
            snapshots: Snapshots | None = None
            if self._place is None or found is None:
                state = self._build_state(mesh, corpus)
                self._resume(mesh, state, checkpointer)
            else:
                state, snapshots = self._begin(mesh, corpus, checkpointer, self._place, found)
            if snapshots is not None:
                to_close.enter_context(closing(snapshots))
            try:
                status = self._train(mesh, corpus, state, checkpointer, snapshots)
            except (NonFiniteLoss, NonFinitePeer):
                # raised by all ranks at one step, so a good step that is still being written can be finished
                self._finish_save(checkpointer)
                raise
            self.phase = "writing the last checkpoint"
            checkpointer.wait()  # one that failed on the way must not look like one that stands
        return Outcome(status, state.progress.step)

    def _open_corpus(self, mesh: FoldedMesh, *, goes_on: bool) -> Corpus:
        config, seed = self._config, self._config.run.seed
        if self._warm is not None:
            shared = share_corpus(config.data, mesh, self._warm.corpus, seed=seed)
            if shared is not None:
                shared.is_new = False  # what it skipped is told already
                self._warm.corpus = shared
                return shared
        corpus = open_corpus(
            config.data, mesh, config.run_dir, seed=seed, progress=self._data_progress, goes_on=goes_on
        )
        if self._warm is not None:
            self._warm.corpus = corpus
        return corpus

    def _train(
        self,
        mesh: FoldedMesh,
        corpus: Corpus,
        state: TrainState,
        checkpointer: Checkpointer,
        snapshots: Snapshots | None,
    ) -> str:
        loader = Loader(
            corpus.dataset,
            cursor=state.progress.cursor,
            batch_size=self._config.batch.size,
            dp_rank=mesh.data.rank,
            dp_size=mesh.data.size,
            micro_size=self._config.batch.micro(mesh.layout),
            prefetch=self._config.data.prefetch,
        )
        status = "finished"
        with loader:
            while state.progress.step < self._config.run.steps:
                if self._one_step(mesh, corpus, state, checkpointer, snapshots, loader):
                    status = "stopped" if state.progress.step < self._config.run.steps else "finished"
                    break
        if snapshots is not None:
            snapshots.finish(state.progress.step, state.progress_values())
        return status

    def _one_step(
        self,
        mesh: FoldedMesh,
        corpus: Corpus,
        state: TrainState,
        checkpointer: Checkpointer,
        snapshots: Snapshots | None,
        loader: Loader,
    ) -> bool:
        """Train, record, validate and save one step; whether some rank asks to stop."""
        config, started = self._config, time.perf_counter()
        self.step, self.phase = state.progress.step + 1, "training"
        batches = [on_device(batch, mesh.device) for batch in loader.next()]
        data_wait_s = time.perf_counter() - started
        seed_step(config.run.seed, self.step, mesh.data.rank)
        lr = learning_rate(config.optim, step=self.step, steps=config.run.steps)
        clip_norm = config.optim.clip_norm if config.optim.clip == "norm" else None
        if snapshots is not None:
            snapshots.before_forward()
        result = train_step(
            state.model,
            state.optimizer,
            batches,
            lr=lr,
            clip_norm=clip_norm,
            stop=self._stop.is_set(),
            guard=snapshots,
        )
        state.progress = Progress(self.step, loader.cursor, state.progress.tokens + result.tokens)
        line = self._line(result, lr=lr, seconds=time.perf_counter() - started, data_wait_s=data_wait_s)
        last = self.step == config.run.steps or result.stop
        due = last or (config.checkpoint.every > 0 and self.step % config.checkpoint.every == 0)
        if due:
            self.phase = "saving a checkpoint"
        if snapshots is not None:
            # with its line: whoever records it may die before that is written down
            snapshots.after_update(self.step, state.progress_values() | {"line": line}, due=due)
        saves = due and (snapshots is None or not snapshots.are_written)
        stall_s = checkpointer.stage(state) if saves else 0.0
        stall_s += snapshots.take_stall() if snapshots is not None else 0.0
        seconds = time.perf_counter() - started
        validation = self._validate(mesh, corpus, state.model)
        line |= {"time_unix": time.time(), "step_time_s": seconds, "tokens_per_s": result.tokens / seconds}
        line["snapshot_stall_s"] = stall_s
        if validation is not None:
            line |= {"val_loss": validation.loss, "val_bits_per_byte": validation.bits_per_byte}
        self._record(line)
        if saves:
            # only now: a checkpoint that stands while its step is missing from the record hides it for good
            checkpointer.write()
        self._tell_failed_save(checkpointer)
        return result.stop

    def _validate(self, mesh: FoldedMesh, corpus: Corpus, model: Sharded) -> Validation | None:
        """At its times and after the last step of all; who asks to stop is not kept waiting."""
        every = self._config.run.eval_every
        if not every or (self.step % every and self.step < self._config.run.steps):
            return None
        self.phase = "validating"
        batches = val_batches(
            corpus.dataset,
            dp_rank=mesh.data.rank,
            dp_size=mesh.data.size,
            micro_size=self._config.batch.micro(mesh.layout),
            limit=self._config.run.eval_samples or None,
        )
        return evaluate(model, batches, corpus.tokenizer.token_bytes)

    def _line(self, result: StepResult, *, lr: float, seconds: float, data_wait_s: float) -> dict[str, Any]:
        """The line of metrics as it is right after the update."""
        return {
            "step": self.step,
            "time_unix": time.time(),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": result.tokens,
            "tokens_per_s": result.tokens / seconds,
            "step_time_s": seconds,
            "data_wait_s": data_wait_s,
            "snapshot_stall_s": 0.0,
            "exposed_comm_s": result.exposed_comm_s,
            "memory_bytes": memory_bytes(self._plan.device),
        }

    def _record(self, line: dict[str, Any]) -> None:
        if self._warm is not None:
            self._warm.lines.append(line)
        self._recorder.metric(line)

    def _build_state(self, mesh: FoldedMesh, corpus: Corpus) -> TrainState:
        model = self._build_model(mesh, corpus)
        return TrainState(model, self._optimize(model, None), Progress())

    def _optimize(self, model: Sharded, memory: Memory | None) -> ShardedAdamW:
        return ShardedAdamW(model, self._config.optim, path=self._config.kernels.of("adamw"), memory=memory)

    def _build_model(self, mesh: FoldedMesh, corpus: Corpus, *, start: bool = True) -> Sharded:
        config = self._config
        fields = config.model if isinstance(config.model, LlamaConfig) else config.model.fields
        build: Callable[[], nn.Module] = lambda: build_model(  # noqa: E731 (called by parallelize)
            config.model.family, fields, vocab_size=corpus.tokenizer.vocab_size, kernels=config.kernels
        )
        with torch.device("meta"):  # what a plan of the user's model says is known only now
            limits = limits_of(build(), family=config.model.family, seq_len=config.data.seq_len)
        check_model(self._plan, limits)
        workings = Workings(
            compute=config.precision.compute,
            recompute=config.parallel.recompute,
            compiled=config.kernels.compile,
        )
        return parallelize(build, mesh, seed=config.run.seed, workings=workings, start=start)

    def _begin(
        self,
        mesh: FoldedMesh,
        corpus: Corpus,
        checkpointer: Checkpointer,
        place: SnapshotPlace,
        found: Found,
    ) -> tuple[TrainState, Snapshots | None]:
        """The newest state of all, in memory or on disk, and who guards it; nobody where there is no room."""
        started = time.perf_counter()

        def start(model: Sharded) -> None:
            start_numbers(model, seed=self._config.run.seed)
            self._read_weights(model)

        def load_checkpoint(state: TrainState) -> int | None:
            loaded = self._load_checkpoint(mesh, state, checkpointer, newest=found.newest)
            return None if loaded is None else loaded.step

        makers = Makers(
            build=lambda: self._build_model(mesh, corpus, start=False),
            start=start,
            optimize=self._optimize,
            load_checkpoint=load_checkpoint,
        )
        found.sources += on_disk(checkpointer.steps())
        self.phase = "restoring the state"
        lines = self._warm.lines if self._warm is not None else ()
        begun = begin(mesh, place, found, self._config, makers, lines=lines)
        if mesh.world.rank == 0:
            if begun.no_room is not None:
                message = f"no snapshots in memory: {begun.no_room}"
                self._recorder.event("snapshot", begun.state.progress.step, on=False, message=message)
            for line in begun.untold:
                self._recorder.metric(line)
            if begun.restored is not None:
                seconds = time.perf_counter() - started
                self._recorder.event("restored", begun.state.progress.step, **begun.restored, seconds=seconds)
        return begun.state, begun.snapshots

    def _make_checkpointer(self, mesh: FoldedMesh) -> Checkpointer:
        config = self._config
        shelf = Shelf(config.run_dir / "checkpoints", keep=config.checkpoint.keep)
        if mesh.world.rank == 0:
            shelf.clear_leftovers()
        # the writing thread needs collectives of its own: on the training group they would mix with the
        # step's
        timeout = timedelta(seconds=config.run.collective_timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)

        def committed(step: int, seconds: float) -> None:
            self._recorder.event("checkpoint", step, seconds=seconds)
            self._recorder.flush()  # a step before a checkpoint is never missing from the record

        return Checkpointer(shelf, everyone=mesh.world, group=group, device=mesh.device, on_commit=committed)

    def _resume(self, mesh: FoldedMesh, state: TrainState, checkpointer: Checkpointer) -> None:
        if self._load_checkpoint(mesh, state, checkpointer) is None:
            self._read_weights(state.model)

    def _read_weights(self, model: Sharded) -> None:
        if isinstance(self._config.model, LlamaConfig) and self._config.model.init_from:
            load_weights(model.held, Path(self._config.model.init_from))

    def _load_checkpoint(
        self, mesh: FoldedMesh, state: TrainState, checkpointer: Checkpointer, *, newest: int = 0
    ) -> Loaded | None:
        """The newest whole one on disk; `newest` is the last step that is known to be done, 0 if none is."""
        self.phase = "loading a checkpoint"
        started = time.perf_counter()
        loaded = checkpointer.load(state)
        if loaded is not None and mesh.world.rank == 0:
            for problem in loaded.damaged:
                self._recorder.event(
                    "fault", loaded.step, **{"class": "damaged_checkpoint", "message": problem}
                )
            lost = {"lost_steps": max(0, newest - loaded.step)} if newest else {}
            self._recorder.event(
                "restored",
                loaded.step,
                source="disk",
                from_step=loaded.step,
                **lost,
                seconds=time.perf_counter() - started,
            )
        return loaded

    def _tell_skipped(self, mesh: FoldedMesh, corpus: Corpus) -> None:
        if mesh.world.rank == 0 and corpus.is_new:
            for skip in corpus.index.skipped:
                message = f"{skip.path} {skip.where}: {skip.reason}"
                self._recorder.event(
                    "fault", 0, **{"class": "unreadable_data", "message": message, "count": skip.count}
                )

    def _finish_save(self, checkpointer: Checkpointer) -> None:
        self.phase = "finishing the checkpoint of the last good step"
        with suppress(CheckpointNotWritten):  # told as a fault; the error under way is the graver one
            checkpointer.wait()
        self._tell_failed_save(checkpointer)

    def _tell_failed_save(self, checkpointer: Checkpointer) -> None:
        if (error := checkpointer.take_error()) is not None and dist.get_rank() == 0:
            message = f"a checkpoint could not be written, the one before still stands: {error}"
            cause = "disk" if error.of_disk else "checkpoint_not_written"
            self._recorder.event("fault", self.step, **{"class": cause, "message": message})

    def _data_progress(self, done: int, total: int, what: str) -> None:
        self.phase = f"reading the data: {100 * done // max(total, 1)}% ({what})"


def seed_step(seed: int, step: int, data_rank: int) -> None:
    """Give a model that draws random numbers (dropout) a stream that follows from the step, so nothing needs
    saving.
    """
    torch.manual_seed(order_key(seed, "torch", step, data_rank))


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
