"""The algorithm: options, g-SNR, rules, the momentum, the update and the optimizer class. Needs torch alone."""
