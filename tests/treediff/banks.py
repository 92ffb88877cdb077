"""Small banks of node networks, and what their nodes say one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treediff.layers import Groups, NodeBank


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def small() -> nn.Module:
    """Sizes that are no multiple of the alignment."""
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 1))


def bank_of(*nodes: int, template: nn.Module | None = None) -> NodeBank:
    bank = NodeBank(template or small())
    for node in nodes:
        bank.add(node, generator=seeded(node))
    return bank


def one_by_one(bank: NodeBank, x: Tensor, nodes: list[int]) -> Tensor:
    """Row `i` through an ordinary module with the weights of `nodes[i]`."""
    return torch.cat([bank.module(node).train(bank.training)(row[None]) for node, row in zip(nodes, x, strict=True)])


def call(bank: NodeBank, x: Tensor, nodes: list[int]) -> Tensor:
    """One row per node."""
    return bank(x, Groups(torch.arange(len(nodes)), len(nodes)), nodes)
