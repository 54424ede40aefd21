"""``logprob(..., inplace_backward=True)``: the gradient takes the logits' place."""

import pytest
import torch
from torch import Tensor

import lolkernels as lk

N, D, V = 6, 8, 50


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(V, (N,))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda_host", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_that_of_the_copying_backward(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)

    def grad(inplace: bool) -> Tensor:
        logits = hidden @ weight.T
        out = lk.logprob(logits, labels, backend=backend, inplace_backward=inplace, softcap=9.0)
        total = (out.logps * torch.arange(N)).sum() + out.entropy.sum() + out.lse.sum()
        return torch.autograd.grad(total, weight)[0]

    assert torch.equal(grad(True), grad(False))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_it_lies_where_the_logits_were(layout: str) -> None:
    hidden, weight, labels = problem()
    logits = hidden @ weight.T if layout == "rows" else (weight @ hidden.T).T
    place = logits.data_ptr()
    out = lk.logprob(logits, labels, inplace_backward=True)
    want = torch.softmax(logits.detach(), 1)
    (grad,) = torch.autograd.grad(out.logps.sum(), logits, retain_graph=True)
    assert grad.data_ptr() == place and grad.stride() == logits.stride()
    want[range(N), labels] -= 1
    torch.testing.assert_close(grad, -want)
    # Of a view, torch says that it is no longer the one that was used.
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|not have been used"):
        torch.autograd.grad(out.logps.sum(), logits)


def test_another_user_of_the_logits_is_told() -> None:
    hidden, weight, labels = problem()
    logits = hidden @ weight.T
    other = logits.exp().sum() + (logits**2).sum()  # the square needs the logits in its backward
    lk.logprob(logits, labels, inplace_backward=True).logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_under_torch_compile() -> None:
    hidden, weight, labels = problem()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(weight: Tensor) -> Tensor:
        return lk.logprob(hidden @ weight.T, labels, inplace_backward=True).logps.sum()

    (got,) = torch.autograd.grad(loss(weight), weight)
    (want,) = torch.autograd.grad(lk.logprob(hidden @ weight.T, labels).logps.sum(), weight)
    torch.testing.assert_close(got, want)


def test_it_has_no_second_derivative_and_needs_memory_of_its_own() -> None:
    hidden, weight, labels = problem()
    out = lk.logprob(hidden @ weight.T, labels, inplace_backward=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(out.logps.sum(), weight, create_graph=True)
    with pytest.raises(ValueError, match="inplace_backward needs logits of their own memory"):
        lk.logprob(torch.randn(1, V).expand(N, V), labels, inplace_backward=True)
