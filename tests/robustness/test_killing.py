"""``kill -9`` of the parent, a worker, its keeper and the fork server, at random and at chosen moments."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time

import pytest

from tests.robustness import stored

METHODS = "scale,scale:factor=0.25"
WHOLE_S = 1.5  # about how long an undisturbed sweep takes; moments are drawn from this


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory, make_command):
    """What a sweep that nobody disturbs stores."""
    folder = tmp_path_factory.mktemp("undisturbed")
    swept = nursery.sweep(folder, *make_command(METHODS))
    assert swept.wait() == 0, swept.err
    stored.assert_whole(folder)
    found = stored.current(folder)
    assert len(found) == 9
    assert {status for status, *_ in found.values()} == {"ok"}
    assert any(items for *_, items in found.values())
    return found


class Campaign:
    """One command again and again, each time disturbed, until a run comes to its end."""

    def __init__(self, nursery, base, arguments, undisturbed):
        self.nursery, self.base, self.arguments, self.undisturbed = nursery, base, arguments, undisturbed
        self.numbers = itertools.count()
        self.kills = self.completed = 0
        self.renew()

    def renew(self):
        self.folder = self.base / f"store-{next(self.numbers)}"
        self.folder.mkdir()
        self.seen = {}

    def start(self, **how):
        return self.nursery.sweep(self.folder, *self.arguments, **how)

    def ended(self, swept):
        """Check everything that must hold after a run, however it ended."""
        code = swept.wait()
        self.nursery.wait_until_empty()
        if not (self.folder / "results.db").exists():
            return
        stored.assert_whole(self.folder)
        now = stored.cells(self.folder)
        assert self.seen.items() <= now.items(), "a finished cell was lost or changed"
        # What was said to be finished is stored; one more may have been stored and not said.
        said = swept.err.count(": ok")
        assert said <= len(now) - len(self.seen) <= said + 1
        self.seen = now
        if code == 0:
            self.assert_complete()
            self.renew()

    def assert_complete(self):
        assert stored.current(self.folder) == self.undisturbed
        finished = stored.rows(self.folder, "SELECT status FROM sweeps ORDER BY id")
        assert finished[-1] == ("finished",)
        last = "SELECT count(*) FROM sweep_cells WHERE sweep_id = (SELECT max(id) FROM sweeps)"
        assert stored.rows(self.folder, last) == [(len(self.undisturbed),)]
        self.completed += 1

    def finish(self):
        """The same command, undisturbed, ends what is left."""
        swept = self.start()
        assert swept.wait() == 0, swept.err
        self.ended(swept)


@pytest.fixture
def campaign(nursery, tmp_path, command, undisturbed):
    return Campaign(nursery, tmp_path, command(METHODS), undisturbed)


def test_the_parent_killed_at_random_moments(campaign):
    chance = random.Random(1)
    while campaign.kills < 12:
        swept = campaign.start()
        time.sleep(chance.uniform(0.05, WHOLE_S))
        with contextlib.suppress(ProcessLookupError):
            swept.kill()
            campaign.kills += swept.wait() == -signal.SIGKILL
        campaign.ended(swept)
    campaign.finish()
    assert campaign.completed >= 1


@pytest.mark.parametrize(
    ("moment", "numbers"),
    [
        ("INSERT INTO cells", (1, 3)),
        ("INSERT INTO records", (2,)),
        ("INSERT INTO items", (1,)),
        ("before commit", (8,)),
        ("after commit", (7, 10)),
    ],
)
def test_the_parent_killed_inside_and_right_after_a_write(campaign, moment, numbers):
    for number in numbers:
        swept = campaign.start(kill_at=(moment, number))
        assert swept.wait() == -signal.SIGKILL, swept.err
        campaign.ended(swept)
    campaign.finish()


@pytest.mark.parametrize("victim", ["harness-worker", "harness-keeper"])
def test_a_worker_killed_at_random_moments(campaign, victim):
    """Somebody from outside killed it: its cell is measured again at once, by a new worker."""
    chance = random.Random(2)
    while campaign.kills < 3:
        swept = campaign.start()
        time.sleep(chance.uniform(0.2, WHOLE_S / 2))
        while not (found := swept.processes(victim)) and "9/9" not in swept.err:
            time.sleep(0.005)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                campaign.kills += 1
        assert swept.wait() == 0, swept.err
        campaign.ended(swept)


def test_the_fork_server_killed_at_random_moments(campaign):
    """The workers that it forked go on; the next ones come from a new server."""
    chance = random.Random(3)
    while campaign.kills < 4:
        swept = campaign.start()
        until = time.monotonic() + chance.uniform(0.1, WHOLE_S)
        killed = set()
        while time.monotonic() < until or not killed:
            pid = swept.server_pid()
            if pid is not None and pid not in killed:
                time.sleep(max(0.0, until - time.monotonic()))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        campaign.kills += len(killed)
        assert swept.wait() == 0, swept.err
        campaign.ended(swept)


def test_everybody_killed_at_once(campaign):
    chance = random.Random(4)
    for _ in range(2):
        swept = campaign.start()
        time.sleep(chance.uniform(0.3, WHOLE_S / 2))
        workers = swept.processes("harness-worker")
        keepers = swept.processes("harness-keeper")
        for pid in (swept.pid, swept.server_pid(), *keepers, *workers):
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(pid, signal.SIGKILL)
        campaign.ended(swept)
    campaign.finish()
