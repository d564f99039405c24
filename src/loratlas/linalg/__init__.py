"""Numerics that know no neural network: tensors in, tensors out, and only torch underneath."""
