"""What every training stage shares: ranks, the loop, checkpoints, signals."""
