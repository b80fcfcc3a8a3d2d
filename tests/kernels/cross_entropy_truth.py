"""Linear and cross-entropy in fp64 by autograd, and how far each result may be off it, element by element.

Per dtype, eps bounds one rounding (to nearest it is half of that; Triton's interpreter truncates), and eps32
one of fp32, in which products are summed; roundings of a sum of n terms are independent and carry it off by
sqrt(n) of them. To first order:

- a logit is a sum of D products, rounded to the dtype: off by its
  d = sqrt(D) * eps32 * |x| @ |w| + eps * |logit|;
- its logsumexp is off by the mean of d under the probabilities, and by sqrt(V) + 8 roundings of fp32 of the
  largest number that goes into it; a loss by that and by its label's d;
- a probability is off by d and its logsumexp's error as a factor; the gradient of a logit, p * scale - 1, by
  that of p and of scale, by four roundings of fp32 and by one of the dtype;
- the gradients of x and weight inherit these through a product with |w| and |x|, add sqrt(V) and sqrt(T)
  roundings of fp32 for the sum, one of the dtype for each chunk's product, one for the result and one for
  its scaling, and what fp16 cannot hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPS32 = torch.finfo(torch.float32).eps
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """x [T, D], weight [V, D], labels [T] of which some are ignored, and the gradient of the loss."""

    x: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    grad: float = 0.375  # a power of two would not round


def make(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    """Logits of a standard deviation of two, every fifth label ignored."""
    random = torch.Generator().manual_seed(tokens * 1009 + vocabulary)
    x = torch.randn(tokens, dim, generator=random)
    weight = 2 * torch.randn(vocabulary, dim, generator=random) / dim**0.5
    labels = torch.randint(vocabulary, (tokens,), generator=random)
    labels[4::5] = IGNORED
    return Inputs(x.to(dtype), weight.to(dtype), labels)


def run(inputs: Inputs, loss: Loss) -> list[torch.Tensor]:
    """[loss, gradient of x, gradient of weight]."""
    x, weight = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.weight))
    summed = loss(x, weight, inputs.labels)
    summed.backward(torch.tensor(inputs.grad, dtype=summed.dtype))
    assert x.grad is not None
    assert weight.grad is not None
    return [summed.detach(), x.grad, weight.grad]


def plain(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    """The definition."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss + z_loss * (logits.logsumexp(-1).square() * (labels != IGNORED)).sum()


def assert_true(
    inputs: Inputs, results: list[torch.Tensor], z_loss: float, *, extra: torch.Tensor | float = 0.0
) -> None:
    """Each result is as far off fp64 as its roundings explain, at most; `extra` for the gradient of x."""
    exact = Inputs(inputs.x.double(), inputs.weight.double(), inputs.labels, inputs.grad)
    expected = run(exact, lambda x, weight, labels: plain(x, weight, labels, z_loss))
    limits = _limits(exact, expected, torch.finfo(inputs.x.dtype).eps, z_loss)
    limits[1] = limits[1] + extra
    names = ("loss", "gradient of x", "gradient of weight")
    for name, got, true, limit in zip(names, results, expected, limits, strict=True):
        off = (got.double() - true).abs()
        assert got.shape == true.shape, name
        assert bool((off <= limit).all()), f"{name}: {float((off / limit).max()):.2f} times what is explained"


def _limits(inputs: Inputs, expected: list[torch.Tensor], eps: float, z_loss: float) -> list[torch.Tensor]:
    x, weight, grad = inputs.x, inputs.weight, abs(inputs.grad)
    tokens, dim, vocabulary = *x.shape, weight.shape[0]
    smallest = 4 * torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps if eps > EPS32 else 1e-30
    rounds = eps if eps > EPS32 else 0.0
    logits = x @ weight.t()
    lse = logits.logsumexp(-1, keepdim=True)
    largest = torch.maximum(lse.abs(), logits.abs().amax(-1, keepdim=True))
    p = (logits - lse).exp()
    logit_off = dim**0.5 * EPS32 * (x.abs() @ weight.abs().t()) + rounds * logits.abs()
    lse_off = (p * logit_off).sum(-1, keepdim=True) + (vocabulary**0.5 + 8) * EPS32 * (largest + 1)
    valid = (inputs.labels != IGNORED)[:, None].double()
    label = F.one_hot(inputs.labels.clamp(min=0), vocabulary) * valid
    scale = 1 + 2 * z_loss * lse.abs()
    losses_off = (
        scale * lse_off + (label * logit_off).sum(-1, keepdim=True) + 4 * EPS32 * z_loss * lse.square()
    )
    loss_off = losses_off.sum() + tokens**0.5 * EPS32 * expected[0].abs()
    p = p * valid
    gradient = (p * (1 + 2 * z_loss * lse) - label).abs()
    off = (
        p * scale * torch.expm1(logit_off + lse_off)
        + p * 2 * z_loss * lse_off
        + 4 * EPS32 * (p * scale + label)
    )
    off = off + rounds * (gradient + off)
    sums = [(off @ weight.abs(), gradient @ weight.abs()), (off.t() @ x.abs(), gradient.t() @ x.abs())]
    limits = [loss_off]
    for (inherited, size), terms, true in zip(sums, (vocabulary, tokens), expected[1:], strict=True):
        own = (terms**0.5 + 8) * EPS32 * size + rounds * size
        limits.append(grad * (inherited + own) + 3 * (eps + EPS32) * true.abs() + smallest)
    return limits
