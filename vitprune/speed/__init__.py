"""How fast models run, and why not faster."""
