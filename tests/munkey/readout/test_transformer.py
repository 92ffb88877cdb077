"""Parts of the transformer against themselves written out, compiled, and in low precision."""

from __future__ import annotations

import re

import pytest
import torch
from classifiers import filled, images
from stores import seeded
from torch import Tensor, nn

from munkey import (
    ExemplarTransformer,
    KeyMemoryTransformer,
    KeyStore,
    KeyValueMemory,
    ModuleEncoder,
    PathwayAccuracies,
    Projection,
    pathway_accuracies,
)
from munkey.presets import patch_for
from munkey.readout import ExemplarReadout
from munkey.readout.tokens import ImageTokens, VectorTokens
from munkey.readout.transformer import TransformerBlock


def test_a_token_is_its_patch() -> None:
    tokens = ImageTokens(size=(6, 4), channels=2, patch=2, width=5)
    x = torch.rand(3, 2, 6, 4, generator=seeded())
    got = tokens(x)
    for row in range(3):
        for column in range(2):
            patch = 2 * x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1) - 1
            place = 2 * row + column
            torch.testing.assert_close(got[:, place], tokens.embed(patch) + tokens.position[place])


@pytest.mark.parametrize(
    ("size", "patch"), [((28, 28), 7), ((32, 32), 8), ((8, 8), 2), ((8, 6), 1), ((5, 7), 1), ((12, 24), 3)]
)
def test_patches_that_fill_an_image(size: tuple[int, int], patch: int) -> None:
    assert patch_for(*size) == patch


@pytest.mark.parametrize("bare", [False, True])
def test_tokens_of_ones_own(bare: bool) -> None:
    class Own(nn.Module):
        inputs, count, width = (5, 8), 5, 8

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential() if bare else nn.Sequential(nn.Linear(8, 8, dtype=torch.float64))

        def check(self, x: Tensor) -> None:
            if x.shape[1:] != self.inputs:
                raise ValueError("no tokens")

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    tokens, x = Own(), torch.rand(3, 5, 8, dtype=torch.float32 if bare else torch.float64)
    network = ExemplarTransformer(tokens=tokens, blocks=[], value_width=4, outputs=2)
    assert network.start.dtype == network.head.weight.dtype == x.dtype
    assert network(tokens(x), x.new_zeros(3, 1, 4)).shape == (3, 1, 2)
    encoder = ModuleEncoder(nn.Flatten(), 40, fitted_on="other data")
    memory = KeyValueMemory(KeyStore(40, 4, dtype=x.dtype))
    model = KeyMemoryTransformer(key_encoder=encoder, memory=memory, readout=ExemplarReadout(network), mode="paper")
    model.remember([1, 2, 3], x, torch.tensor([0, 1, 0]))
    assert model(x).shape == (3, 2)
    with pytest.raises(ValueError, match="no tokens"):
        model(x[:, :4])


def test_a_block_treats_each_row_alone() -> None:
    block = TransformerBlock(8, heads=2).eval()
    x = torch.randn(6, 5, 8, generator=seeded())
    torch.testing.assert_close(block(x)[2:4], block(x[2:4]))
    dropped = TransformerBlock(8, heads=2, dropout=0.5)
    assert not torch.equal(dropped(x), dropped(x)) and torch.equal(dropped.eval()(x), dropped(x))


def test_no_statistic_is_kept_of_a_batch() -> None:
    built = filled()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    built.train()
    built(images(9, seed=3))
    assert all(torch.equal(before[name], tensor) for name, tensor in built.state_dict().items())


def test_the_static_path_compiles_whole() -> None:
    built = filled()
    x, values = built.readout.network.tokens(images(3)).detach(), torch.randn(3, 2, 4, generator=seeded())
    compiled = torch.compile(built.readout.network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, values), built.readout.network(x, values))


def test_autocast() -> None:
    built = filled()
    exact = built(images(5, seed=2))
    with torch.autocast("cpu", torch.bfloat16):
        low = built(images(5, seed=2))
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    encoder = Projection.random((1, 8, 6), 5).to(dtype)
    built = KeyMemoryTransformer.for_images(
        classes=3, channels=1, size=(8, 6), key_encoder=encoder, width=8, value_width=4, dtype=dtype, mode="paper"
    )
    built.remember([1, 2], images(2).to(dtype))
    assert built(images(3).to(dtype)).dtype == dtype
    assert built.memory.store.keys.dtype == dtype
    assert isinstance(built.memory, KeyValueMemory)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ImageTokens((6, 4), 1, 3, 8), ValueError, "patches must fill the image; 3 does not divide 6 and 4"),
        (lambda: ImageTokens(0, 1, 1, 8), ValueError, "height must be at least 1, found 0"),
        (lambda: VectorTokens(3, 0, 8), ValueError, "count must be at least 1, found 0"),
        (lambda: TransformerBlock(8, expansion=0), ValueError, "expansion must be at least 1, found 0"),
        (lambda: TransformerBlock(8, heads=3), ValueError, "heads"),
    ],
)
def test_bad_parts(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()  # type: ignore[operator]


# --- pathways -------------------------------------------------------------------------------------------------


def test_accuracies_of_the_pathways() -> None:
    built = filled(40).train()
    x = images(30, seed=2)
    built.eval()
    wanted = [built(x), built(x, use_memory=False), built(x, use_input=False)]
    built.train()
    y = wanted[0].argmax(1).clone()
    y[:6] = (y[:6] + 1) % 3
    got = pathway_accuracies(built, x, y, batch_size=7)
    assert got == PathwayAccuracies(*((logits.argmax(1) == y).double().mean().item() for logits in wanted))
    assert got.full == pytest.approx(0.8) and built.training
    with pytest.raises(ValueError, match=r"expected one label for each of 30 inputs, found \(29,\)"):
        pathway_accuracies(built, x, y[1:])
