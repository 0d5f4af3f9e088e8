"""The paper's experiments: runs, sizes, search, costs, and what the records show."""
