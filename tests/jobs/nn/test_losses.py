"""linear_cross_entropy against F.cross_entropy and finite differences, and what it keeps in memory."""

import pytest
import torch
import torch.nn.functional as F

from jobs.nn import losses
from jobs.nn.losses import linear_cross_entropy, masked_mean

N, H, V = 37, 24, 211
SMALL = 8 * V * 8  # bytes: 8 rows of fp64 logits, so 37 tokens take five chunks


def tensors(dtype=torch.float64, n=N, h=H, v=V):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g, dtype=torch.float64) * 0.5).to(dtype).requires_grad_()
    upstream = torch.randn(n, generator=g, dtype=torch.float64)  # of either sign, as PPO's advantages
    return hidden, weight, torch.randint(v, (n,), generator=g), upstream


def grads(nll, upstream, *inputs):
    return torch.autograd.grad((nll * upstream.to(nll.dtype)).sum(), inputs)


@pytest.mark.parametrize("logits_bytes", [losses.LOGITS_BYTES, SMALL], ids=["kept", "chunked"])
@pytest.mark.parametrize("pad_to", [1, 64])
@pytest.mark.parametrize("cache_bytes", [losses.CACHE_BYTES, 4 * V * 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_cross_entropy(monkeypatch, logits_bytes, pad_to, cache_bytes, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    monkeypatch.setattr(losses, "CACHE_BYTES", cache_bytes)
    hidden, weight, targets, upstream = tensors(dtype)
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    got = linear_cross_entropy(hidden, weight, targets, logits_bytes=logits_bytes, pad_to=pad_to)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads(got, upstream, hidden, weight), grads(expected, upstream, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    hidden, weight, targets, _ = tensors(n=5, h=3, v=7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, logits_bytes=8 * 7 * 2), (hidden, weight)
    )


@pytest.mark.parametrize("logits_bytes", [losses.LOGITS_BYTES, SMALL], ids=["kept", "chunked"])
def test_bf16_autocast_is_as_near_to_fp64_as_plain_pytorch(logits_bytes):
    hidden, weight, targets, upstream = tensors(torch.float32)
    with torch.no_grad():
        weight[targets[0]] = 2 * hidden[0]  # one token the model is sure of: p - 1 cancels in bf16
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = F.cross_entropy(F.linear(*exact_inputs), targets, reduction="none")
    truth = [exact, *grads(exact, upstream, *exact_inputs)]

    def worst(function):
        with torch.autocast("cpu", torch.bfloat16):
            nll = function()
        assert nll.dtype == torch.float32
        values = [nll, *grads(nll, upstream, hidden, weight)]
        assert all(v.dtype == torch.float32 for v in values)
        return [(v - t).abs().max().item() for v, t in zip(values, truth, strict=True)]

    ours = worst(lambda: linear_cross_entropy(hidden, weight, targets, logits_bytes=logits_bytes))
    plain = worst(lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none"))
    assert all(a < 1.5 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)


def test_without_gradients_and_without_tokens():
    hidden, weight, targets, _ = tensors()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    none = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert none.shape == (0,)
    none.sum().backward()
    assert float(weight.grad.abs().sum()) == 0


def test_a_second_backward_is_refused_not_wrong():
    hidden, weight, targets, _ = tensors()
    total = linear_cross_entropy(hidden, weight, targets).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


def peak_bytes(step):
    """Largest sum of live CPU allocations during ``step``, from the profiler's record of each."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_peak_memory():
    n, h, v = 512, 16, 4096
    hidden, weight, targets, _ = tensors(torch.float32, n, h, v)
    logits = 4 * n * v
    plain = peak_bytes(lambda: F.cross_entropy(F.linear(hidden, weight), targets).backward())
    kept = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets).mean().backward())
    chunked = peak_bytes(
        lambda: linear_cross_entropy(hidden, weight, targets, logits_bytes=logits // 8).mean().backward()
    )
    assert plain > 1.9 * logits  # log-probabilities and their gradient at once
    assert kept < 1.3 * logits
    assert chunked < 0.4 * logits


@pytest.mark.parametrize("logits_bytes", [losses.LOGITS_BYTES, SMALL], ids=["kept", "chunked"])
def test_under_torch_compile(logits_bytes):
    hidden, weight, targets, upstream = tensors(torch.float32)

    def mean(h, w):
        return linear_cross_entropy(h * 1.0, w, targets, logits_bytes=logits_bytes)

    compiled = torch.compile(mean, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), mean(hidden, weight))
    for a, b in zip(
        grads(compiled(hidden, weight), upstream, hidden, weight),
        grads(mean(hidden, weight), upstream, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_masked_mean():
    nll = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    assert masked_mean(nll, torch.tensor([[True, False], [True, False]])) == 2.5
    assert masked_mean(nll, torch.tensor([[0.0, 3.0], [1.0, 0.0]])) == (3 * 2 + 4) / 4
    assert masked_mean(nll, torch.zeros(2, 2)) == 0
