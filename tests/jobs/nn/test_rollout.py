"""Packing, caching, padding and sampling: each must change nothing but the speed, or be what was asked for."""

import pytest
import torch
from test_gpt import ALL, model_of, theirs, weights_from

from jobs.nn.gpt import Cache, init_weights, places
from jobs.nn.heads import Scorer
from jobs.nn.rollout import Sampling, choose, generate, uniform
from orchestrator.errors import DataError

END = 0


def lively(spec, seed=0):
    """A model whose attention and positions count: the usual start is nearly uniform."""
    model = model_of(spec, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(8)
            elif "norm" not in name:
                p.normal_(0, 0.3)
    return model.eval()


def texts(spec, *lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, spec.vocab, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("kind", ALL)
def test_texts_packed_into_a_row_do_not_see_each_other(kind):
    model = lively(ALL[kind])
    parts = texts(ALL[kind], 5, 7, 3)
    row = torch.tensor([[token for part in parts for token in part]])
    segments = torch.tensor([[i for i, part in enumerate(parts) for _ in part]])
    packed = model(row, segments_BS=segments)[0].split([5, 7, 3])
    for part, logits in zip(parts, packed, strict=True):
        assert torch.allclose(logits, model(torch.tensor([part]))[0], atol=2e-5)
    scorer = init_weights(Scorer(ALL[kind]), 0).eval()
    scorer.load_state_dict(
        model.state_dict() | {n: p for n, p in scorer.state_dict().items() if "score" in n}, strict=False
    )
    apart = [scorer(torch.tensor([part]))[0] for part in parts]
    assert torch.allclose(scorer(row, segments)[0], torch.cat(apart), atol=2e-5)


def test_places_count_from_the_first_token_of_a_segment():
    assert places(torch.tensor([[0, 0, 1, 1, 1, 5], [0, 1, 1, 1, 1, 1]])).tolist() == [
        [0, 1, 0, 1, 2, 0],
        [0, 0, 1, 2, 3, 4],
    ]


@pytest.mark.parametrize("kind", ALL)
def test_the_cache_changes_nothing(kind):
    """Fed one, three, then the other tokens at a time."""
    spec = ALL[kind]
    model = lively(spec)
    tokens = torch.tensor(texts(spec, 14, 14))
    caches = [Cache(14) for _ in model.blocks]
    with torch.no_grad():
        fed = [model(part, cache=caches) for part in tokens.split([1, 3, 10], 1)]
        assert torch.allclose(torch.cat(fed, 1), model(tokens), atol=2e-5)


@pytest.mark.parametrize("kind", ALL)
def test_greedy_responses_equal_transformers(kind):
    spec = ALL[kind]
    hf = theirs(kind, spec)
    model = model_of(spec)
    model.load_state_dict(weights_from(kind, spec, hf))
    prompt = torch.tensor(texts(spec, 6))
    ours = generate(model, prompt.tolist(), Sampling(max_tokens=10, temperature=0), end=END, seed=0).responses()
    expected = hf.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=END,
        pad_token_id=END,
    )
    assert ours == [expected[0, 6:].tolist()]


@pytest.mark.parametrize("kind", ALL)
def test_padding_company_and_early_ends_change_no_response(kind):
    """Each of eight prompts of several lengths alone, or all together; half of the rows leave the batch on the way."""
    spec = ALL[kind]
    model = lively(spec)
    prompts = texts(spec, 1, 4, 2, 6, 5, 3, 2, 4)
    sampling = Sampling(max_tokens=9)
    end = generate(model, prompts, sampling, end=END, seed=3).tokens_BT[:4, 1].mode().values.item()  # one that is met
    together = generate(model, prompts, sampling, end=end, seed=3)
    lengths = [len(r) for r in together.responses()]
    assert min(lengths) < 9
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], sampling, end=end, seed=3, first=i)
        assert alone.responses()[0] == together.responses()[i]
        assert torch.allclose(alone.logp_BT[0], together.logp_BT[i], atol=1e-4)
        assert torch.allclose(alone.entropy_BT[0], together.entropy_BT[i], atol=1e-4)


def test_the_trainer_sees_the_log_probabilities_of_the_rollout():
    model = lively(ALL["gpt2"])
    prompts = texts(ALL["gpt2"], 3, 3)
    rollout = generate(model, prompts, Sampling(max_tokens=6, temperature=0.7, top_k=5), end=END, seed=1)
    model.temperature = 0.7
    whole = torch.cat([torch.tensor(prompts), rollout.tokens_BT], 1)
    nll = model(whole[:, :-1], whole[:, 1:])[:, 2:]
    assert torch.allclose(-nll * rollout.mask_BT, rollout.logp_BT, atol=1e-5)


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    draws = torch.from_numpy(uniform(0, 0, 1, 20_000))[0]
    many = logits.expand(len(draws), -1)
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.7)):
        p = (logits[0].double() / sampling.temperature).softmax(0)
        order = p.argsort(descending=True)
        allowed = order[: sampling.top_k or None]
        allowed = allowed[: int((p[order].cumsum(0) < sampling.top_p).sum()) + 1]
        expected = torch.zeros_like(p).index_copy(0, allowed, p[allowed] / p[allowed].sum())
        tokens, logp, _ = choose(many, sampling, draws)
        found = torch.bincount(tokens, minlength=5) / len(draws)
        assert (found - expected).abs().max() < 4 * 0.5 / len(draws) ** 0.5
        assert torch.allclose(logp.double(), p.log()[tokens], atol=1e-6)


def test_no_two_samples_share_their_draws():
    together = uniform(5, 10, 6, 8)
    assert (together[2:4] == uniform(5, 12, 2, 8)).all()
    assert (together[:, :3] == uniform(5, 10, 6, 3)).all()
    assert len(set(together.flatten().tolist())) == 48
    assert not (together == uniform(6, 10, 6, 8)).any()


def test_a_response_that_has_no_room_is_refused():
    model = model_of(ALL["gpt2"])
    longest = ALL["gpt2"].seq_len
    generate(model, texts(ALL["gpt2"], longest - 3), Sampling(max_tokens=4), end=END, seed=0)
    with pytest.raises(DataError, match=f"a prompt of {longest - 3} tokens and a response of up to 5 do not fit"):
        generate(model, texts(ALL["gpt2"], longest - 3), Sampling(max_tokens=5), end=END, seed=0)
