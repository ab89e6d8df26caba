"""recipes: one Python file is one run."""
