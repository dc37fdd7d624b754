"""The hub: saved models for others, with a card that says what they cost."""
