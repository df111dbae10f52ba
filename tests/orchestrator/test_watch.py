"""Who froze, on a clock of the test's own."""

from dataclasses import replace

import pytest

from orchestrator.watch import Patience, Sign, Watch

PATIENCE = Patience(steps=10, step_s=60, start_s=600, save_s=300, silent_s=45, beat_s=10)


class World:
    """Four ranks on two nodes, and a clock."""

    def __init__(self, patience=PATIENCE):
        self.now = 1000.0
        self.signs = {r: Sign(rank=r, node=f"node{r // 2}", phase="start", step=0, marks=1, beats=1) for r in range(4)}
        self.watch = Watch(4, patience, now=self.now)
        self.frozen = frozenset()

    def pass_(self, seconds, *, progress=(), **changes):
        """Let time pass, ten seconds at a time; return the first word that something froze, and when."""
        began = self.now
        while self.now < began + seconds:
            self.now += 10
            for rank, sign in self.signs.items():
                if rank not in self.frozen:
                    more = {"beats": sign.beats + 1, "marks": sign.marks + (rank in progress)}
                    self.signs[rank] = replace(sign, **more, **changes)
            if found := self.watch.see(list(self.signs.values()), now=self.now):
                return self.now - began, found
        return None

    def train(self, seconds, **changes):
        return self.pass_(seconds, progress=range(4), phase="step", step_s=5.0, **changes)


def test_progress_is_never_frozen():
    world = World()
    assert world.pass_(590) is None, "loading"
    assert world.train(5000, step=900) is None


def test_a_silent_rank_is_named():
    world = World()
    world.train(100, step=20)
    world.frozen = {2}
    after, found = world.pass_(1000)
    assert 45 < after <= 60 and (found.ranks, found.nodes) == ((2,), ("node1",))
    assert "after step 20" in found.why and "rank 2 on node1" in found.why


@pytest.mark.parametrize(("phase", "silent_s"), [("start", 600 / 3), ("save", 300 / 3)])
def test_a_rank_that_loads_or_saves_may_be_silent_for_longer(phase, silent_s):
    """The file system its signs go to is at its slowest then."""
    world = World()
    world.pass_(10, progress=range(4), phase=phase, step_s=5.0)
    world.frozen = {2}
    after, found = world.pass_(1000)
    assert silent_s < after <= silent_s + 10 and found.ranks == (2,)


def test_a_silent_rank_while_steps_go_on_is_let_be():
    """Its thread does not get its turn, but it takes part in every step."""
    world = World()
    world.train(100)
    world.frozen = {2}
    assert world.pass_(1000, progress=(0, 1, 3)) is None


def test_the_limit_follows_the_pace():
    world = World()
    world.pass_(100, progress=range(4), phase="step", step_s=40.0)
    after, found = world.pass_(1000)
    assert 400 < after <= 410 and found.ranks == (), "all live, and nobody is behind"


def test_the_rank_the_others_wait_for_is_named():
    """All live, but the last of node 0 reads its data for ever."""
    world = World()
    world.train(100)
    world.pass_(10, progress=(0, 2, 3))
    after, found = world.pass_(1000)
    assert 60 < after <= 70 and (found.ranks, found.nodes) == ((1,), ("node0",))


@pytest.mark.parametrize(("phase", "limit_s"), [("start", 600), ("save", 300), ("evaluate", 60)])
def test_limits_of_phases(phase, limit_s):
    world = World()
    if phase != "start":
        world.train(100)
    world.pass_(10, progress=range(4), phase=phase)
    after, _ = world.pass_(2000)
    assert limit_s < after <= limit_s + 10


def test_the_first_step_has_the_time_of_a_start():
    """It compiles, and nothing says yet how long a step takes."""
    world = World()
    world.pass_(10, progress=range(4), phase="step")
    assert world.pass_(590) is None


def test_a_disk_that_hangs_is_nobodys_fault():
    """Nobody gives a sign: only the limit on progress counts, and nobody is named."""
    world = World()
    world.train(100)
    world.frozen = {0, 1, 2, 3}
    after, found = world.pass_(1000)
    assert 60 < after <= 70 and found.ranks == ()


def test_ranks_that_never_come():
    watch = Watch(4, PATIENCE, now=0.0)
    assert watch.see([], now=600.0) is None
    assert watch.see([], now=601.0).ranks == ()
    world = World()
    del world.signs[3]
    after, found = world.pass_(2000)
    assert 600 < after <= 610 and found.ranks == (3,)


def test_a_stage_without_steps_may_take_its_time():
    world = World()
    assert world.pass_(100_000, phase="work") is None
