"""Optimizers: `torch.optim.Optimizer`s that work in any loop, and the dataclasses of options that build them."""
