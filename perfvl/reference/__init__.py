"""What each op means, in plain PyTorch: the oracle of the tests, the fallback, and the float64 path."""
