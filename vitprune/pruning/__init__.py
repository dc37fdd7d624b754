"""Decide which neurons go (plan), take them out (mask or remove) and make good what can be (compensate)."""
