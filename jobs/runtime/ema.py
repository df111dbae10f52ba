"""The exponential moving average of an engine's weights, as each rank holds them, in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.engines import Engine
    from jobs.runtime.pieces import Piece


class Average:
    """a <- decay a + (1 - decay) w, after each step (Ouyang et al. 2022, arXiv:2203.02155, appendix C.4: 0.992)."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.restart()

    def restart(self) -> None:
        """Begin with the weights as they are."""
        self.held = [piece.data.detach().clone() for piece in self._weights()]

    def update(self) -> None:
        """Take account of a step."""
        for mean, piece in zip(self.held, self._weights(), strict=True):
            mean.lerp_(piece.data.detach(), 1 - self.decay)

    def pieces(self) -> list[Piece]:
        """The average of each piece of the weights."""
        return [replace(piece, data=mean) for mean, piece in zip(self.held, self._weights(), strict=True)]

    def filled(self) -> None:
        """Nothing is made of an average."""

    def _weights(self) -> list[Piece]:
        return [piece for piece in self.engine.pieces() if piece.slot == "weight"]
