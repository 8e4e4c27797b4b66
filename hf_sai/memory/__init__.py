"""Bytes before training: what parameters, gradients and optimizer states will take."""
