"""The controller of a run: the actor that holds its course, takes in what workers push, and answers whoever
watches. It is the one writer of the run's record.

It is detached and named by the run's folder. When its process is lost Ray starts it again, and it goes on
(`course.py`) with the ranks, who have trained meanwhile. It ends when nobody wants to know how the run ended.
"""

import hashlib
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ray

from ..runtime.config import check_config
from ..runtime.plan import RunPlan, make_run_plan
from .claim import claim_record
from .course import Course
from .crew import Crew
from .home import Home
from .ledger import Ledger
from .record import Record

LEDGER = ".controller.json"
UNWATCHED_S = 5.0  # a command looks four times a second; one that was halted finds the summary
LOOK_EVERY_S = 1.0


class Controller:
    """Runs one plan from a thread of its own, while the run lasts; its methods are answered beside it."""

    def __init__(self, plan: dict[str, Any], home: Home, session: str) -> None:
        """`session` names the embedded session of the command, "" in a joined cluster."""
        home.enter()
        config = check_config(plan)
        context = ray.get_runtime_context()
        self._myself = context.current_actor
        self._plan: RunPlan = make_run_plan(config, cpus=1, gpus=int(config.run.device == "cuda"))
        run_dir, owner = Path(config.run_dir), str(context.get_actor_id())
        run_dir.mkdir(parents=True, exist_ok=True)
        self._claim = claim_record(run_dir)  # held for as long as this process lives
        self._record = Record(run_dir, config.run.name, owner=owner)
        run = session or f"rayfold-{owner[:12]}"  # the same in its next life
        self._course = Course(
            self._plan,
            crew=Crew(self._plan, home, self._myself, run=run, record=self._record),
            record=self._record,
            ledger=Ledger(run_dir / LEDGER, owner=owner),
        )
        self._summary: dict[str, Any] | None = None
        self._error: dict[str, str] | None = None
        self._watched = time.monotonic()
        threading.Thread(target=self._live, name="course", daemon=True).start()

    @ray.method(concurrency_group="record")
    def record(self, lines: list[tuple[str, dict[str, Any]]], epoch: int, rank: int, number: int) -> bool:
        """Write down what a worker tells, as `Record.take_in`."""
        return self._record.take_in(lines, epoch=epoch, rank=rank, number=number)

    @ray.method(concurrency_group="control")
    def view(self, since: int | None) -> dict[str, Any]:
        """State and phase; the news after number `since` and the number to ask with next (None: no news); the
        summary or the error when it has ended.
        """
        self._watched = time.monotonic()
        summary, error = self._summary, self._error  # before the news: then these are all that there are
        seen, news = self._record.news(since)
        return {
            "state": self._course.state.value,
            "phase": self._course.phase,
            "step": self._record.step,
            "stopping": self._course.stopping,
            "seen": seen,
            "news": news,
            "summary": summary,
            "error": error,
        }

    @ray.method(concurrency_group="control")
    def plan(self) -> dict[str, Any]:
        """The configuration that the run was begun with, as plain values."""
        return self._plan.config.to_dict()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ask for a clean stop: after the step the ranks are in, with a checkpoint."""
        self._course.ask_to_stop()

    @ray.method(concurrency_group="control")
    def notice(self, notice: Any) -> None:
        """Take in what a vault has seen of a process, or that one was asked to leave."""
        self._course.tell(notice)

    @ray.method(concurrency_group="control")
    def answers(self) -> bool:
        """That it is there."""
        return True

    def _live(self) -> None:
        try:
            self._summary = self._course.run()
        except BaseException as error:  # whatever it is, the command says it
            kind = "OSError" if isinstance(error, OSError) else type(error).__name__
            self._error = {"kind": kind, "message": str(error), "traceback": traceback.format_exc()}
        while time.monotonic() - self._watched < UNWATCHED_S:
            time.sleep(LOOK_EVERY_S)
        ray.kill(self._myself)  # an exit would have Ray start it again


def controller_name(run_dir: Path) -> str:
    """The name of the actor that controls the run in a folder, in the cluster that it runs on."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(run_dir))).hexdigest()
    return f"controller-{digest[:16]}"
