"""SGD-SaI with every rule, as plainly as possible in float64: what every path of the optimizer is compared with.

Paths are compared by how far parameters moved, relative to the movement: an absolute tolerance on the parameters would
let a step pass that was never made.
"""

import torch


def reference_gsnr(gradient, eps=0.0):
    """||g|| / (std + eps) of a tensor with at least two elements, two-pass, float64; 1 for one element."""
    g = gradient.detach().to(torch.float64).flatten()
    return 1.0 if g.numel() == 1 else (g.norm() / (g.std() + eps)).item()


class Published:
    """The gradient as it is, times its g-SNR."""

    def __call__(self, gradient):
        return gradient

    def scale(self, gsnr, n):
        return gsnr


class Rows(Published):
    """Every row, or a vector as a whole, over its root-mean-square."""

    def __call__(self, gradient):
        rows = gradient if gradient.ndim > 1 else gradient.unsqueeze(0)
        unit = [row / row.square().mean().sqrt() if row.any() else row for row in rows]
        return torch.stack(unit).view_as(gradient)

    def scale(self, gsnr, n):
        return gsnr / n**0.5


class Factored(Rows):
    """Over Adafactor's estimate of the root-mean-square (arXiv 1804.04235, equation 6).

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


class Orthogonal(Rows):
    """A matrix (outputs, inputs) along its orthogonal momentum: the momentum is here, not in ReferenceSGDSaI.

    The singular values go through Muon's polynomial (3.4445 s - 4.775 s^3 + 2.0315 s^5, five times, from s over the
    root of their squares' sum), which is what its matrix products do to them. Then NorMuon (arXiv 2510.05491).
    """

    def __init__(self, momentum=0.9):
        self.momentum, self.buffer, self.row_squares = momentum, None, 0.0

    def __call__(self, gradient):
        self.buffer = gradient.clone() if self.buffer is None else self.buffer
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        nesterov = self.momentum * self.buffer + (1 - self.momentum) * gradient
        u, s, v = torch.linalg.svd(nesterov, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        orthogonal = u * s @ v
        squares = orthogonal.square().mean(1, keepdim=True)
        self.row_squares = 0.95 * self.row_squares + 0.05 * squares
        even = orthogonal / self.row_squares.sqrt()
        return 0.2 * max(gradient.shape) ** 0.5 * even * orthogonal.norm() / even.norm()


RULES = {"published": Published, "rows": Rows, "factored": Factored, "averaged": Factored, "orthogonal": Orthogonal}


class ReferenceSGDSaI:
    """Algorithm 1 of arXiv 2412.11768 (without normalisation), a copy of each parameter in float64."""

    def __init__(
        self,
        params,
        lr=1e-2,
        momentum=0.9,
        weight_decay=1e-2,
        eps=1e-8,
        maximize=False,
        update="published",
        nesterov=False,
    ):
        self.params = [p.detach().to(torch.float64).clone() for p in params]
        self.lr, self.momentum, self.weight_decay, self.eps = lr, momentum, weight_decay, eps
        self.maximize, self.nesterov = maximize, nesterov
        self.rules = [RULES[update](momentum) if update == "orthogonal" else RULES[update]() for _ in params]
        if update == "orthogonal":
            self.momentum = 0.0  # the rule has it
        self.gsnr = self.buffers = None
        # Schedule-Free's z and x, and the sum of the squares of the rates; the parameters are y.
        self.averages, self.weights = update == "averaged", 0.0
        self.z, self.means = ([p.clone() for p in self.params] for _ in range(2))

    def step(self, gradients):
        sign = -1.0 if self.maximize else 1.0
        gradients = [sign * g.detach().to(torch.float64) for g in gradients]
        if self.gsnr is None:
            self.gsnr = [reference_gsnr(g, self.eps) for g in gradients]
        gradients = [rule(g) for rule, g in zip(self.rules, gradients, strict=True)]
        if self.averages:
            return self.step_averaged(gradients)
        if self.buffers is None:
            self.buffers = [g.clone() for g in gradients]
        for i, g in enumerate(gradients):
            self.buffers[i] = self.momentum * self.buffers[i] + (1 - self.momentum) * g
            direction = self.buffers[i]
            if self.nesterov:
                direction = self.momentum * direction + (1 - self.momentum) * g
            decayed = self.params[i] - self.lr * self.weight_decay * self.params[i]
            self.params[i] = decayed - self.lr * self.rules[i].scale(self.gsnr[i], g.numel()) * direction

    def step_averaged(self, gradients):
        """arXiv 2405.15682, equations 3 to 5, with weights of the squared rates."""
        self.weights += self.lr**2
        for i, (g, p) in enumerate(zip(gradients, self.params, strict=True)):
            step = self.rules[i].scale(self.gsnr[i], g.numel()) * g + self.weight_decay * p
            self.z[i] = self.z[i] - self.lr * step
            self.means[i] = torch.lerp(self.means[i], self.z[i], self.lr**2 / self.weights)
            self.params[i] = torch.lerp(self.z[i], self.means[i], self.momentum)


def assert_moved_alike(params, expected, start, rel):
    """Each parameter has moved as expected, to this part of the movement's norm.

    Args:
        params: The parameters now.
        expected: Where they should be.
        start: Where both began.
        rel: The largest difference over the movement; 0.05 would let a scale pass that is 5 % off.
    """
    for index, (p, target, begun) in enumerate(zip(params, expected, start, strict=True)):
        p, target, begun = (t.detach().to(torch.float64) for t in (p, target, begun))
        moved = (target - begun).norm()
        assert moved > 0 or torch.equal(p, begun), f"parameter {index} should have stayed"
        off = (p - target).norm() / moved
        told = f"parameter {index}: off by {off:.2g} of its movement"
        assert off <= rel or moved == 0, f"{told}; if a rule is to change, change tests/reference.py, too"
