"""Training objectives: from a batch to inputs, targets and a loss."""
