"""Images: which files they are, what their classes are called and numbered, and batches of them."""
