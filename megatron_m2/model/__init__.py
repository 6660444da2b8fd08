"""The mathematics of MiniMax-M2."""
