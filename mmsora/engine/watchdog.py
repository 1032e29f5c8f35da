"""Ranks that die or hang are noticed by the others, which say so and stop."""

import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from mmengine.dist import barrier, broadcast_object_list, get_rank, get_world_size
from torch.distributed import PrefixStore, Store, TCPStore

__all__ = ["Beat", "Fault", "Peers", "Watchdog", "open_store"]

# Of an iteration, in turn.
PHASES = ("starting", "loading data", "in the training step", "saving a checkpoint")
PATIENCE = 3  # beats that a rank may miss when there are other signs that one is gone
NOTHING = "nothing"  # is said to be wrong


class Beat(NamedTuple):
    """What a rank says of itself.

    Attributes:
        number: Counts up.
        host: Name of its machine.
        pid: Its process.
        iteration: Where it is.
        phase: What it does there.
        end: Why it stops: empty at the end of training, None while it goes on.
    """

    number: int
    host: str
    pid: int
    iteration: int
    phase: str
    end: str | None = None


class Fault(NamedTuple):
    """What is wrong with a rank.

    Attributes:
        rank: Which.
        text: A line for the log.
        is_hung: It lives, and can say where it is.
    """

    rank: int
    text: str
    is_hung: bool = False


class Peers:
    """What one rank knows of all, by its own clock.

    Args:
        rank: Its own.
        world: How many there are.
        dead_after: Seconds of silence after which a rank is dead.
        hung_after: Seconds without progress after which a rank hangs.
        interval: Seconds between beats.
        now: The time.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        dead_after: float,
        hung_after: float,
        interval: float,
        now: float,
    ) -> None:
        self.rank, self.interval = rank, interval
        self.dead_after, self.hung_after = dead_after, hung_after
        self.beats: list[Beat | None] = [None] * world
        self.heard, self.moved = [now] * world, [now] * world
        self.talked = self.asked = now

    def hear(self, beats: list[Beat], now: float) -> None:
        """Note what the ranks say."""
        self.talked = now
        for rank, (old, new) in enumerate(zip(self.beats, beats, strict=True)):
            if old is None or old.number != new.number:
                self.heard[rank] = now
            if old is None or old[3:] != new[3:]:
                self.moved[rank] = now
            self.beats[rank] = new

    def is_deaf(self, now: float) -> bool:
        """Whether the store, which lives beside the first rank, answers no more."""
        return now - self.talked > 2 * self.interval

    def fault(self, now: float, is_sure: bool) -> Fault | None:
        """What is wrong with the worst of the others.

        Args:
            now: The time.
            is_sure: There are other signs that a rank is gone, so that less silence is enough.

        Returns:
            What, or None while all is well.
        """
        self._forget_standstill(now)
        others = [rank for rank in range(len(self.beats)) if rank != self.rank]
        if self.is_deaf(now):
            others, silence = [0] if self.rank else [], [now - self.talked] * len(self.beats)
        else:
            silence = [now - heard for heard in self.heard]
        for rank in sorted(others, key=lambda rank: -silence[rank]):
            beat = self.beats[rank]
            end = beat.end if beat else None
            limit = self.dead_after
            if is_sure or end:
                limit = min(limit, PATIENCE * self.interval)
            if end != "" and silence[rank] > limit:
                return Fault(rank, f"{self._name(rank)} {self._silent(rank, silence[rank])}")
        return self._hung(now)

    def _forget_standstill(self, now: float) -> None:
        """Time in which this process itself was stopped says nothing of others."""
        gap, self.asked = now - self.asked, now
        if gap > 2 * self.interval:
            self.heard = [min(heard + gap, now) for heard in self.heard]
            self.moved = [min(moved + gap, now) for moved in self.moved]
            self.talked = min(self.talked + gap, now)

    def _hung(self, now: float) -> Fault | None:
        """The rank that is least far, if it does not move."""
        beats = [(beat, rank) for rank, beat in enumerate(self.beats) if beat and beat.end is None]
        if not beats:
            return None
        beat, rank = min(beats, key=lambda item: (item[0].iteration, _order(item[0].phase)))
        still = now - self.moved[rank]
        if still <= self.hung_after:
            return None
        text = f"{self._name(rank)} has not moved for {still:.0f} s; it is {_place(beat)}"
        return Fault(rank, text, is_hung=True)

    def _name(self, rank: int) -> str:
        beat = self.beats[rank]
        return f"rank {rank}" + (f" ({beat.host}, pid {beat.pid})" if beat else "")

    def _silent(self, rank: int, silence: float) -> str:
        beat = self.beats[rank]
        if beat is None:
            return f"has not been heard of for {silence:.0f} s"
        if beat.end:
            return f"stopped {_place(beat)}: {beat.end}"
        return f"has not been heard of for {silence:.0f} s; it was last {_place(beat)}"


def _order(phase: str) -> int:
    """How far a phase is into an iteration; what comes between iterations is last."""
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _place(beat: Beat) -> str:
    return f"at iteration {beat.iteration}, {beat.phase}"


def open_store(interval: float) -> Store:
    """A connection of this rank's own to the store of the run, and names that no other run uses.

    Args:
        interval: Seconds that an answer may take, at least.

    Returns:
        The store.
    """
    run = [uuid.uuid4().hex]
    broadcast_object_list(run)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=max(10.0, interval))
    store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(f"watchdog/{run[0]}", store)


class Watchdog:
    """Two threads: one tells the others that this rank lives, one stops it when another does not.

    They go on while the main thread waits for a collective that never ends, and end the process
    without it.

    Args:
        store: Where ranks talk.
        dead_after: Seconds of silence after which a rank is dead.
        hung_after: Seconds without progress after which a rank hangs.
        report: Takes a line for the log.
    """

    iteration: int
    phase: str
    end: str | None

    def __init__(
        self, store: Store, dead_after: float, hung_after: float, report: Callable[[str], None]
    ) -> None:
        self.rank, world = get_rank(), get_world_size()
        self.interval = min(2.0, dead_after / 10)
        self._store, self._report = store, report
        self._peers = Peers(
            self.rank, world, dead_after, hung_after, self.interval, time.monotonic()
        )
        self._host, self._beats = socket.gethostname(), 0
        self.iteration, self.phase, self.end = 0, "starting", None
        self._is_sure, self._stopping = False, threading.Event()
        self._threads = [
            threading.Thread(
                target=self._repeat, args=(step,), name=f"watchdog {name}", daemon=True
            )
            for name, step in (("talks", self._talk), ("judges", self._judge))
        ]

    def start(self) -> None:
        """Begin, on all ranks together."""
        self._say()
        if self.rank == 0:
            self._store.set("verdict", NOTHING)
        barrier()  # now there is something to read of every rank
        for thread in self._threads:
            thread.start()

    def stop(self, end: str = "") -> None:
        """Stop watching and being watched.

        Args:
            end: What went wrong here, for the others to know.
        """
        self.end = end
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE * self.interval)

    def wait(self) -> None:
        """Find out who is gone, after an error that says that somebody is.

        Ends the process when somebody is.
        """
        self._is_sure = True
        self._threads[1].join(2 * PATIENCE * self.interval)

    def _repeat(self, step: Callable[[], None]) -> None:
        while not self._stopping.wait(self.interval):
            step()
        if self.end is not None and step == self._talk:
            step()  # the last words

    def _say(self) -> None:
        self._beats += 1
        beat = Beat(self._beats, self._host, os.getpid(), self.iteration, self.phase, self.end)
        self._store.set(f"beat {self.rank}", json.dumps(beat))

    def _talk(self) -> None:
        keys = [f"beat {rank}" for rank in range(len(self._peers.beats))]
        try:
            self._say()
            *beats, verdict = self._store.multi_get([*keys, "verdict"])
        except RuntimeError:
            return  # the judge sees how long nothing came
        self._peers.hear([Beat(*json.loads(beat)) for beat in beats], time.monotonic())
        if verdict.decode() != NOTHING:
            self._leave(Fault(*json.loads(verdict)[:-1]))

    def _judge(self) -> None:
        now = time.monotonic()
        fault = self._peers.fault(now, self._is_sure)
        if fault is None:
            return
        if self._is_first(fault, now):
            self._report(f"{fault.text}; stopping. Go on with --resume")
        self._leave(fault)

    def _is_first(self, fault: Fault, now: float) -> bool:
        """Whether this rank speaks for all; without a store each speaks for itself."""
        if self._peers.is_deaf(now):
            return True
        text = json.dumps([*fault, self.rank])
        try:
            return self._store.compare_set("verdict", NOTHING, text).decode() == text
        except RuntimeError:
            return True

    def _leave(self, fault: Fault) -> None:
        """End the process, which may hang, as it is."""
        if fault.is_hung and fault.rank == self.rank:
            self._report(f"rank {self.rank} is here:\n{_stacks()}")
        if self.rank == 0:  # others read the store beside it
            time.sleep(PATIENCE * self.interval)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _stacks() -> str:
    """Where the threads of this process are, in Python."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "unknown")
        if not name.startswith("watchdog"):
            parts.append(f"thread {name}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)
