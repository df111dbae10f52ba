"""What tokens are worth: how often a stage reads its data, and the loss that a scaling law promises.

[C] Hoffmann et al. 2022, arXiv:2203.15556, section 3.3, with the constants of Besiroglu et al. 2024, arXiv:2404.10102
[M] Muennighoff et al. 2023, arXiv:2305.16264: up to four epochs are worth nearly as much as new tokens
"""

import struct
from pathlib import Path

from orchestrator.schedule import total_tokens
from orchestrator.spec import DataSpec, Experiment

WORTH_REPEATING = 4  # epochs [M, section 1]
HEADER = struct.Struct("<9sQB")  # of an .idx: magic, version, type of a token (jobs/data/indexed.py)
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # bytes of a token, by Megatron's codes


def epochs(experiment: Experiment, name: str) -> dict[str, float]:
    """How often stage ``name`` reads each source whose shards are on disk; nothing where it reads no packed text."""
    stage, data = experiment.stages[name], experiment.data
    if stage.kind != "pretrain":
        return {}
    asked = total_tokens(stage, experiment.model.seq_len)
    weights = sum(source.weight for source in data.sources.values())
    there = {source: tokens for source in data.sources if (tokens := tokens_of(data, source))}
    return {source: asked * data.sources[source].weight / weights / tokens for source, tokens in there.items()}


def tokens_of(data: DataSpec, name: str) -> int:
    """Tokens in the training shards of a source, by the size of their files; 0 where one is missing or unreadable."""
    source = data.sources[name]
    total = 0
    for prefix in source.shards or [str(Path(data.folder) / f"{name}-train")]:  # the latter is what `prepare` makes
        index, tokens = (Path(prefix + suffix).expanduser() for suffix in (".idx", ".bin"))
        try:
            with index.open("rb") as f:
                _, _, code = HEADER.unpack(f.read(HEADER.size))
            total += tokens.stat().st_size // WIDTHS[code]
        except (OSError, struct.error, KeyError):
            return 0
    return total


def loss(params: float, tokens: float) -> float:
    """Nats per token of a model of ``params`` after ``tokens``: E + A / N^alpha + B / D^beta [C, equation 2].

    Of the data that [C] trained on. Other text and other tokenizers shift it; how it falls is alike.
    """
    return 1.8172 + 482.01 / params**0.3478 + 2085.43 / tokens**0.3658
