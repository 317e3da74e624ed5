"""Commands: train, compare and measure."""
