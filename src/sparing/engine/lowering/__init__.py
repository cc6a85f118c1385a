"""From operators of PyTorch to operations of the engine."""
