"""The families in plain PyTorch, any dtype: the oracle of the tests and the CPU path."""
