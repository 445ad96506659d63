"""The optimiser: orthogonal steps for matrices, AdamW for vectors, and which weights are which."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medseg.muon import MATRIX, STEPS, VECTOR, Muon, matrix_names, orthogonal

QUINTIC = (3.4445, -4.7750, 2.0315)


def _directly(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as it is published, on the matrix itself."""
    a, b, c = QUINTIC
    x = matrix / matrix.norm()
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4), (1, 7)])
def test_orthogonal_is_the_published_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(matrix), _directly(matrix), rtol=1e-6, atol=1e-7)


def test_a_stack_is_done_matrix_by_matrix() -> None:
    stack = torch.randn(3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    stack[1] *= 1000
    torch.testing.assert_close(orthogonal(stack), torch.stack([orthogonal(m) for m in stack]))


def test_orthogonal_keeps_directions_and_evens_out_sizes() -> None:
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(6, 4, generator=generator))
    found = orthogonal(left @ torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.1])) @ right.T)
    inner = left.T @ found @ right
    assert ((torch.diagonal(inner) > 0.6) & (torch.diagonal(inner) < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag(torch.diagonal(inner)), rtol=0, atol=1e-4)


def test_a_gradient_of_zero_moves_nothing_but_the_decay() -> None:
    weight = nn.Parameter(torch.full((2, 3), 2.0))
    weight.grad = torch.zeros(2, 3)
    Muon([{"params": [weight], "kind": MATRIX}], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 3), 1.9))


def test_a_step_has_the_size_that_is_said() -> None:
    # of a matrix with one row the orthogonal form is the row's direction, 5 times through the quintic
    weight = nn.Parameter(torch.zeros(1, 4))
    weight.grad = torch.tensor([[0.0, 3.0, 0.0, 4.0]])
    Muon([{"params": [weight], "kind": MATRIX}], lr=0.1, weight_decay=0.0).step()
    length = 1.0
    for _ in range(STEPS):
        length = QUINTIC[0] * length + QUINTIC[1] * length**3 + QUINTIC[2] * length**5
    expected = -0.1 * 0.2 * 4**0.5 * length * torch.tensor([[0.0, 0.6, 0.0, 0.8]])
    torch.testing.assert_close(weight.detach(), expected)


def test_vectors_move_as_with_adamw() -> None:
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (nn.Parameter(torch.arange(4.0)) for _ in range(2))
    a = Muon([{"params": [ours], "kind": VECTOR}], lr=0.02, weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(4, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_kernels_are_matrices_with_a_row_for_each_output() -> None:
    flat, shaped = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(3, 2, 2, 2))
    flat.grad = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    shaped.grad = flat.grad.reshape(3, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    Muon([{"params": [flat, shaped], "kind": MATRIX}], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(shaped.detach().flatten(1), flat.detach())


def test_goes_on_from_its_state_bit_for_bit() -> None:
    def make() -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(4)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        matrices = [p for n, p in network.named_parameters() if n in matrix_names(network)]
        vectors = [p for n, p in network.named_parameters() if n not in matrix_names(network)]
        groups = [{"params": matrices, "kind": MATRIX}, {"params": vectors, "kind": VECTOR}]
        return network, Muon(groups, lr=0.05, weight_decay=0.01)

    def advance(network: nn.Module, optimizer: Muon, steps: range) -> None:
        for n in steps:
            optimizer.zero_grad()
            network(torch.full((2, 3), 0.1 * n)).square().sum().backward()
            optimizer.step()

    whole, optimizer = make()
    advance(whole, optimizer, range(1, 7))
    first, before = make()
    advance(first, before, range(1, 4))
    second, after = make()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    advance(second, after, range(4, 7))
    for a, b in zip(whole.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_matrices_are_dense_weights() -> None:
    layers = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 2, 2)
    assert matrix_names(nn.Sequential(*layers, nn.Linear(2, 2))) == {"0.weight", "3.weight", "4.weight"}
