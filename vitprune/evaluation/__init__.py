"""Measure what pruning costs and brings: accuracy, latency, multiply-accumulates, interventions on paths."""
