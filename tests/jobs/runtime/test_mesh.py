"""Coordinates of ranks."""

from dataclasses import replace

import pytest

from jobs.runtime.mesh import peers, place
from orchestrator.errors import TrainingError
from orchestrator.spec import ParallelPlan


def test_every_rank_has_a_place_of_its_own_and_tensor_peers_are_neighbours():
    """The order of Megatron's 175B on 1,024 GPUs: tensor 8 inside a node, pipeline 16, data 8."""
    plan = ParallelPlan(tensor=8, pipeline=16)
    places = [place(rank, 1024, plan) for rank in range(1024)]
    assert len({(p.data, p.pipeline, p.tensor) for p in places}) == 1024
    assert {(p.data_size, p.pipeline_size, p.tensor_size) for p in places} == {(8, 16, 8)}
    assert all(
        {(p.data, p.pipeline) for p in places[n : n + 8]} == {(places[n].data, places[n].pipeline)}
        for n in range(0, 1024, 8)
    )
    assert [p.tensor for p in places[:9]] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert (places[8].data, places[8].pipeline) == (1, 0)
    assert (places[64].data, places[64].pipeline) == (0, 1)


def test_ranks_that_share_rows_are_neighbours_and_read_the_same_samples():
    plan = ParallelPlan(ulysses=4)
    places = [place(rank, 8, plan) for rank in range(8)]
    assert [p.ulysses for p in places] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [p.data for p in places] == [0] * 4 + [1] * 4
    assert {(p.data_size, p.ulysses_size) for p in places} == {(2, 4)}
    assert peers(8, plan, "ulysses") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(set(map(repr, (place(rank, 16, replace(plan, tensor=2, pipeline=2)) for rank in range(16))))) == 16


def test_a_world_that_does_not_split_is_refused():
    with pytest.raises(TrainingError, match="6 ranks do not split into tensor 2 x pipeline 2 = 4"):
        place(0, 6, ParallelPlan(tensor=2, pipeline=2))


def test_peers_along_each_axis_are_deepspeeds(monkeypatch):
    """The groups of DeepSpeed's own topology, which cuts layers and gradients by them."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    plan = ParallelPlan(tensor=2, pipeline=3)
    theirs = PipeModelDataParallelTopology(num_pp=3, num_mp=2, num_dp=4)
    for ours, axis in (("tensor", "model"), ("data", "data"), ("pipeline", "pipe")):
        assert sorted(peers(24, plan, ours)) == sorted(theirs.get_axis_comm_lists(axis))
    assert peers(24, plan, "tensor", "pipeline")[0] == [0, 1, 8, 9, 16, 17]
    assert peers(24, plan, "tensor", "data", "pipeline") == [list(range(24))]
