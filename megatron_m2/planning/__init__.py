"""What a layout of a training run costs in memory and time, before any process starts."""
