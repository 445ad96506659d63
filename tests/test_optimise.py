"""The groups of an optimiser and their learning rates over a schedule, worked by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medseg.config import TrainConfig
from medseg.optimise import learning_rate, make_optimizer, set_rates

LOADED = frozenset({"0.weight", "0.bias", "1.running_mean"})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Conv1d(2, 1, 1))


def rates(optimizer: torch.optim.Optimizer, config: TrainConfig, progress: float) -> list[float]:
    set_rates(optimizer, config, progress)
    return [group["lr"] for group in optimizer.param_groups]


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.ones(2, 1, 9)).square().mean().backward()
    optimizer.step()


def test_without_loaded_weights_all_are_one_group() -> None:
    config, net = TrainConfig(optimizer="adamw", learning_rate=2e-3, warm_up=0), network()
    optimizer = make_optimizer(config, net)
    assert [len(g["params"]) for g in optimizer.param_groups] == [6]
    assert rates(optimizer, config, 0.0) == [pytest.approx(2e-3)]


def test_loaded_weights_are_held_still_then_follow_more_slowly() -> None:
    config, net = (
        TrainConfig(optimizer="adamw", learning_rate=2e-3, warm_up=0, freeze_share=0.25, pretrained_factor=0.5),
        network(),
    )
    optimizer = make_optimizer(config, net, loaded=LOADED)
    new, old = ([id(p) for p in g["params"]] for g in optimizer.param_groups)
    assert old == [id(net[0].weight), id(net[0].bias)]
    assert new == [id(p) for layer in (net[1], net[2]) for p in layer.parameters()]
    rate = learning_rate(config, 0.25)
    assert rates(optimizer, config, 0.2499)[1] == 0
    assert rates(optimizer, config, 0.25) == [rate, 0.5 * rate]


def test_a_network_that_is_loaded_as_a_whole_is_never_held_still() -> None:
    config, net = (
        TrainConfig(optimizer="adamw", learning_rate=2e-3, warm_up=0, freeze_share=0.5, pretrained_factor=0.5),
        network(),
    )
    optimizer = make_optimizer(config, net, loaded=frozenset(dict(net.named_parameters())))
    assert rates(optimizer, config, 0.0) == [pytest.approx(1e-3)]


def test_what_is_held_still_does_not_move_and_is_let_go() -> None:
    config, net = TrainConfig(optimizer="adamw", learning_rate=2e-3, warm_up=0, freeze_share=0.5), network()
    optimizer = make_optimizer(config, net, loaded=LOADED)
    before = copy.deepcopy(net.state_dict())
    set_rates(optimizer, config, 0.0)
    step(net, optimizer)
    # weight decay, too, waits
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[2].weight, before["2.weight"])
    set_rates(optimizer, config, 0.5)
    step(net, optimizer)
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_the_rate_rises_in_the_warm_up_then_falls_to_nothing() -> None:
    config = TrainConfig(warm_up=0.1, learning_rate=1e-2)
    assert learning_rate(config, 0.0) == pytest.approx(1e-4)
    assert learning_rate(config, 0.05) == pytest.approx(5e-3)
    assert learning_rate(config, 0.1) == pytest.approx(1e-2)
    assert learning_rate(config, 0.55) == pytest.approx(1e-2 * 0.5**0.9)
    assert learning_rate(config, 1.0) == pytest.approx(0, abs=1e-9)


def test_muon_moves_kernels_and_the_rest_in_groups_of_their_own() -> None:
    net = network()
    optimizer = make_optimizer(TrainConfig(optimizer="muon"), net)
    matrices, vectors = ([id(p) for p in g["params"]] for g in optimizer.param_groups)
    assert matrices == [id(net[0].weight), id(net[2].weight)]
    assert vectors == [id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[2].bias)]


def test_muon_holds_loaded_weights_still_then_lets_them_follow_more_slowly() -> None:
    config = TrainConfig(optimizer="muon", learning_rate=2e-3, warm_up=0, freeze_share=0.25, pretrained_factor=0.5)
    net = network()
    optimizer = make_optimizer(config, net, loaded=LOADED)
    before = copy.deepcopy(net.state_dict())
    set_rates(optimizer, config, 0.2)
    step(net, optimizer)
    assert torch.equal(net[0].weight, before["0.weight"])
    assert torch.equal(net[0].bias, before["0.bias"])
    assert not torch.equal(net[2].weight, before["2.weight"])
    set_rates(optimizer, config, 0.25)
    rate = learning_rate(config, 0.25)
    assert {id(g["params"][0]): g["lr"] for g in optimizer.param_groups} == {
        id(net[0].weight): 0.5 * rate,
        id(net[0].bias): 0.5 * rate,
        id(net[1].weight): rate,
        id(net[2].weight): rate,
    }
    step(net, optimizer)
    assert not torch.equal(net[0].weight, before["0.weight"])
