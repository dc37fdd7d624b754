"""What neuron paths mean: the paper's experiments and what they show."""
