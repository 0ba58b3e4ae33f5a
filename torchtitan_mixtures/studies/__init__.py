"""What studies of several trainings need: work in pieces that can be stopped, and comparisons."""
