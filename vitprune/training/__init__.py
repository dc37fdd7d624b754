"""Training: give back to a pruned model what pruning took."""
