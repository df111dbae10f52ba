"""Pieces of tensors: shared out so that each element is written once, and read into any other pieces."""

import itertools
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from jobs.nn.cut import Cut
from jobs.runtime import dist, pieces
from jobs.runtime.pieces import Extent, Piece, Store, boxes, share_out
from orchestrator.errors import CheckpointError


@dataclass
class Held:
    """What one rank of an engine holds."""

    held: list = field(default_factory=list)
    fills: int = 0

    def pieces(self):
        return self.held

    def filled(self):
        self.fills += 1


def whole(shape, salt=0):
    """A tensor whose every element is another number."""
    n = int(np.prod(shape))
    return torch.arange(n, dtype=torch.float32).view(shape) + 1000 * salt


def part(name, full, *, cut=None, slices=1, index=0, slot="weight"):
    """Rank ``index`` of ``slices`` of a tensor rank's part of ``full``, as ZeRO cuts a flat tensor."""
    local = cut.take(full) if cut else full
    flat = local.reshape(-1)
    size = -(-flat.numel() // slices)
    start = min(index * size, flat.numel())
    data = flat[start : start + size].clone()
    return Piece(name=name, slot=slot, shape=tuple(local.shape), cut=cut, start=start, data=data)


SHAPES = {"plain": (8, 6), "fused": (12, 6), "rows": (6, 8), "bias": (12,), "small": (3,), "uneven": (7, 4)}
CUTS = {"fused": (0, (6, 4, 2)), "rows": (1, (8,)), "bias": (0, (6, 4, 2)), "uneven": (0, (7,))}
LAYOUTS = [  # tensor ranks x data slices: world is their product
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 4),
    (2, 2),
    (4, 1),
]


def layout(rank, tensor, slices, *, salt=0):
    """All that ``rank`` holds in a layout; with salt, other numbers, to be replaced by a load."""
    held = []
    for i, (name, shape) in enumerate(SHAPES.items()):
        dim, parts = CUTS.get(name, (0, ()))
        cut = Cut(dim=dim, parts=parts, index=rank % tensor, count=tensor) if parts and tensor > 1 else None
        for slot, more in (("weight", 0), ("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
            full = whole(shape, i) + more + 77 * salt
            held.append(part(name, full, cut=cut, slices=slices, index=rank // tensor, slot=slot))
        held.append(Piece(name=name, slot="step", shape=(1,), data=torch.tensor([5.0 + 77 * salt])))
    return Held(held)


def _equal(a, b):
    return all(torch.equal(x.data, y.data) for x, y in zip(a.held, b.held, strict=True))


def _save_all(ranks, root):
    """Each layout of this world size saved; then each that was saved by any world loaded here."""
    mine = [(t, d) for t, d in LAYOUTS if t * d == ranks.world]
    for tensor, slices in mine:
        folder = root / f"{tensor}x{slices}"
        folder.mkdir(exist_ok=True)
        dist.barrier()
        pieces.save(folder, layout(ranks.rank, tensor, slices), ranks)
    dist.barrier()
    return sorted(p.name for p in root.iterdir())


def _load_all(ranks, root):
    loaded = []
    for tensor, slices in [(t, d) for t, d in LAYOUTS if t * d == ranks.world]:
        for folder in sorted(root.iterdir()):
            engine = layout(ranks.rank, tensor, slices, salt=1)
            assert not _equal(engine, layout(ranks.rank, tensor, slices))
            pieces.load(folder, engine)
            assert _equal(engine, layout(ranks.rank, tensor, slices)), (folder.name, tensor, slices)
            assert engine.fills == 1
            loaded.append((folder.name, tensor, slices))
    return loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints, one of each layout."""
    folder = tmp_path_factory.mktemp("saved")
    for world in (1, 2, 4):
        run_ranks(_save_all, world, folder)
    return folder


def test_every_layout_reads_what_any_wrote(saved):
    """Tensors cut along either dim, in several parts, unevenly; flat slices that end in the middle of a row."""
    loaded = [case for world in (1, 2, 4) for case in run_ranks(_load_all, world, saved)[0]]
    assert len(loaded) == len(set(loaded)) == len(LAYOUTS) ** 2


def test_each_element_is_written_once(saved):
    """Whole tensors that four tensor ranks hold, too."""
    for folder in saved.iterdir():
        index = json.loads((folder / pieces.INDEX).read_text())
        for name, entry in index["tensors"].items():
            elements = int(np.prod(SHAPES[name]))
            assert tuple(entry["shape"]) == SHAPES[name]
            for slot, written in entry["pieces"].items():
                assert sum(stop - start for *_, start, stop in written) == (1 if slot == "step" else elements)


def test_replicas_share_the_work():
    """What all hold is shared evenly; a tied tensor, held at both ends of a pipeline in other slices, is whole."""
    big = pieces.GRAIN * 8
    shares = share_out([[Extent("w", "weight", (big,), None, 0, big)] for _ in range(4)])
    assert [[s.stop - s.start for s in mine] for mine in shares] == [[big // 4]] * 4
    small = share_out([[Extent(n, "weight", (8,), None, 0, 8) for n in "abcd"] for _ in range(4)])
    assert sorted(len(mine) for mine in small) == [1, 1, 1, 1]

    first = [Extent("tied", "weight", (100,), None, 0, 60), Extent("tied", "weight", (100,), None, 0, 30)]
    second = [Extent("tied", "weight", (100,), None, 60, 100), Extent("tied", "weight", (100,), None, 30, 100)]
    written = sorted(s[3:] for mine in share_out([[e] for e in first + second]) for s in mine)
    assert written[0][0] == 0
    assert written[-1][1] == 100
    assert all(a[1] == b[0] for a, b in itertools.pairwise(written))


@st.composite
def slices(draw):
    shape = draw(st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 7), st.integers(1, 7))))
    dim = draw(st.integers(0, len(shape) - 1))
    count = draw(st.integers(1, 3))
    parts, left = [], shape[dim]
    while left:
        parts.append(draw(st.integers(1, left)))
        left -= parts[-1]
    index = draw(st.integers(0, count - 1))
    return shape, draw(st.sampled_from([None, Cut(dim=dim, parts=tuple(parts), index=index, count=count)]))


@settings(max_examples=300, deadline=None)
@given(slices(), st.data())
def test_boxes_are_the_elements(case, data):
    """A slice of a flattened local tensor, box by box, is that slice taken with torch."""
    shape, cut = case
    full = whole(shape)
    local = cut.take(full) if cut else full
    flat = local.reshape(-1)
    start = data.draw(st.integers(0, flat.numel()))
    stop = data.draw(st.integers(start, flat.numel()))
    table = full.reshape(shape[0], -1)
    seen = torch.full((stop - start,), -1.0)
    for box in boxes(tuple(local.shape), cut, start, stop):
        for row in range(box.row, box.rows):
            at = box.offset + (row - box.row) * box.stride
            assert (seen[at : at + box.cols - box.col] == -1).all(), "an element in two boxes"
            seen[at : at + box.cols - box.col] = table[row, box.col : box.cols]
    assert torch.equal(seen, flat[start:stop])


def _damaged(ranks, root):
    """What a load says of each way in which a folder can be wrong."""
    pieces.save(root, layout(0, 1, 1), ranks)
    index = json.loads((root / pieces.INDEX).read_text())

    def says(change, engine=None):
        broken = json.loads(json.dumps(index))
        change(broken)
        (root / pieces.INDEX).write_text(json.dumps(broken))
        with pytest.raises(CheckpointError) as error:
            pieces.load(root, engine or layout(0, 1, 1))
        return str(error.value)

    other = Held([part("plain", whole((8, 7)))])
    stranger = Held([part("other", whole((8, 6)))])
    (root / pieces.INDEX).rename(root / "away")
    with pytest.raises(CheckpointError) as lost:
        pieces.load(root, layout(0, 1, 1))
    return {
        "shape": says(lambda i: None, other),
        "name": says(lambda i: None, stranger),
        "slot": says(lambda i: i["tensors"]["plain"]["pieces"].pop("exp_avg")),
        "part": says(lambda i: i["tensors"]["plain"]["pieces"]["weight"][0].__setitem__(3, 30)),
        "twice": says(lambda i: i["tensors"]["plain"]["pieces"]["weight"].append([0, 0, 0, 48])),
        "file": says(lambda i: i["files"].__setitem__(0, "pieces-00009-of-00010.safetensors")),
        "stranger": says(lambda i: i["files"].__setitem__(0, "../pieces-00000-of-00001.safetensors")),
        "format": says(lambda i: i.update(format=99)),
        "index": str(lost.value),
    }


def test_what_is_wrong_is_named(tmp_path):
    said = run_ranks(_damaged, 1, tmp_path)[0]
    assert "`plain` has shape (8, 6) there and (8, 7) here" in said["shape"]
    assert "has no `weight` of `other`" in said["name"]
    assert "has no `exp_avg` of `plain`" in said["slot"]
    assert "`plain@0.0` in `pieces-00000-of-00001.safetensors` cannot be read" in said["part"]
    assert "`weight` of `plain` has a piece from 0 to 48 of 48 behind one to 48, in file 0" in said["twice"]
    assert "`pieces-00009-of-00010.safetensors` cannot be read" in said["file"]
    assert "names `../pieces-00000-of-00001.safetensors`, which is no file of a checkpoint" in said["stranger"]
    assert "is of format 99, this orch reads 1" in said["format"]
    assert "holds no `pieces.json`" in said["index"]


KEYS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 100), st.floats(0, 9), st.sampled_from(["", "x", [], {}, [0]])
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_index_is_refused_or_harmless(saved, tmp_path, data):
    """Whatever one place in the index is changed to: what is read is what was saved, or nothing is."""
    folder = saved / "2x2"
    index = json.loads((folder / pieces.INDEX).read_text())
    at, key = index, data.draw(st.sampled_from(sorted(index)))
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.integers(0, 9)):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    how = data.draw(st.sampled_from(["remove", "twice", "other", "more"]))
    if how == "remove":
        del at[key]
    elif how == "twice" and isinstance(at, list):
        at.append(at[key])
    elif how == "more" and type(at[key]) is int:
        at[key] += data.draw(st.sampled_from([-1, 1]))
    else:
        at[key] = data.draw(KEYS)
    for file in folder.glob("*.safetensors"):
        (tmp_path / file.name).unlink(missing_ok=True)
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / pieces.INDEX).write_text(json.dumps(index))
    engine = layout(0, 1, 1, salt=1)
    try:
        pieces.load(tmp_path, engine)
    except CheckpointError:
        return
    assert _equal(engine, layout(0, 1, 1))


def _twice(ranks, root):
    """What a second save does where nothing has changed, and where another rank holds something else."""
    worked_out = []
    for number in range(3):
        held = layout(0, 1, 1) if number == 2 and ranks.rank == 1 else layout(ranks.rank, 1, 2)
        (root / str(number)).mkdir(exist_ok=True)
        dist.barrier()
        pieces.save(root / str(number), held, ranks)
        worked_out.append(pieces._shared_out.cache_info().misses)
        dist.barrier()
        engine = layout(0, 1, 1, salt=1)
        pieces.load(root / str(number), engine)
        assert _equal(engine, layout(0, 1, 1))
    return worked_out


def test_shares_are_worked_out_once(tmp_path):
    assert run_ranks(_twice, 2, tmp_path) == [[1, 1, 2]] * 2


def _breaks(ranks, root):
    engine = layout(ranks.rank, 1, 2)
    with pytest.raises(dist.RanksFailed) as cannot:
        pieces.save(root / "nothing" / "below" if ranks.rank else root, engine, ranks)
    dist.barrier()
    if ranks.rank == 1:
        engine.pieces = lambda: 1 / 0
    with pytest.raises((ZeroDivisionError, dist.PeerBug)) as bug:
        pieces.save(root, engine, ranks)
    dist.barrier()
    return str(cannot.value), str(bug.value)


def test_a_rank_that_fails_keeps_none_waiting(tmp_path):
    cannot, bug = run_ranks(_breaks, 2, tmp_path)[0]
    assert cannot.startswith("rank 1: FileNotFoundError")
    assert bug == "rank 1: ZeroDivisionError: division by zero"


def test_a_login_node_can_read_it(saved):
    """Without torch: the index and safetensors' numpy."""
    with Store(saved / "2x2") as store:
        into = np.zeros(72, np.float32)
        store.read(Extent("fused", "exp_avg", (12, 6), None, 0, 72), into)
    assert np.array_equal(into.reshape(12, 6), (whole((12, 6), 1) + 0.25).numpy())
