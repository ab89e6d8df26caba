"""evals: model to numbers."""
