"""What pruning learns from calibration images: statistics, and the criteria that rank neurons by them."""
