"""agent: what a model does beyond speaking. Plain Python, no torch."""
