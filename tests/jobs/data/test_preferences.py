"""Ranked responses as batches."""

import json

import pytest
import torch

from jobs.data import bpe
from jobs.data.chat import Chat
from jobs.data.examples import Files
from jobs.data.preferences import Preferences
from jobs.reward import loss
from jobs.runtime.pairs import Pair, by_kind, calibration, measured
from orchestrator.errors import DataError
from orchestrator.spec import ChatSpec, DataSpec

RESPONSES = [["aa", "b"], ["c", "dd", "eee", "f"], ["gg", "h", "i"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    bpe.train(["abcdefghi " * 20], vocab=300, end_of_text="<|end|>").save(str(folder / "tokenizer.json"))
    lines = [json.dumps({"prompt": f"{k}?", "responses": r}) + "\n" for k, r in enumerate(RESPONSES)]
    (folder / "p.jsonl").write_text("".join(lines))
    chat = Chat.open(DataSpec(tokenizer=str(folder / "tokenizer.json"), chat=ChatSpec(end="<|end|>")))
    return Preferences(Files(names=[str(folder / "p.jsonl")]), chat, seq_len=32, seed=3, responses=4), chat


def test_every_pair_of_a_prompt_is_in_its_batch_and_prompts_weigh_alike(data):
    preferences, chat = data
    batch = preferences.batch(0, 3)
    texts = []
    for tokens, targets, learn, last in zip(*(batch[k] for k in ("tokens", "targets", "learn", "last")), strict=True):
        assert targets[last - 1] == chat.end  # the score is read at the end token, the last input
        texts.append(chat.text(targets[learn > 0].tolist()))
        assert learn[last:].sum() == 0
        assert chat.text(tokens[1 : last + 1][learn[:last] > 0].tolist()) == texts[-1]
    ranks = {text: k for responses in RESPONSES for k, text in enumerate(responses)}
    pairs = [(texts[better], texts[worse]) for better, worse in batch["pairs"].tolist()]
    assert len(set(pairs)) == 1 + 6 + 3
    assert all(ranks[better] < ranks[worse] for better, worse in pairs)
    weights = {}
    for (better, _), weight in zip(pairs, batch["pair_weight"].tolist(), strict=True):
        prompt = next(k for k, r in enumerate(RESPONSES) if better in r)
        weights[prompt] = weights.get(prompt, 0) + weight
    assert weights == pytest.approx({0: 1, 1: 1, 2: 1})


def test_more_responses_than_the_plan_made_room_for_are_refused(data, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "?", "responses": RESPONSES[1]}) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl has 4 responses, and `options\.responses` is 3") as caught:
        Preferences(Files(names=[str(tmp_path / "p.jsonl")]), data[1], seq_len=32, seed=3, responses=3)
    assert "`options.responses=4`" in caught.value.hint


def test_an_epoch_has_every_prompt_once_and_the_next_in_another_order(data):
    preferences, _ = data
    epochs = [[preferences.batch(3 * e + i, 1)["response"][0].item() for i in range(3)] for e in range(6)]
    assert {tuple(sorted(e)) for e in epochs} == {(0, 2, 6)}
    assert len({tuple(e) for e in epochs}) > 1


def test_the_loss_is_the_papers(data):
    """Ouyang et al., equation 1, pair by pair in double precision."""
    batch = data[0].batch(0, 3)
    scores = torch.randn(batch["tokens"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for (better, worse), weight in zip(batch["pairs"].tolist(), batch["pair_weight"].tolist(), strict=True):
        difference = scores[better, batch["last"][better]] - scores[worse, batch["last"][worse]]
        expected -= weight * torch.log(1 / (1 + torch.exp(-difference))).item() / 3
    assert loss(scores, batch).item() == pytest.approx(expected)


def test_accuracy_and_calibration_of_known_pairs():
    """Differences of log 3 claim 3/4: with three of four right nothing is wrong, with two of four 1/4."""
    log3 = 1.0986122886681098
    pairs = [Pair(log3, 0.5, "a")] * 3 + [Pair(-log3, 0.5, "b")]
    values = measured(pairs)
    assert values["val/accuracy"] == 0.75
    assert values["val/calibration_error"] == pytest.approx(0)
    assert values["val/loss"] == pytest.approx((3 * 0.2876820724517809 + 1.3862943611198906) / 4)
    assert calibration(pairs) == [{"claimed": pytest.approx(0.75), "right": 0.75, "pairs": 4}]
    assert by_kind(pairs) == {"a": {"accuracy": 1, "pairs": 3}, "b": {"accuracy": 0, "pairs": 1}}
    assert by_kind([Pair(log3, 1)]) == {}
    assert measured([Pair(log3, 1), Pair(-log3, 1)])["val/calibration_error"] == pytest.approx(0.25)
    with pytest.raises(DataError, match="no held-out pairs"):
        measured([])
