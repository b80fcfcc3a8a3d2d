"""Who answers and who is lost, by real actors of which one is killed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command

PROGRAM = """
import json, os, signal, time
import ray
from rayfold.cluster.pulse import SUSPECT_S, UNWATCHED_S, Pulse

class Vault:
    def following(self):
        return {os.getpid()}

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
vaults = {node: ray.remote(num_cpus=0)(Vault).remote() for node in ("lost", "there")}
pids = {node: ray.get(vault.following.remote()).pop() for node, vault in vaults.items()}
pulse, watched = Pulse(), {}

def look(seconds, ready):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lost, seen = pulse.look(time.monotonic(), vaults, {})
        watched.update(seen)
        if ready(lost):
            return lost
        time.sleep(0.02)
    return None

look(60, lambda lost: set(watched) == set(vaults))
look(SUSPECT_S, lambda lost: False)  # of the last question to each nobody has looked for the answer
os.kill(pids["lost"], signal.SIGKILL)
time.sleep(1.2 * UNWATCHED_S)  # as while ranks are waited for
since = time.monotonic()
answered = lambda: [node for node in vaults if pulse.heard_since(node, since)]
look(60, lambda lost: "there" in answered())
early = answered()
lost = look(60, lambda lost: lost)
print(json.dumps({"early": early, "lost": lost, "answered": answered()}))
"""


@pytest.mark.ray
def test_an_answer_from_before_a_node_was_lost_is_no_sign_of_life(
    driver: Callable[..., Command], tmp_path: Path
) -> None:
    """It was killed while nobody looked: what it had answered until then is found only afterwards."""
    (tmp_path / "pulse.py").write_text(PROGRAM)
    ended = driver(tmp_path / "pulse.py").wait()
    assert ended.status == 0, ended.err
    told = json.loads(ended.out.splitlines()[-1])
    assert told == {"early": ["there"], "lost": ["lost"], "answered": ["there"]}
