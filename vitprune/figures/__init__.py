"""Pictures, one file each; ``style`` holds what they share."""
