"""What is learned: model parts, objectives, tuning, recipes. Knows nothing of Ray."""
