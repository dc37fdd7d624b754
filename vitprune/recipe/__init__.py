"""Recipes: whole experiments as data, a YAML list of commands with their options."""
