"""Networks of other libraries as encoders: what is read of their results, in which precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from munkey import ModuleEncoder


class Tokens(nn.Module):
    """A network of tokens whose result is an object, as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embed(ids))


def test_features_are_chosen_from_a_result() -> None:
    network, ids = Tokens(), torch.tensor([[3, 1, 2], [0, 8, 8]])
    first = ModuleEncoder(network, 4, fitted_on="other data", features=lambda found: found.last_hidden_state[:, 0])
    assert torch.equal(first(ids), network.embed(ids[:, 0])) and torch.equal(first.keys(ids), first(ids))
    with pytest.raises(TypeError, match="the module returned a SimpleNamespace, expected a tensor; pass features="):
        ModuleEncoder(network, 12, fitted_on="other data")(ids)


def test_a_lower_precision_is_that_of_the_module_alone() -> None:
    linear, x = nn.Linear(64, 5), torch.randn(7, 64)
    low = ModuleEncoder(linear, 5, fitted_on="other data", autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(x).float().detach()
    assert low(x).dtype == torch.float32 and torch.equal(low(x), expected)
    full = ModuleEncoder(linear, 5, fitted_on="other data")
    assert not torch.equal(full(x), expected) and full.fingerprint() != low.fingerprint()


def test_a_network_of_timm() -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    network = timm.create_model("resnet18", num_classes=0)
    assert ModuleEncoder(network, 512, fitted_on="other data")(torch.rand(1, 3, 32, 32)).shape == (1, 512)


def test_a_network_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    network = models.resnet18()
    network.fc = nn.Identity()
    assert ModuleEncoder(network, 512, fitted_on="other data")(torch.rand(1, 3, 32, 32)).shape == (1, 512)


def test_a_network_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    network = transformers.BertModel(config)
    encoder = ModuleEncoder(network, 8, fitted_on="other data", features=lambda found: found.last_hidden_state.mean(1))
    assert encoder(torch.tensor([[1, 5, 2]])).shape == (1, 8)
