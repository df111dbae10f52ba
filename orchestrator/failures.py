"""How often a run is interrupted, how often it should save, and what is left of the time.

Sources: [Y] Young 1974, doi:10.1145/361147.361115; [D] Daly 2006, doi:10.1016/j.future.2004.11.016; rates of
interruption: Llama 3 (arXiv:2407.21783, section 3.3.4), 3.8 in 1,000 node-days; Meta's clusters RSC-1 and RSC-2
(arXiv:2410.21680), 6.5 and 2.3.
"""

import math
import re
from dataclasses import dataclass

DAY_S = 86400.0
NEVER_S = 1e18  # older than the universe: what fails before any save is made


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """What interruptions leave of a run."""

    interruptions: float  # expected, over the whole run
    goodput: float  # share of the time that trains: not saving, restarting, doing again or waiting
    days: float  # end to end: training, saving, restarting, repeating and queueing
    interval_s: float  # between saves, that loses least
    submissions: int  # jobs that the queue's time limit makes of it; 1 without a limit


def optimal_interval_s(save_s: float, mean_between_s: float) -> float:
    """Seconds of training between saves that lose the least time ([D] equation 37; sqrt(2 d M) is [Y]'s).

    Where saving takes longer than half the time between failures, the best is to save as often as one fails.
    """
    if not math.isfinite(mean_between_s):
        return math.inf
    if save_s >= 2 * mean_between_s:
        return mean_between_s
    x = math.sqrt(save_s / (2 * mean_between_s))
    return math.sqrt(2 * save_s * mean_between_s) * (1 + x / 3 + x * x / 9) - save_s


def goodput(
    *, run_s: float, save_s: float, interval_s: float, nodes: int, per_node_day: float, restart_s: float,
    queue_s: float = 0.0, limit_s: float = 0.0, lead_s: float = 0.0,
) -> Goodput:  # fmt: skip
    """Expected share of useful time where a save stalls for ``save_s`` after each ``interval_s`` of training.

    [D] equation 20: what failed is done again until it succeeds, the restart too. A failure also costs a wait in the
    queue, in which nothing fails. A job of ``limit_s`` (0: no limit) is told ``lead_s`` before its end, saves, waits
    and starts again.
    """
    between = DAY_S / (nodes * per_node_day) if per_node_day else math.inf
    interval_s = min(interval_s, run_s)
    running = _with_failures(interval_s + save_s, restart_s, between) * run_s / interval_s
    usable = limit_s - lead_s - restart_s
    jobs = max(1, math.ceil(running / usable)) if limit_s and usable > 0 else 1
    running += (jobs - 1) * (save_s + restart_s)
    whole = running + queue_s * (jobs + running / between)
    return Goodput(
        interruptions=running / between,
        goodput=run_s / whole if whole else 1.0,
        days=whole / DAY_S,
        interval_s=optimal_interval_s(save_s, between),
        submissions=jobs,
    )


def _with_failures(segment_s: float, restart_s: float, between: float) -> float:
    """Expected seconds until one of ``segment_s`` goes by without a failure ([D] equation 20)."""
    if not math.isfinite(between):
        return segment_s
    try:
        return between * math.exp(restart_s / between) * math.expm1(segment_s / between)
    except OverflowError:
        return NEVER_S


def limit_s(time: object) -> float:
    """A limit as `sbatch --time` reads it, `90`, `24:00:00`, `2-0`, in seconds; 0 for none and for what is no time."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time)) if time is not None else None
    if not match:
        return 0.0
    days, *rest = match.groups()
    parts = [int(x) for x in rest if x is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return float(int(days or 0) * DAY_S + hours * 3600 + minutes * 60 + seconds)


def storage_gb(checkpoint_gb: float, keep: int) -> float:
    """Room for checkpoints: those that are kept, and the one being written before an old one goes."""
    return checkpoint_gb * (keep + 1)
