"""Stage `ppo`: a policy learns from a reward (Ouyang et al. 2022, arXiv:2203.02155, section 3.5 and appendix C.4).

Four models: the actor, which begins as `init_from`, and the critic, which begins as the reward model, are trained; the
reference, which stays what the actor began as, and the reward model are only asked. One step of the stage:

    rollout   the actor answers `global_batch` prompts
    score     reward model and rules judge the answers; actor, reference and critic read them
    update    `inner_epochs` passes over them in `minibatches`: one step of the actor and one of the critic for each

What is drawn depends on the seed, the number of the sample and of the token alone, and minibatches on seed and step, so
a run that is killed in any of these goes on bit for bit from its last checkpoint, and on any number of ranks.

Metrics of a step, over its answers (`val/` the same of held-out prompts, answered with the same draws every time):

    train/reward              score and rules by their coefficients, less the penalty: what is learned from, without KL
    train/score               of the reward model, normalised by `reward.json`, clipped
    train/rule/<name>         of each rule
    train/kl                  sum over a response of log p - log p_ref, nats, mean over responses
    train/kl_coef             the coefficient of the penalty
    train/entropy             of the next token, nats, mean over tokens, where it was sampled
    train/length              tokens of a response, its end token included; train/ended: the share that has one
    train/distinct            share of responses that no other one equals
    train/logp_gap            mean over tokens of |log p of the rollout - log p of the trainer|
    train/loss                what is minimised: `policy_loss`, and `ptx_coef` times `ptx_loss`
    train/grad_norm           of the actor before clipping, mean over the updates; train/value_grad_norm: of the critic
    train/policy_loss         equation 7 of arXiv:1707.06347, negated
    train/value_loss          the clipped square of openai/lm-human-preferences
    train/clipped             share of tokens whose ratio left [1 - clip, 1 + clip]
    train/approx_kl           mean of (log p - log p_old)^2 / 2 during the update
    train/explained_variance  1 - var(returns - values) / var(returns), before the update
    train/ptx_loss            nats per token of pretraining text, where it is mixed in
    perf/rollout_s, score_s, update_s; perf/rollout_tokens_per_s, of responses, over all ranks; perf/mfu counts one pass
                              of training over prompts and responses
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.runtime.job import Job
from orchestrator.errors import DataError, TrainingError
from orchestrator.run import SHORT, write_atomic
from orchestrator.schedule import adam_eps

if TYPE_CHECKING:
    import torch

    from jobs.data.chat import Chat
    from jobs.data.examples import Prompt
    from jobs.data.packed import PackedDataset
    from jobs.data.prompts import Prompts, Rows
    from jobs.engines import Batch, Engine, StepResult
    from jobs.runtime.experience import Experience
    from jobs.runtime.loop import Taken
    from jobs.runtime.pieces import Part
    from jobs.runtime.resume import Position

PER_GPU = True
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say. The defaults are InstructGPT's where they were published."""

    examples: str = "prompts"  # of `data.examples`
    reward: str | None = "reward"  # the stage whose model judges; null: rules alone
    reward_coef: float = 1.0
    clip_reward: float = 5.0  # of the normalised score, to both sides
    min_reward_accuracy: float = 0.6  # of the reward model on held-out pairs; below, nothing starts
    rules: dict[str, float] = field(default_factory=dict)  # `package.module:function` to its coefficient; 0: watched
    no_end_penalty: float = 0.0  # off the reward of a response that does not end
    max_tokens: int = 128  # of a response
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rollout_batch: int = 64  # responses a rank samples at a time
    minibatches: int = 1
    inner_epochs: int = 1
    kl_coef: float = 0.02
    kl_target: float | None = None  # nats per response that kl_coef is steered to (arXiv:1909.08593); null: fixed
    kl_horizon: int = 10_000  # responses
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_lr: float = 9e-6  # at its peak; it moves as `optimizer.lr` does
    ptx_coef: float = 0.0  # of the pretraining loss; InstructGPT's PPO-ptx: 27.8
    ptx_ratio: float = 8.0  # sequences of pretraining text for each response
    ema: float | None = 0.992  # decay of the actor's average, once a step; null: none is kept
    samples: int = 16  # held-out responses that are kept at each evaluation
    max_kl: float = 100.0  # the gates: beyond them `patience` steps on end, the run stops
    min_entropy: float = 0.01
    min_length: float = 2.0
    max_logp_gap: float = 0.1
    patience: int = 5
    hack_patience: int = 2  # evaluations on end at which the reward has risen, and what it stands for fallen


def run(job: Job) -> dict[str, float]:
    """Train the policy."""
    from jobs.data.chat import Chat
    from jobs.data.examples import files_of
    from jobs.data.prompts import Prompts
    from jobs.runtime import loop

    data, o = job.experiment.data, job.options
    chat, longest = Chat.open(data), job.experiment.model.seq_len - o.max_tokens
    train = Prompts(files_of(data, o.examples, "train"), chat, longest=longest, seed=data.seed)
    held_out = Prompts(files_of(data, o.examples, "val"), chat, longest=longest, seed=0)
    log.info("%d prompts", train.samples_per_epoch)
    log.info("left out: %s; of what is held out: %s", dict(train.left_out), dict(held_out.left_out))
    loop.drive(job, PPO(job, chat, train, held_out), train, held_out, final_eval_samples=job.stage.eval_samples)
    return {}


class PPO:
    """What the loop drives."""

    def __init__(self, job: Job, chat: Chat, train: Prompts, held_out: Prompts) -> None:
        from jobs.nn.gpt import GPT
        from jobs.nn.heads import Scorer
        from jobs.runtime import start
        from jobs.runtime.ema import Average
        from jobs.runtime.experience import Collector, short
        from jobs.runtime.gates import Gates

        o, policy, tokenizer = job.options, str(job.stage.init_from), chat.tokenizer_sha256
        self.job, self.stage, self.o, self.chat, self.train, self.held_out = job, job.stage, o, chat, train, held_out
        self.actor = start.build(job, GPT, self._policy_loss)
        self.critic = start.build(job, Scorer, self._value_loss)
        reference = start.frozen(job, GPT, policy, tokenizer)
        self.actor.module.temperature = reference.module.temperature = o.temperature
        self.ask = Collector(job, chat, actor=self.actor, critic=self.critic, reference=reference)
        self.text = pretraining_text(job, tokenizer) if o.ptx_coef else None
        train.fingerprint = self._learned_from(train.fingerprint)
        self.average = Average(self.actor, o.ema) if o.ema is not None else None
        self.parts: Mapping[str, Part] = {"": self.actor, "critic": self.critic}
        if self.average:
            self.parts = {**self.parts, "ema": self.average}
        self.more: dict[str, Any] = {"kl_coef": o.kl_coef}
        watched = [f"rule/{short(name)}" for name, coefficient in o.rules.items() if not coefficient]
        self.gates = Gates(o, self.more, watched, evidence=job.run.folder / "samples")
        self.sums: dict[str, float] = defaultdict(float)  # over this rank's micro-batches of a step
        self.scale = 1

    def _learned_from(self, prompts: str) -> str:
        """Hash of prompts, models, rules and pretraining text: a run goes on with the same alone."""
        from jobs.data import rules

        asked = [str(self.stage.init_from), *([self.o.reward] if self.o.reward else [])]
        parts = {
            "prompts": prompts,
            **{f"model `{stage}`": self.job.record.loaded[stage]["manifest_sha256"] for stage in asked},
            **{f"rule `{name}`": rules.source_sha256(name) for name in self.o.rules},
            "text": self.text.fingerprint if self.text else "",
        }
        log.info("learns from: %s", ", ".join(f"{name} {sha256[:SHORT]}" for name, sha256 in parts.items() if sha256))
        return hashlib.sha256(json.dumps([parts, self.ask.mean, self.ask.std]).encode()).hexdigest()

    def begin(self) -> None:
        """The actor from `init_from`; the critic from the reward model, its values in the unit of the reward."""
        from jobs.runtime.resume import load_weights

        policy, tokenizer = str(self.stage.init_from), self.chat.tokenizer_sha256
        load_weights(self.job, self.actor, policy, tokenizer)
        if self.average:
            self.average.restart()
        load_weights(self.job, self.critic, self.o.reward or policy, tokenizer)
        unit = self.o.reward_coef / self.ask.std if self.o.reward else 0.0
        for piece in self.critic.pieces():
            if piece.slot == "weight" and piece.name.startswith("score."):
                piece.data.detach().sub_(self.ask.mean if piece.name == "score.bias" else 0.0).mul_(unit)
        self.critic.filled()

    def step(self, at: Position, size: int, lr: float) -> Taken | None:
        """Roll out, score, update."""
        from jobs.nn import rl
        from jobs.runtime.loop import Taken

        began = time.perf_counter()
        prompts = self.train.take(at.samples, size)
        answers = self.ask.answers(prompts, at.samples, stoppable=True)
        if answers is None:
            return None
        rolled_out = time.perf_counter()
        e, kl_coef = self.ask.judged(prompts, answers, values=True), self.more["kl_coef"]
        mask_BR = e.rows.mask_BR
        rewards_BR = rl.token_rewards(e.judged["reward"], e.logp_BR, e.reference_BR, mask_BR, kl_coef)
        gain_BR = rl.advantages(rewards_BR, e.values_BR, mask_BR, gamma=self.o.gamma, lam=self.o.lam)
        learned = {
            "old": e.logp_BR,
            "advantages": rl.whiten(gain_BR, mask_BR) * mask_BR,
            "values": e.values_BR,
            "returns": gain_BR + e.values_BR,
        }
        scored = time.perf_counter()
        loss, values = self._update(e.rows, learned, at, lr)
        updated = time.perf_counter()

        facts = e.facts()
        control = rl.KLController(kl_coef, self.o.kl_target, self.o.kl_horizon)
        control.update(facts["kl"], size)
        self.more["kl_coef"] = control.coef
        if self.average:
            self.average.update()
        self.gates.step(facts)
        values |= {f"train/{name}": value for name, value in facts.items()}
        values |= {
            "train/kl_coef": kl_coef,
            "train/explained_variance": rl.explained_variance(e.values_BR, learned["returns"], mask_BR),
            "perf/rollout_s": rolled_out - began,
            "perf/score_s": scored - rolled_out,
            "perf/update_s": updated - scored,
            "perf/rollout_tokens_per_s": mask_BR.sum().item() / (rolled_out - began),
        }
        tokens = int((e.rows.last_B + 1).sum())
        return Taken(loss=loss, grad_norm=values.pop("train/grad_norm"), tokens=tokens, values=values)

    def measure(self, at: Position, samples: int) -> dict[str, float]:
        """The same of held-out prompts; a few of the answers go to `samples/`."""
        from jobs.nn.rollout import HELD_OUT

        prompts = self.held_out.take(0, min(samples, self.held_out.samples_per_epoch))
        answers = self.ask.answers(prompts, HELD_OUT)
        assert answers is not None, "it cannot be stopped"
        e = self.ask.judged(prompts, answers, values=False)
        if self.job.ranks.rank == 0:
            self._keep_samples(at.step, prompts, e)
        self.gates.evaluation(e.judged)
        return {f"val/{name}": value for name, value in e.facts().items()}

    def probe(self) -> float:
        """How well the actor reads a few held-out prompts."""
        from jobs.runtime.loop import evaluate
        from jobs.runtime.resume import PROBE_SAMPLES

        return evaluate(self.job, self.actor, self.held_out, PROBE_SAMPLES)

    def astray(self) -> TrainingError | None:
        """What the gates say on rank 0: on another machine a sum may differ in its last bit."""
        from jobs.runtime import dist

        found: TrainingError | None = dist.broadcast(self.gates.astray())  # type: ignore[assignment]
        return found

    # Update: minibatches of all rows, the same on every number of ranks; each data rank has its micro-batches of them.

    def _update(
        self, rows: Rows, learned: dict[str, torch.Tensor], at: Position, lr: float
    ) -> tuple[float, dict[str, float]]:
        """All passes over the answers; the policy's mean loss on this rank, and metrics."""
        from jobs.data.examples import shuffled
        from jobs.runtime import dist

        o, place, count = self.o, self.job.place, len(rows.ids_BT)
        size, passes = count // o.minibatches, o.inner_epochs * o.minibatches
        value_lr = lr * o.value_lr / self.stage.optimizer.lr
        loss, self.sums = 0.0, defaultdict(float)
        for number in range(passes):
            epoch, k = divmod(number, o.minibatches)
            order = shuffled(count, self.stage.seed, at.step * o.inner_epochs + epoch)
            batches = self._batches(rows, learned, order[k * size : (k + 1) * size].tolist())
            done = at.step * passes + number
            text, eps = self._text(size, done), adam_eps(self.stage.optimizer, done + 1)
            policy = self._train(self.actor, [*batches, *text], lr, eps)
            value = self._train(self.critic, batches, value_lr, eps)
            loss += policy.loss / passes
            self.sums["grad_norm"] += policy.grad_norm / place.data_size
            self.sums["value_grad_norm"] += value.grad_norm / place.data_size
        totals = dist.totals(self.sums)  # tensor ranks say the same
        return loss, {f"train/{name}": total / passes / place.tensor_size for name, total in totals.items()}

    def _train(self, engine: Engine, batches: list[Batch], lr: float, eps: float) -> StepResult:
        self.job.mark("step")
        self.scale = len(batches) * self.job.place.data_size  # the engine takes the mean where parts are to be summed
        return engine.train_step(batches, lr=lr, eps=eps)

    def _batches(self, rows: Rows, learned: dict[str, torch.Tensor], chosen: Sequence[int]) -> list[Batch]:
        """This data rank's micro-batches of the rows ``chosen``; ``part``: the share of their tokens that each has."""
        place, micro = self.job.place, self.stage.parallel.micro_batch
        turns, left = divmod(len(chosen), place.data_size * micro)
        if left:
            raise DataError(
                f"a minibatch of {len(chosen)} responses does not split over {place.data_size} data ranks with "
                f"micro-batches of {micro}",
                hint="`global_batch` is a multiple of `options.minibatches` x data ranks x `parallel.micro_batch`",
            )
        tokens, batches = rows.mask_BR[chosen].sum(), []
        for turn in range(turns):
            first = (turn * place.data_size + place.data) * micro
            numbers = chosen[first : first + micro]
            part = rows.take(numbers)
            batch = {"tokens": part.ids_BT[:, :-1], "targets": part.ids_BT[:, 1:], "at": part.at_BR}
            batch |= {"mask": part.mask_BR, "part": part.mask_BR.sum() / tokens}
            batches.append(batch | {name: value_BR[numbers] for name, value_BR in learned.items()})
        return batches

    def _text(self, responses: int, done: int) -> list[Batch]:
        """Pretraining text to mix into the update that follows ``done`` others."""
        import torch

        if self.text is None:
            return []
        place, micro = self.job.place, self.stage.parallel.micro_batch
        turns, left = divmod(responses * self.o.ptx_ratio, place.data_size * micro)
        if left or not turns:
            raise DataError(
                f"`ptx_ratio` {self.o.ptx_ratio:g} of {responses} responses does not split over {place.data_size} data "
                f"ranks with micro-batches of {micro}",
                hint=f"the next that does is {(turns + 1) * place.data_size * micro / responses:g}",
            )
        turns = int(turns)
        first = (done * turns * place.data_size + place.data) * micro
        part = torch.tensor(1 / (turns * place.data_size))
        return [
            self.text.batch(first + turn * place.data_size * micro, micro) | {"part": part} for turn in range(turns)
        ]

    def _policy_loss(self, nll_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Ouyang et al., equation 2, as far as it is a loss: the rewards and their penalty are in the advantages."""
        from jobs.nn import rl

        b = {name: t.to(nll_BT.device) for name, t in batch.items()}
        if "at" not in b:
            self._note(b["part"], ptx_loss=nll_BT.mean())
            return self.o.ptx_coef * nll_BT.mean() * b["part"] * self.scale
        logp_BR = -nll_BT.gather(1, b["at"])
        got = rl.policy_loss(logp_BR, b["old"], b["advantages"], b["mask"], clip=self.o.clip)
        self._note(b["part"], policy_loss=got.loss, clipped=got.clipped, approx_kl=got.approx_kl)
        return got.loss * b["part"] * self.scale

    def _value_loss(self, values_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        from jobs.nn import rl

        b = {name: t.to(values_BT.device) for name, t in batch.items()}
        values_BR = values_BT.gather(1, b["at"])
        loss = rl.value_loss(values_BR, b["values"], b["returns"], b["mask"], clip=self.o.value_clip)
        self._note(b["part"], value_loss=loss)
        return loss * b["part"] * self.scale

    def _note(self, part: torch.Tensor, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += (value.detach() * part).item()

    def _keep_samples(self, step: int, prompts: Sequence[Prompt], e: Experience) -> None:
        """What the policy says, where people can read it. Where it cannot be written, training goes on."""
        folder = self.job.run.folder / "samples"
        lines = []
        for i in range(min(self.o.samples, len(prompts))):
            judged = {name: round(value_B[i].item(), 4) for name, value_B in e.judged.items()}
            prompt = self.chat.tokenizer.decode(prompts[i].ids, skip_special_tokens=False)
            line = {"step": step, "prompt": prompt, "response": e.texts[i], **judged, "kl": round(e.kl_B[i].item(), 4)}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            folder.mkdir(exist_ok=True)
            write_atomic(folder / f"step-{step:07d}.jsonl", "".join(lines))
        except OSError as error:
            log.warning("the samples of step %d could not be written to `%s`: %s", step, folder, error.strerror)


def pretraining_text(job: Job, tokenizer: str) -> PackedDataset:
    """What `pretrain` learns from, to mix in. Raises DataError where it is not of ``tokenizer``, a SHA-256."""
    from jobs.data.packed import PackedDataset

    model, data = job.experiment.model, job.experiment.data
    text = PackedDataset.open(data, seq_len=model.seq_len, split="train", vocab=model.vocab)
    if text.tokenizer_sha256 != tokenizer:
        raise DataError(
            f"the text in `{data.folder}` is of tokenizer {text.tokenizer_sha256[:SHORT]}, the prompts of "
            f"{tokenizer[:SHORT]}",
            hint="prepare the text with `data.tokenizer`, in another `data.folder`; or `options.ptx_coef: 0`",
        )
    return text
