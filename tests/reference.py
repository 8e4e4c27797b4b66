"""SGD-SaI written as plainly as possible, in float64: what every path of the optimizer is compared with."""

import torch


def reference_gsnr(gradient, eps=0.0):
    """||g|| / (std + eps) of a tensor with at least two elements, two-pass, float64."""
    g = gradient.detach().to(torch.float64).flatten()
    return (g.norm() / (g.std() + eps)).item()


def reference_unit(gradient, how):
    """A float64 gradient with root-mean-square 1: as a whole, or row by row if it has rows."""
    rows = gradient if how == "rows" and gradient.ndim > 1 else gradient.unsqueeze(0)
    unit = [row / row.square().mean().sqrt() if row.any() else row for row in rows]
    return torch.stack(unit).view_as(gradient)


class ReferenceFactored:
    """A gradient over Adafactor's estimate of its root-mean-square (arXiv 1804.04235, equation 6), float64.

    The plain elements' means are kept, and their rows' and columns' means taken from them, which is the same.
    """

    def __init__(self):
        self.squares, self.steps = 0.0, 0

    def __call__(self, gradient):
        self.steps += 1
        self.squares = 0.999 * self.squares + 0.001 * gradient.square()
        v = self.squares / (1 - 0.999**self.steps)
        if gradient.ndim > 1:
            v = v.flatten(1)
            v = v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean().clamp(min=1e-300)
        root = v.sqrt().view_as(gradient)
        return torch.where(root > 0, gradient / root, 0.0)


class ReferenceSGDSaI:
    """Algorithm 1 of arXiv 2412.11768 (without normalisation), a copy of each parameter in float64."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-2, eps=1e-8, maximize=False, normalize_gradient=None):
        self.params = [p.detach().to(torch.float64).clone() for p in params]
        self.lr, self.momentum, self.weight_decay, self.eps = lr, momentum, weight_decay, eps
        self.maximize = maximize
        self.normalize_gradient = normalize_gradient
        self.factored = [ReferenceFactored() for _ in params]
        self.gsnr = None
        self.buffers = None

    def step(self, gradients):
        sign = -1.0 if self.maximize else 1.0
        gradients = [sign * g.detach().to(torch.float64) for g in gradients]
        if self.gsnr is None:
            self.gsnr = [reference_gsnr(g, self.eps) for g in gradients]
        if self.normalize_gradient == "factored":
            gradients = [unit(g) for unit, g in zip(self.factored, gradients, strict=True)]
        elif self.normalize_gradient is not None:
            gradients = [reference_unit(g, self.normalize_gradient) for g in gradients]
        if self.buffers is None:
            self.buffers = [g.clone() for g in gradients]
        for i, g in enumerate(gradients):
            self.buffers[i] = self.momentum * self.buffers[i] + (1 - self.momentum) * g
            decayed = self.params[i] - self.lr * self.weight_decay * self.params[i]
            scale = self.gsnr[i]
            if self.normalize_gradient is not None:
                scale /= g.numel() ** 0.5
            self.params[i] = decayed - self.lr * scale * self.buffers[i]
