"""A clustering head on frozen features that is trained to agree on neighbours (TEMI, arXiv 2303.17896)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


@torch.no_grad()
def nearest(x: Tensor, count: int) -> Tensor:
    """Numbers of the `count` rows nearest to each row, itself left out: `(N, count)`."""
    found = []
    for rows in torch.arange(len(x)).split(1024):
        distance = torch.cdist(x[rows], x)
        distance[torch.arange(len(rows)), rows] = torch.inf
        found.append(distance.topk(count, dim=1, largest=False).indices)
    return torch.cat(found)


def pointwise_mutual_information(student: Tensor, teacher: Tensor, marginal: Tensor, beta: float) -> Tensor:
    """`log sum_c (student_c teacher_c)^beta / marginal_c` of pairs of rows, all given as logarithms, `(..., B, C)`."""
    return (beta * (student + teacher) - marginal.unsqueeze(-2)).logsumexp(-1)


class Heads(nn.Module):
    """Networks with one hidden layer, side by side: features `(B, D)` to log-probabilities `(heads, B, clusters)`."""

    def __init__(self, x: Tensor, clusters: int, heads: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        features = x.shape[1]
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("spread", (x - x.mean(0)).std())  # one number: the smaller components stay smaller
        self.first = nn.Parameter(torch.randn(heads, features, hidden, generator=generator) / features**0.5)
        self.second = nn.Parameter(0.1 * torch.randn(heads, hidden, clusters, generator=generator) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu((x - self.mean) / self.spread @ self.first)  # type: ignore[operator]
        return (hidden @ self.second / 0.1).log_softmax(-1)


def temi(
    x: Tensor,
    clusters: int,
    *,
    seed: int,
    heads: int = 8,
    neighbours: int = 50,
    steps: int = 3000,
    batch_size: int = 512,
    beta: float = 0.6,
) -> Heads:
    """Train heads on features `(N, D)`, and return the teacher of the head with the least loss at the end, alone."""
    generator = torch.Generator().manual_seed(seed)
    neighbours, batch_size = min(neighbours, len(x) - 1), min(batch_size, len(x))
    near = nearest(x, neighbours)
    student = Heads(x, clusters, heads, 256, generator)
    teacher = copy.deepcopy(student).requires_grad_(False)
    marginal, losses = torch.full((heads, clusters), 1 / clusters), torch.zeros(heads)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    for _ in tqdm(range(steps), desc="TEMI", mininterval=1.0):
        rows = torch.randint(len(x), (batch_size,), generator=generator)
        pairs = near[rows, torch.randint(neighbours, (batch_size,), generator=generator)]
        both = torch.cat([x[rows], x[pairs]])
        told, taught = student(both), teacher(both)
        marginal = 0.9 * marginal + 0.1 * taught.exp().mean(1)
        other = taught.roll(batch_size, dims=1)  # the neighbour's
        alike = (taught + other).exp().sum(-1).mean(0)  # whether the pair is one cluster, by all heads
        loss = -(alike * pointwise_mutual_information(told, other, marginal.clamp_min(1e-6).log(), beta)).mean(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            losses += 0.01 * (loss - losses)
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.004)
    best = int(losses.argmin())
    for parameter in teacher.parameters():
        parameter.data = parameter.data[best : best + 1]
    return teacher
