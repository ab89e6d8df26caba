"""The page: chat with a model, see what it sees, compare, measure. Start with `demo.app`."""
