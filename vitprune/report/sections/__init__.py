"""What a report says of each kind of folder, and how its parts lead to each other."""
