"""What is learned: model parts, objectives, tuning, recipes. Knows nothing of Ray."""

__version__ = "0.1.0"
