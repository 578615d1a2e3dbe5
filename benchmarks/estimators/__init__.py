"""Methods compared: which hypergradients find good hyperparameters, and for what."""
