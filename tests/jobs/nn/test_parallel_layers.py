"""Layers over tensor ranks, held against the whole model in one process. Whole trainings: engines/test_parallel.py."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from jobs.nn import parallel
from jobs.nn.cut import Cut
from jobs.nn.gpt import GPT, Dropout, init_weights
from jobs.nn.losses import linear_cross_entropy
from jobs.runtime import dist
from orchestrator.errors import ConfigError, DataError
from orchestrator.spec import ModelSpec, ParallelPlan

GPT3 = ModelSpec(layers=2, hidden=32, heads=4, vocab=97, seq_len=16, attention="alternating", window=4)
LLAMA = replace(
    GPT3, kv_heads=2, activation="swiglu", ffn_hidden=42, norm="rmsnorm", position="rope", bias=False,
    tie_embeddings=False, init_std=0.2,
)  # fmt: skip
POST = replace(GPT3, norm_position="post", position="none", init_std=0.2)
MODELS = {"gpt3": GPT3, "llama": LLAMA, "post": POST}


def test_every_row_of_every_part_belongs_to_one_rank():
    """GPT-3's vocabulary over 8 ranks; grouped queries over 2; sizes that no number divides."""
    for parts, count in (((50257,), 8), ((12288, 1536, 1536), 2), ((7, 5, 3), 4)):
        whole = torch.arange(3 * sum(parts)).view(3, -1)
        cuts = [Cut(dim=1, parts=parts, index=i, count=count) for i in range(count)]
        slices = [cut.take(whole) for cut in cuts]
        assert [t.shape[1] for t in slices] == [cut.width() for cut in cuts]
        assert max(cut.width() for cut in cuts) - min(cut.width() for cut in cuts) <= len(parts)
        assert torch.equal(cuts[0].join(slices), whole)
    first = Cut(dim=0, parts=(4, 2, 2), index=0, count=2)
    assert first.take(torch.tensor([0, 1, 2, 3, 10, 11, 20, 21])).tolist() == [0, 1, 10, 20]  # its share of q, k, v


def group_of(ranks, *, sequence=False):
    return dist.tensor_group(ranks, ParallelPlan(tensor=ranks.world, sequence=sequence))


def tokens_of(spec, count=3):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, spec.vocab, (count, spec.seq_len + 1), generator=generator)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def gradients(module, nll):
    nll.sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def largest(a, b):
    return (a - b).abs().max().item()


def models(ranks, specs):
    """Largest difference in nll, logits and gradients of each model from the whole one."""
    seen = {}
    for sequence in (False, True):
        tensor = group_of(ranks, sequence=sequence)
        for key, spec in specs.items():
            tokens, targets = tokens_of(spec)
            whole, mine = init_weights(GPT(spec), 0), init_weights(GPT(spec, tensor=tensor), 0)
            wanted, nll = whole(tokens, targets), mine(tokens, targets)
            logits = largest(mine(tokens), whole(tokens))
            grads, own = gradients(whole, wanted), gradients(mine, nll)
            cut = {name: getattr(p, "cut", None) for name, p in mine.named_parameters()}
            off = max(largest(g, cut[name].take(grads[name]) if cut[name] else grads[name]) for name, g in own.items())
            copy = parallel.whole_copy(mine, lambda spec=spec: GPT(spec), tensor)
            same = all(torch.equal(a, b) for a, b in zip(copy.parameters(), whole.parameters(), strict=True))
            share = sum(p.numel() for p in mine.parameters()) / spec.params
            seen[key, sequence] = largest(nll, wanted), logits, off, same, share
    return seen


def test_the_model_over_ranks_is_the_model():
    for world in (2, 4):
        specs = {key: spec for key, spec in MODELS.items() if (spec.kv_heads or spec.heads) % world == 0}
        for results in run_ranks(models, world, specs):
            for nll, logits, gradient, same, share in results.values():
                assert max(nll, logits) < 5e-6
                assert gradient < 5e-5
                assert same
                assert 1 / world < share < 1 / world + 0.1


def cross_entropy(ranks):
    """Differences of loss and gradients from F.cross_entropy, by how it is computed."""
    tensor = group_of(ranks)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((6, 5, 16), (97, 16)))
    targets = torch.randint(0, 97, (6, 5), generator=generator)
    factor = torch.randn(6, 5, generator=generator)  # PPO weights tokens
    cut = Cut(dim=0, parts=(97,), index=tensor.rank, count=tensor.size)
    seen = {}
    for key, dtype, options in (
        ("at once", torch.float32, {}),
        ("in chunks", torch.float32, {"logits_bytes": 4 * 48 * 7}),  # 7 tokens of 48 rows, 6 of 49
        ("padded", torch.float32, {"pad_to": 64}),
        ("double", torch.float64, {}),
        ("bf16", torch.bfloat16, {"pad_to": 64, "logits_bytes": 2 * 64 * 7}),
    ):
        x, w, y = (t.to(dtype).detach().clone().requires_grad_() for t in (hidden, weight, hidden))
        wanted = F.cross_entropy((x.double() @ w.double().t()).flatten(0, 1), targets.flatten(), reduction="none")
        (wanted * factor.flatten()).sum().backward()
        own = cut.take(w.detach()).requires_grad_()
        nll = linear_cross_entropy(parallel.enter(y, tensor), own, targets, group=tensor.group, cut=cut, **options)
        (nll * factor).sum().backward()
        seen[key] = (
            largest(nll.flatten(), wanted),
            largest(y.grad.float(), x.grad.float()),
            largest(own.grad.float(), cut.take(w.grad).float()),
            str(nll.dtype),
        )
    return seen


def test_cross_entropy_over_a_cut_vocabulary():
    """97 tokens over 2 and 3 ranks, and targets on every one of them."""
    tolerance = {"bf16": 0.1, "double": 1e-6}  # bf16 rounds logits of 10 to 0.03
    for world in (2, 3):
        for results in run_ranks(cross_entropy, world):
            for key, (*differences, dtype) in results.items():
                assert max(differences) < tolerance.get(key, 2e-5), (key, differences)
                assert dtype == ("torch.float64" if key == "double" else "torch.float32")


def randomness(ranks):
    """What ranks draw alike and what apart; what a layer drops, and whether recompute drops it again."""
    torch.manual_seed(5)  # as dist.seed: tensor peers begin alike
    tensor = group_of(ranks)
    common, before = torch.rand(4).tolist(), torch.rand(4).tolist()
    torch.manual_seed(5)
    torch.rand(4)
    with parallel.apart(tensor, torch.device("cpu")):
        own = torch.rand(4).tolist()
    after = torch.rand(4).tolist()
    ones = torch.ones(1, 64, 512)
    alike = Dropout(0.25, tensor)(ones)
    apart = Dropout(0.25, replace(tensor, sequence=True))(ones)
    spec = replace(GPT3, dropout=0.2)
    results = []
    for recompute in ("none", "selective", "full"):
        torch.manual_seed(7)
        module = init_weights(GPT(spec, recompute=recompute, tensor=group_of(ranks, sequence=True)), 0)
        nll = module(*tokens_of(spec))
        results.append((nll.detach(), gradients(module, nll)))
    replay = all(
        torch.equal(nll, results[0][0]) and all(torch.equal(g, results[0][1][name]) for name, g in grads.items())
        for nll, grads in results
    )
    kept = [(x != 0).float().mean().item() for x in (alike, apart)]
    return (
        common,
        before,
        own,
        after,
        (alike != 0).int().sum(-1).tolist(),
        (apart != 0).int().sum(-1).tolist(),
        kept,
        replay,
    )


def test_dropout_is_common_where_activations_are_and_apart_where_they_are_cut():
    results = run_ranks(randomness, 2)
    (common, before, own, after, alike, apart, kept, replay), other = results
    assert (common, before) == (other[0], other[1])
    assert own != other[2] and own not in (before, after)
    assert after == other[3]  # what is drawn apart leaves the common stream in step
    assert alike == other[4] and apart != other[5]
    for share in (*kept, *other[6]):
        assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 64 / 512) ** 0.5)
    assert replay and other[7]


def refusals(ranks):
    tensor = group_of(ranks, sequence=True)
    with pytest.raises(DataError, match="15 tokens do not split over 2 tensor ranks"):
        init_weights(GPT(GPT3, tensor=tensor), 0)(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ConfigError, match="1 heads of keys and values do not split over 2"):
        GPT(replace(GPT3, kv_heads=1), tensor=tensor)
    return True


def test_what_does_not_split_is_refused():
    assert all(run_ranks(refusals, 2))
