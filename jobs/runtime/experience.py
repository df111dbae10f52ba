"""What a policy did and what is thought of it: answers, and what models and rules say of them.

Each data rank does its share of the rows; then every rank has them all. So whatever is computed of them, means,
advantages, minibatches, is the same on every rank and on any number of them, and needs no collective.
"""

# B answers, R tokens of one, T tokens of prompt and answer

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.reward import FILE as REWARD_FILE
from jobs.runtime.job import Job
from orchestrator.errors import DataError, TrainingError
from orchestrator.run import read_json

if TYPE_CHECKING:
    import torch

    from jobs.data.chat import Chat
    from jobs.data.examples import Prompt
    from jobs.data.prompts import Rows
    from jobs.engines import Engine
    from jobs.engines.torch import Frozen
    from jobs.nn.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The answers to some prompts and all that is said of them, the same on every rank. B answers, R tokens of one."""

    texts: list[str]
    rows: Rows
    sampled_BR: torch.Tensor  # log-probabilities when the tokens were drawn
    entropy_BR: torch.Tensor
    logp_BR: torch.Tensor  # log-probabilities to the actor as it trains
    reference_BR: torch.Tensor
    values_BR: torch.Tensor  # of the critic; zeros where it was not asked
    judged: dict[str, torch.Tensor]  # (B,) each: `reward`, what it is made of, and `ended`

    @property
    def kl_B(self) -> torch.Tensor:
        """How far each response is from the reference, in nats."""
        return ((self.logp_BR - self.reference_BR) * self.rows.mask_BR).sum(1)

    def facts(self) -> dict[str, float]:
        """The metrics that need nothing else."""
        tokens, mask_BR = self.rows.mask_BR.sum().item(), self.rows.mask_BR
        return {
            **{name: value_B.mean().item() for name, value_B in self.judged.items()},
            "kl": self.kl_B.mean().item(),
            "entropy": (self.entropy_BR * mask_BR).sum().item() / tokens,
            "length": tokens / len(self.texts),
            "distinct": sum(self.texts.count(text) == 1 for text in self.texts) / len(self.texts),
            "logp_gap": ((self.sampled_BR - self.logp_BR).abs() * mask_BR).sum().item() / tokens,
        }


class Collector:
    """The models and rules that are asked, by the options of `ppo`."""

    def __init__(self, job: Job, chat: Chat, *, actor: Engine, critic: Engine, reference: Frozen) -> None:
        from jobs.data import rules
        from jobs.nn.heads import Scorer
        from jobs.runtime import start

        self.job, self.o, self.chat = job, job.options, chat
        self.actor, self.critic, self.reference = actor, critic, reference
        self.rules = {name: rules.load(name) for name in self.o.rules}
        self.mean, self.std, self.reward = 0.0, 1.0, None
        if self.o.reward:
            facts = reward_facts(job, chat)
            self.mean, self.std = facts["mean"], facts["std"] or 1.0
            self.reward = start.frozen(job, Scorer, self.o.reward, chat.tokenizer_sha256)
            loaded = job.record.loaded[self.o.reward]["step"]
            if loaded != facts["step"]:  # a newer one is damaged, and was passed over
                raise DataError(
                    f"the newest whole checkpoint of `{self.o.reward}` is step {loaded}, and `{REWARD_FILE}` speaks "
                    f"of step {facts['step']}: its scale and its accuracy are those of another model",
                    hint=f"restore the checkpoint, or train `{self.o.reward}` again under another `name`",
                )

    def answers(self, prompts: Sequence[Prompt], first: int, *, stoppable: bool = False) -> Rollout | None:
        """Responses to ``prompts``, the samples from number ``first``; None where a rank was told to stop."""
        from jobs.nn.rollout import Rollout, Sampling, generate
        from jobs.runtime import dist

        o, mine = self.o, self._mine(len(prompts), 1)
        how = Sampling(max_tokens=o.max_tokens, top_k=o.top_k, top_p=o.top_p)  # the actor divides by the temperature
        found: list[Rollout] = []
        with self.actor.sampler() as model:
            model.temperature = o.temperature
            for turn in range(0, len(mine), o.rollout_batch):
                self.job.mark("step")
                if stoppable and dist.mean_and_any(0.0, bool(self.job.stop.cause))[1]:
                    return None
                asked = [prompts[i % len(prompts)].ids for i in mine[turn : turn + o.rollout_batch]]
                number = first + mine[turn]
                found.append(generate(model, asked, how, end=self.chat.end, seed=self.job.stage.seed, first=number))
        fields = ("tokens_BT", "mask_BT", "logp_BT", "entropy_BT")
        return Rollout(**{name: self._together([getattr(r, name) for r in found], len(prompts)) for name in fields})

    def judged(self, prompts: Sequence[Prompt], answers: Rollout, *, values: bool) -> Experience:
        """``answers`` with what all models and rules say of them; the critic only where its ``values`` are wanted."""
        import torch

        from jobs.data.prompts import Rows

        responses, width = answers.responses(), int(answers.mask_BT.sum(1).max())
        rows = Rows.of([p.ids for p in prompts], responses, self.chat.end)
        texts = [self.chat.text(r) for r in responses]
        mine, micro = self._mine(len(prompts), self.job.stage.parallel.micro_batch), self.job.stage.parallel.micro_batch
        found: dict[str, list[torch.Tensor]] = defaultdict(list)
        for turn in range(0, len(mine), micro):
            self.job.mark("step")
            numbers = [i % len(prompts) for i in mine[turn : turn + micro]]
            part = rows.take(numbers)
            batch = {"tokens": part.ids_BT[:, :-1], "targets": part.ids_BT[:, 1:]}
            for name, model in (("logp", self.actor), ("reference", self.reference)):
                found[name].append(-part.pick(model.forward(batch)))
            if values:
                found["values"].append(part.pick(self.critic.forward(batch)))
            if self.reward:
                raw_BT = self.reward.forward({"tokens": part.ids_BT}).cpu()
                found["score"].append((raw_BT.gather(1, part.last_B[:, None])[:, 0] - self.mean) / self.std)
            for name, rule in self.rules.items():
                said = [rule(prompts[i].line["prompt"], texts[i], prompts[i].line) for i in numbers]
                found[f"rule/{short(name)}"].append(torch.tensor(said))
        whole = {name: self._together(parts, len(prompts)) for name, parts in found.items()}
        ended_B = torch.tensor([float(r[-1] == self.chat.end) for r in responses])
        return Experience(
            texts=texts,
            rows=rows,
            sampled_BR=answers.logp_BT[:, :width],
            entropy_BR=answers.entropy_BT[:, :width],
            logp_BR=whole.pop("logp"),
            reference_BR=whole.pop("reference"),
            values_BR=whole.pop("values", torch.zeros_like(rows.mask_BR)),
            judged=self._reward(whole, ended_B, texts) | {"ended": ended_B},
        )

    def _reward(self, said: dict[str, torch.Tensor], ended_B: torch.Tensor, texts: Sequence[str]) -> dict[str, Any]:
        """What is learned from, and what it is made of. Raises TrainingError where it is no number."""
        reward_B = self.o.no_end_penalty * (ended_B - 1)
        if "score" in said:
            said["score"] = said["score"].clamp(-self.o.clip_reward, self.o.clip_reward)
            reward_B = reward_B + self.o.reward_coef * said["score"]
        for name, coefficient in self.o.rules.items():
            reward_B = reward_B + coefficient * said[f"rule/{short(name)}"]
        for text, reward in zip(texts, reward_B.tolist(), strict=True):
            if not math.isfinite(reward):
                raise TrainingError(
                    f"the reward of a response is {reward}: {text[:80]!r}",
                    hint="look at the reward model; the last checkpoint is whole, and `orch resume` goes on from it",
                )
        return {"reward": reward_B, **said}

    def _mine(self, count: int, each: int) -> list[int]:
        """The rows of this data rank, in turns of ``each``, as many as any other's; behind ``count`` they repeat."""
        place = self.job.place
        share = -(-count // (place.data_size * each)) * each
        return [*range(place.data * share, (place.data + 1) * share)]

    def _together(self, mine: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """The rows of all data ranks, on every rank, on the CPU."""
        import torch

        from jobs.runtime import dist

        rows = torch.cat([t.cpu() for t in mine]).numpy()
        everyone = dist.gather(rows if self.job.place.tensor == 0 else None)
        return torch.cat([torch.from_numpy(of_rank) for of_rank in everyone if of_rank is not None])[:count]


def reward_facts(job: Job, chat: Chat) -> dict[str, Any]:
    """What stage `reward` says of its model: `mean` and `std` of the scores of good responses, and of which `step`.

    Raises:
        DataError: the model is not there, was trained with another tokenizer or template, or is too often wrong.
    """
    stage, gate = job.options.reward, job.options.min_reward_accuracy
    path = job.run.root / job.run.experiment / stage / REWARD_FILE
    if not path.exists():
        raise DataError(f"no `{path}`", hint=f"run stage `{stage}`, of kind `reward`, to its end first")
    facts: dict[str, Any] = read_json(path)
    if facts["template"] != chat.sha256:
        raise DataError(
            f"the reward model of `{path}` reads another tokenizer or chat template: {facts['template'][:12]} there, "
            f"{chat.sha256[:12]} here",
            hint=f"train stage `{stage}` again with this experiment's `data`",
        )
    if facts["accuracy"] < gate:
        raise DataError(
            f"the reward model of `{path}` is right on {facts['accuracy']:.3f} of held-out pairs, and "
            f"`options.min_reward_accuracy` is {gate}",
            hint="train it longer or on more pairs; a policy would learn its mistakes",
        )
    return facts


def short(rule: str) -> str:
    """`quality` of `jobs.data.functions:quality`."""
    return rule.rpartition(":")[2]
