"""Memory that runs out: the host's by a limit, the device's by its allocator; always `oom`."""

from __future__ import annotations

import pytest

from harness.executors import limits
from tests.robustness import stored

EATERS = ("eats-bytes", "eats-numpy", "eats-torch", "eats-mapped", "eats-wrapped")
WATCHED = ("eats-shared", "eats-in-children")
GIB = 2**30


@pytest.fixture(scope="module")
def eaten(nursery, tmp_path_factory, make_command):
    folder = tmp_path_factory.mktemp("eaten")
    names = ",".join((*EATERS, *WATCHED, "scale"))
    swept = nursery.sweep(
        folder, *make_command(names, "--memory-limit", 0.5, "--timeout", 30, "--jobs", 1, task=False)
    )
    assert swept.wait(timeout=200) == 1, swept.err
    nursery.wait_until_empty()
    return stored.statuses(folder)


@pytest.mark.parametrize("name", EATERS)
def test_an_allocation_without_bound_fails_at_the_limit(eaten, name):
    assert set(eaten[name]) == {"transform", "b1-p4-g1"}
    for status, reason in eaten[name].values():
        assert status == "oom", reason
        assert reason.startswith("out of memory while making the variant: ")


@pytest.mark.parametrize("name", WATCHED)
def test_memory_that_no_limit_of_a_process_counts_is_watched(eaten, name):
    for status, reason in eaten[name].values():
        assert status == "oom", reason
        assert "the limit of a worker is 0.50 GiB" in reason


def test_the_next_variant_is_well(eaten):
    assert {status for status, _ in eaten["scale"].values()} == {"ok"}


def test_device_memory_names_the_batch_and_the_next_cells_run_in_the_same_process(nursery, tmp_path, command):
    swept = nursery.sweep(tmp_path, *command("device-oom", "--batch-sizes", "1,3,2"))
    assert swept.wait() == 1, swept.err
    found = stored.statuses(tmp_path)["device-oom"]
    status, reason = found.pop("b3-p4-g1")
    assert status == "oom"
    assert reason.startswith("out of memory in b3-p4-g1 with batch 3: OutOfMemoryError: CUDA out of memory")
    assert {status for status, _ in found.values()} == {"ok"}
    assert len(found) == 4
    lines = [line.split() for line in (tmp_path / "processes").read_text().splitlines()]
    assert [what for what, _ in lines].count("transform") == 1


def test_after_a_lost_device_context_the_next_cells_run_in_a_new_process(nursery, tmp_path, command):
    swept = nursery.sweep(tmp_path, *command("device-lost", "--batch-sizes", "1,3,2"))
    assert swept.wait() == 1, swept.err
    found = stored.statuses(tmp_path)["device-lost"]
    status, reason = found.pop("b3-p4-g1")
    assert status == "failed"
    assert "CUDA error: device-side assert triggered" in reason
    assert {status for status, _ in found.values()} == {"ok"}
    lines = [line.split() for line in (tmp_path / "processes").read_text().splitlines()]
    assert [what for what, _ in lines].count("transform") == 2
    by_cell = dict.fromkeys(pid for what, pid in lines if what != "transform")
    assert len(by_cell) == 3  # the baseline's, the lost one and the new one


# --- what is available, on machines made of files -----------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """Writes files below a /proc and a /sys/fs/cgroup of its own; gives both."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"

    def make(files, cgroup="0::/"):
        for path, text in {
            "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n",
            "proc/self/cgroup": cgroup + "\n",
            **files,
        }.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return proc, cgroups

    return make


def test_a_machine_without_limits_has_what_the_kernel_says(machine):
    assert limits.available_bytes(*machine({})) == 32 * GIB


def test_a_container_has_what_its_cgroup_leaves(machine):
    files = {
        "cgroup/memory.max": f"{8 * GIB}\n",
        "cgroup/memory.current": f"{5 * GIB}\n",
        "cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }
    assert limits.available_bytes(*machine(files)) == 5 * GIB


def test_an_outer_cgroup_limits_too_and_max_is_no_limit(machine):
    files = {
        "cgroup/a/memory.max": f"{4 * GIB}\n",
        "cgroup/a/memory.current": f"{1 * GIB}\n",
        "cgroup/a/b/memory.max": "max\n",
        "cgroup/a/b/memory.current": "0\n",
    }
    assert limits.available_bytes(*machine(files, "0::/a/b")) == 3 * GIB


def test_the_first_version_of_cgroups(machine):
    files = {
        "cgroup/memory/x/memory.limit_in_bytes": f"{2 * GIB}\n",
        "cgroup/memory/x/memory.usage_in_bytes": f"{GIB // 2}\n",
        "cgroup/memory/x/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
    }
    made = machine(files, "5:cpu:/y\n4:memory:/x")
    assert limits.available_bytes(*made) == 3 * GIB // 2
    assert limits.oom_kills(*made) == 4


def test_kills_are_counted_in_the_cgroup_or_else_on_the_machine(machine):
    assert limits.oom_kills(*machine({"proc/vmstat": "pgfault 1\noom_kill 7\n"})) == 7
    assert limits.oom_kills(*machine({"cgroup/memory.events": "oom 3\noom_kill 2\n"})) == 2


def test_workers_share_what_is_available(monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda: 40 * GIB)
    assert limits.default_limit_bytes(4) == 9 * GIB


def test_slots_that_nobody_needs_have_no_share(nursery, tmp_path, command):
    """A thousandth of a machine's memory is not enough for a worker."""
    swept = nursery.sweep(tmp_path, *command("scale", "--jobs", 1000, task=False))
    assert swept.wait() == 0, swept.err
