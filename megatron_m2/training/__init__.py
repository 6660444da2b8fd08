"""The training loop: schedule, optimizer, losses, checkpoints, metrics."""
