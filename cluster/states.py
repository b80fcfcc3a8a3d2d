"""Where a run is, and where it can get from there.

    created -> starting -> forming -> running -> finished
                  |         |   ^      | |-----> stopping -> stopped
                  |         |   |      v
                  |         |   +-- recovering
                  +---------+----------+---------> failed

A controller that is started again is `created` again, and goes on where the one before was.
"""

import enum


class State(enum.Enum):
    """Where a run is."""

    CREATED = "created"
    STARTING = "starting"
    FORMING = "forming"
    RUNNING = "running"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.STARTING, State.RUNNING, State.RECOVERING, State.FAILED}),
    State.STARTING: frozenset({State.FORMING, State.STOPPED, State.FAILED}),
    State.FORMING: frozenset({State.RUNNING, State.RECOVERING, State.STOPPED, State.FAILED}),
    State.RUNNING: frozenset({State.RECOVERING, State.STOPPING, State.FINISHED, State.STOPPED, State.FAILED}),
    State.RECOVERING: frozenset({State.RECOVERING, State.FORMING, State.STOPPED, State.FAILED}),
    State.STOPPING: frozenset({State.RECOVERING, State.FINISHED, State.STOPPED, State.FAILED}),
    State.FINISHED: frozenset(),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}

BEFORE_THE_RANKS = frozenset({State.CREATED, State.STARTING})  # there are none that a run could go on with
WITH_AN_EPOCH = frozenset({State.RUNNING, State.STOPPING})  # all ranks are in the epoch that is written down
ENDS = frozenset(state for state, following in TRANSITIONS.items() if not following)
