"""Faults on purpose: what is done to a run, where it runs meanwhile, and how what came of it is judged."""
