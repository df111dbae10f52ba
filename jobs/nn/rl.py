"""The mathematics of learning from preferences: pure functions of tensors, each beside its formula and its source.

InstructGPT (Ouyang et al. 2022, arXiv:2203.02155), PPO (Schulman et al. 2017, arXiv:1707.06347), GAE
(Schulman et al. 2015, arXiv:1506.02438), fine-tuning from preferences (Ziegler et al. 2019,
arXiv:1909.08593), DPO (Rafailov et al. 2023, arXiv:2305.18290); and, for what the papers leave out, the
code openai/lm-human-preferences.

Shape suffixes: B sequences, T response tokens, P pairs. A ``mask`` is 1 where a response has a token, its
end-of-text included, and 0 behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.nn.losses import masked_mean

WHITEN_EPS = 1e-8  # openai/lm-human-preferences, lm_human_preferences/utils/core.py


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """``x`` with variance 1 over the masked elements, and mean 0 unless ``shift_mean`` is False.

    The variance is the population's, as in openai/lm-human-preferences; the sample's would differ.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return whitened if shift_mean else whitened + mean


def token_rewards(score_B: Tensor, logp_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token (B, T): -kl_coef (log p - log p_ref), and the score at the last token.

    Ouyang et al., equation 2, spread over tokens as in Ziegler et al., section 2.2.
    """
    rewards_BT = -kl_coef * (logp_BT - reference_BT) * mask_BT
    last_B1 = (mask_BT.sum(1, keepdim=True).long() - 1).clamp(min=0)
    return rewards_BT.scatter_add(1, last_B1, (score_B * mask_BT.any(1))[:, None].to(rewards_BT.dtype))


def advantages(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (B, T): A_t = delta_t + gamma lam A_{t+1}, with the value 0 behind the last token.

    delta_t = r_t + gamma V_{t+1} - V_t (arXiv:1506.02438, equations 11 and 16).
    """
    values_BT = values_BT * mask_BT
    following_BT = F.pad(values_BT[:, 1:], (0, 1))
    delta_BT = (rewards_BT + gamma * following_BT - values_BT) * mask_BT
    running_B = torch.zeros_like(delta_BT[:, 0])
    out = torch.empty_like(delta_BT)
    for t in range(delta_BT.shape[1] - 1, -1, -1):
        running_B = delta_BT[:, t] + gamma * lam * running_B
        out[:, t] = running_B
    return out * mask_BT


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The clipped objective and what is worth watching of it."""

    loss: Tensor
    clipped: Tensor  # share of tokens whose ratio left [1 - clip, 1 + clip]
    approx_kl: Tensor  # mean of (log p - log p_old)^2 / 2, as openai/lm-human-preferences logs it


def policy_loss(logp_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, clip: float) -> PolicyLoss:
    """PPO's clipped surrogate, negated: -min(r A, clip(r, 1 - eps, 1 + eps) A), r = p / p_old.

    Schulman et al. 2017, equation 7. The mean is over the tokens of the minibatch, not over its sequences.
    """
    change_BT = (logp_BT - old_BT) * mask_BT
    ratio_BT = change_BT.exp()
    worst_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip))
    return PolicyLoss(
        loss=masked_mean(worst_BT, mask_BT),
        clipped=masked_mean(((ratio_BT - 1).abs() > clip).to(ratio_BT.dtype), mask_BT).detach(),
        approx_kl=0.5 * masked_mean(change_BT.detach() ** 2, mask_BT),
    )


def value_loss(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float) -> Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2, V kept within ``clip`` of the rollout's (openai/lm-human-preferences)."""
    near_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
    worst_BT = torch.maximum((values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2)
    return 0.5 * masked_mean(worst_BT, mask_BT)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - var(R - V) / var(R): 1 for a critic that knows, 0 for one that says the same of everything."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask_BT)) ** 2, mask_BT)

    spread = variance(returns_BT)
    return (1 - variance(returns_BT - values_BT) / spread).item() if spread > 0 else 0.0


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or steered towards ``target`` (Ziegler et al., section 2.2).

    e = clip((KL - target) / target, -0.2, 0.2); coef <- coef (1 + e n / horizon), n sequences per step.
    """

    coef: float
    target: float | None = None  # nats per sequence; None: fixed
    horizon: int = 10_000  # sequences

    def update(self, kl: float, sequences: int) -> None:
        """Take account of a step of ``sequences`` whose mean KL was ``kl`` nats per sequence."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * sequences / self.horizon


def pairwise_loss(better_P: Tensor, worse_P: Tensor, weight_P: Tensor) -> Tensor:
    """-log sigmoid(r_better - r_worse), weighted (Ouyang et al., equation 1).

    ``weight`` is 1 / C(K, 2) over the K responses of the pair's prompt, so that each prompt counts once.
    """
    return -(F.logsigmoid(better_P - worse_P) * weight_P).sum()


def dpo_loss(
    better_P: Tensor, worse_P: Tensor, reference_better_P: Tensor, reference_worse_P: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """DPO: losses (P,) and reward margins (P,), from log-probabilities of whole responses (Rafailov et al., eq. 7)."""
    margin_P = beta * ((better_P - reference_better_P) - (worse_P - reference_worse_P))
    return -F.logsigmoid(margin_P), margin_P.detach()
