"""The classifier: its pathways, what training reads, and what forgetting leaves."""

from __future__ import annotations

import re

import pytest
import torch
from classifiers import CLASSES, SIZE, encoder, filled, images, labels, model, train
from stores import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from munkey import (
    ExemplarTransformer,
    KeyMemoryTransformer,
    KeyStore,
    KeyValueMemory,
    ModuleEncoder,
    Projection,
    ValueWriter,
)
from munkey.transformer import TransformerBlock, VectorTokens

AGGREGATIONS = ["ensemble", "softmax", "rank"]


def by_hand(built: KeyMemoryTransformer, x: Tensor, values: Tensor) -> Tensor:
    """Logits `(n,)` of one image beside one value, token by token."""
    net = built.network
    sequence = torch.cat([net.start[None], net.tokens(x[None])[0], net.exemplar(values)[None]])[None]
    for block in net.blocks:
        sequence = sequence + block.attention(block.attention_norm(sequence))  # type: ignore[operator]
        sequence = sequence + block.mlp(block.mlp_norm(sequence))  # type: ignore[operator]
    return net.head(net.norm(sequence[0, 0]))  # type: ignore[no-any-return]


def test_the_ensemble_is_the_mean_of_one_run_for_each_neighbour() -> None:
    built = filled()
    x = images(4, seed=1)
    got = built(x)
    found = built.memory(built.key_encoder(x), built.neighbours)
    for b in range(4):
        runs = torch.stack([by_hand(built, x[b], found.tokens[b, j]) for j in range(built.neighbours)])
        torch.testing.assert_close(got[b], runs.softmax(1).mean(0).log())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fewer_neighbours_down_to_none(aggregation: str) -> None:
    built = filled(aggregation=aggregation)
    x = images(3, seed=1)
    built.forget(range(10))
    found = built.memory(built.key_encoder(x), 4)
    assert (found.ids >= 0).sum(1).tolist() == [2, 2, 2]
    assert built(x).isfinite().all()
    built.forget([10, 11])
    # With nothing left, all aggregations are the null token's prediction.
    torch.testing.assert_close(built(x).log_softmax(1), built(x, use_memory=False).log_softmax(1))


def test_pathways() -> None:
    built = filled()
    x, other = images(3, seed=1), images(3, seed=2)
    assert not torch.equal(built(x, use_input=False), built(other, use_input=False))  # by what they retrieve
    assert not torch.equal(built(x, use_memory=False), built(other, use_memory=False))
    alone = built(x, use_memory=False)
    built.forget([0, 5])
    assert torch.equal(alone, built(x, use_memory=False))
    for b in range(3):
        torch.testing.assert_close(alone[b], by_hand(built, x[b], built.memory.null))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_number_is_an_id(aggregation: str) -> None:
    x, found = images(12), []
    for shift in (0, -6, 2**40):
        built = model(aggregation=aggregation)
        built.remember([i + shift for i in range(12)], x, labels(12), keys=None)
        store = built.memory.store
        with torch.no_grad():  # values depend on the id
            store.values[:12] = torch.randn(12, 4, generator=seeded())
        found.append(built(images(5, seed=1)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_excluded_rows_do_not_answer() -> None:
    built = filled()
    x = images(12)[[3]]
    left_out = built(x, exclude_ids=[3])
    assert not torch.allclose(built(x), left_out)
    built.forget([3])
    assert torch.equal(built(x), left_out)


def test_keys_that_are_at_hand_are_not_made_again() -> None:
    built, other = filled(), model()
    x = images(12)
    keys = built.key_encoder.keys(x)
    other.remember(range(12), x, labels(12), keys=keys)
    assert built.memory.store.digest() == other.memory.store.digest()
    assert torch.equal(built(x), built(x, keys=built.key_encoder(x)))
    assert not torch.equal(built(x), built(x, keys=keys.flip(0)))


# --- training -------------------------------------------------------------------------------------------------


def test_with_its_own_value_an_instance_trains_that_row_alone() -> None:
    built = filled(drop_input=0.0, drop_exemplar=0.0)
    built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
    x, y = images(12), labels(12)
    loss = built.loss(x[[2, 7]], y[[2, 7]], ids=[2, 7])
    own = built.memory.store.get([2, 7]).values
    expected = F.cross_entropy(torch.stack([by_hand(built, x[i], own[j]) for j, i in enumerate((2, 7))]), y[[2, 7]])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    grad = built.memory.store.values.grad
    assert grad is not None
    touched = grad.abs().sum(1).nonzero().squeeze(1)
    assert sorted(touched.tolist()) == sorted(built.memory.store.rows_of([2, 7]).tolist())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_with_its_neighbours_values_an_instance_never_reads_its_own(aggregation: str) -> None:
    settings = {"drop_input": 0.0, "drop_exemplar": 0.0, "own_token_probability": 0.0}
    built = filled(aggregation=aggregation, **settings)
    built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
    x, y, store = images(12), labels(12), built.memory.store
    built.loss(x[[2]], y[[2]], ids=[2], generator=seeded()).backward()
    assert store.values.grad is not None
    touched = store.values.grad.abs().sum(1).nonzero().squeeze(1)
    near = built.memory.neighbours(built.key_encoder(x[[2]]), 4, exclude_ids=[2]).rows[0]
    assert int(store.rows_of([2])) not in touched.tolist() and set(touched.tolist()) <= set(near.tolist())
    assert len(touched) == (1 if aggregation == "ensemble" else 4)


def test_every_view_is_trained_with_every_neighbour() -> None:
    built = filled(own_token_probability=0.0, drop_exemplar=0.0)
    store = built.memory.store
    store.forget(range(12))
    keys = torch.eye(5)[:3].repeat_interleave(2, 0).view(3, 2, 5) + 0.01 * torch.randn(3, 2, 5, generator=seeded())
    store.add([0, 1, 2], keys)
    seen: set[tuple[int, int]] = set()
    rows_of, read = store.one_row_of_each, built.memory.read

    def spy(rows: Tensor, **settings: bool) -> Tensor:
        seen.add((asked[-1], int(rows)))
        return read(rows, **settings)

    asked: list[int] = []

    def one(ids: list[int], uniform: Tensor) -> Tensor:
        rows = rows_of(ids, uniform)
        asked.append(int(rows))
        return rows

    built.memory.read, store.one_row_of_each = spy, one  # type: ignore[method-assign,assignment]
    for step in range(150):
        built.loss(images(1), labels(1), ids=[0], generator=seeded(step))
    assert len(seen) == 8  # two views, four neighbours


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sparse_gradient_holds_the_rows_that_were_used(aggregation: str) -> None:
    for dropped in (0.0, 1.0):
        for share in (0.0, 1.0):
            settings = {"drop_input": 0.0, "drop_exemplar": dropped, "own_token_probability": share, "sparse": True}
            built = filled(aggregation=aggregation, **settings)
            built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
            built.loss(images(12)[[2]], labels(12)[[2]], ids=[2], generator=seeded()).backward()
            grad = built.memory.store.values.grad
            rows = 0 if grad is None else len(grad.coalesce().indices()[0].unique())
            assert rows == (0 if dropped else 4 if aggregation != "ensemble" and not share else 1)


def test_how_often_a_pathway_is_dropped() -> None:
    built = filled(400, drop_input=0.3, drop_exemplar=0.2, own_token_probability=1.0)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = built.network.forward

    def spy(inputs: Tensor, values: Tensor) -> Tensor:
        seen.append((inputs, values))
        return forward(inputs, values)

    built.network.forward = spy  # type: ignore[method-assign]
    built.loss(images(400), labels(400), ids=range(400), generator=seeded())
    hidden = (seen[0][0] == built.network.null_input).all(2).all(1)
    alone = (seen[0][1] == built.memory.null).all(2).squeeze(1)
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert alone.float().mean().item() == pytest.approx(0.2, abs=0.06)
    assert not (hidden & alone).any()


def test_the_same_generator_gives_the_same_loss_and_sparse_gradients_are_the_same() -> None:
    x, y = images(12), labels(12)
    for share in (0.5, 1.0):
        found = []
        for sparse in (False, True):
            built = filled(own_token_probability=share, sparse=sparse)
            built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
            loss = built.loss(x, y, ids=range(12), generator=seeded(3))
            loss.backward()
            grad = built.memory.store.values.grad
            assert grad is not None and grad.is_sparse == sparse
            found.append((loss, grad.to_dense() if sparse else grad))
        torch.testing.assert_close(found[0], found[1])


def test_it_learns_labels_that_only_the_memory_can_tell() -> None:
    # Twelve images whose labels are chance, and an input that is always hidden: only values can hold them.
    built = filled(drop_input=1.0, drop_exemplar=0.0, neighbours=1)
    train(built, list(range(12)), steps=120)
    with torch.no_grad():
        assert (built(images(12), use_input=False).argmax(1) == labels(12)).all()
        built.forget([4, 5])
        kept = [i for i in range(12) if i not in (4, 5)]
        assert (built(images(12)[kept], use_input=False).argmax(1) == labels(12)[kept]).all()


@pytest.mark.parametrize("settings", [{}, {"mode": "exact"}, {"aggregation": "rank"}])
def test_groups_hold_every_weight_once_and_decay_matrices_only(settings: dict[str, str]) -> None:
    built = model(**settings)
    decayed, plain = built.parameter_groups(0.1)
    names = {id(weight): name for name, weight in built.named_parameters()}
    found = sorted(names[id(weight)] for group in (decayed, plain) for weight in group["params"])
    trained = {name for name, weight in built.named_parameters() if weight.requires_grad}
    assert found == sorted(trained - {"memory.store.values"})
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(weight)].endswith(("weight", "position")) for weight in decayed["params"])
    undecayed = {"network.start", "network.null_input", "memory.null", "network.norm.weight"}
    assert undecayed <= {names[id(weight)] for weight in plain["params"]}


# --- forgetting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_outputs_after_forgetting_are_those_of_the_same_weights_beside_a_memory_without(aggregation: str) -> None:
    built = filled(aggregation=aggregation)
    optimizers = train(built, list(range(12)))
    gone = [0, 3, 11]
    receipt = built.forget(gone)
    assert receipt.forgotten == (0, 3, 11)
    kept = [i for i in range(12) if i not in gone]
    other = model(aggregation=aggregation)
    other.load_state_dict({k: v for k, v in built.state_dict().items() if "memory.store" not in k}, strict=False)
    rows = built.memory.store.get(list(reversed(kept)))
    other.memory.store.add(rows.ids, rows.keys, rows.labels, rows.values)
    x = images(20, seed=5)
    assert torch.equal(built(x), other(x))
    assert built.memory.store.digest() == other.memory.store.digest()
    assert optimizers


def test_in_exact_mode_a_model_that_forgot_is_one_that_never_saw() -> None:
    def trained() -> KeyMemoryTransformer:
        built = model(mode="exact")
        built.remember(range(8), images(12)[:8], labels(12)[:8], permanent=True)
        train(built, list(range(8)))
        return built.eval()

    x, y = images(12), labels(12)
    one, other = trained(), trained()
    one.remember([10, 8, 9], x[[10, 8, 9]], y[[10, 8, 9]])
    one.forget([8])
    one.remember([11], x[[11]], y[[11]])
    one.forget([10])
    other.remember([9], x[[9]], y[[9]])
    other.remember([11], x[[11]], y[[11]])
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    fresh = images(9, seed=4)
    assert torch.equal(one(fresh), other(fresh)) and not torch.equal(one(fresh), trained()(fresh))


# --- bad input ------------------------------------------------------------------------------------------------


def parts(**changes: object) -> dict[str, object]:
    built = model()
    return {"key_encoder": built.key_encoder, "memory": built.memory, "network": built.network, **changes}


def network(**changes: int) -> ExemplarTransformer:
    tokens = VectorTokens(3, 2, 8)
    widths = {"value_width": 4, "num_classes": 3, **changes}
    return ExemplarTransformer(tokens=tokens, blocks=[TransformerBlock(8, 2)], **widths)


def exact_parts(scale: float = 0.0, trained: bool = False, fitted_on: str = "other data") -> dict[str, object]:
    store = KeyStore(5, 4, scale=scale)
    store.values.requires_grad_(trained)
    module = ModuleEncoder(nn.Flatten(), 5, fitted_on=fitted_on)
    return parts(mode="exact", memory=KeyValueMemory(store, writer=ValueWriter(5, 4, 3)), key_encoder=module)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (parts(network=network(value_width=7)), ValueError, "the network reads values of width 7, the memory has 4"),
        (parts(neighbours=1.5), TypeError, "neighbours must be a whole number, found 1.5"),
        (parts(key_encoder=Projection.random((5,), 6)), ValueError, "gives keys of width 6, the memory has 5"),
        (parts(mode="both"), ValueError, "mode must be 'paper' or 'exact', found 'both'"),
        (parts(mode="exact"), ValueError, "exact mode needs a memory with a writer"),
        (
            exact_parts(scale=0.1),
            ValueError,
            "in exact mode values are written, not learned; make the store with scale=",
        ),
        (exact_parts(trained=True), ValueError, "in exact mode values are written, not learned"),
        (exact_parts(fitted_on="forgettable"), ValueError, "in exact mode the encoder must not have seen what can be"),
        (exact_parts() | {"own_token_probability": 0.5}, ValueError, "in exact mode own_token_probability is 0"),
        (parts(own_token_probability=1.5), ValueError, "own_token_probability must be between 0 and 1, found 1.5"),
        (parts(drop_input=-0.1), ValueError, "drop_input must be between 0 and 1, found -0.1"),
        (parts(drop_input=0.6, drop_exemplar=0.5), ValueError, "must add up to 1 at most, found 0.6 and 0.5"),
    ],
)
def test_bad_parts(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KeyMemoryTransformer(**settings)  # type: ignore[arg-type]


def test_bad_widths_of_a_network() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, found 0"):
        network(num_classes=0)
    with pytest.raises(TypeError, match=re.escape("value_width must be a whole number, found 1.5")):
        network(value_width=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of ensemble, softmax, rank; found 'mean'"),
        ({"wide": 3}, TypeError, "there are no settings wide; there are mode, width, depth"),
        ({"depth": 0}, ValueError, "depth must be at least 1, found 0"),
        ({"patch": 0}, ValueError, "patch must be at least 1, found 0"),
        ({"patch": 5}, ValueError, "patches must fill the image; 5 does not divide 8 and 6"),
        ({"width": 8, "heads": 3}, ValueError, "heads"),
    ],
)
def test_bad_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KeyMemoryTransformer.for_images(CLASSES, 1, SIZE, encoder(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(images(2)[:, :, :7]), ValueError, "expected images of shape (batch, 1, 8, 6), found (2, 1, 7, 6)"),
        (lambda m: m(images(2) * 255), ValueError, "images must lie in [0.0, 1.0], found values from"),
        (lambda m: m(images(2).tolist()), TypeError, "expected images as a tensor, found list"),
        (lambda m: m.remember([50], images(1) + torch.nan), ValueError, "images must be finite"),
        (lambda m: m.remember([0], images(1)), ValueError, "ids [0] are in the store already"),
        (lambda m: m.loss(images(1), labels(1), ids=[99]), KeyError, "ids [99] are not in the store"),
        (lambda m: m.loss(images(2), labels(2), ids=[1]), ValueError, "expected one id for each of 2 inputs, found 1"),
        (lambda m: m.loss(images(0), labels(0), ids=[]), ValueError, "a loss is the mean over instances; found none"),
        (lambda m: m.loss(images(1), torch.tensor([3]), ids=[1]), ValueError, "expected labels below 3, found 3"),
        (lambda m: m.remember([50], images(1), torch.tensor([7])), ValueError, "expected labels below 3, found 7"),
        (lambda m: m.forget([99]), KeyError, "ids [99] are not in the store; forget can pass over them with missing="),
    ],
)
def test_bad_calls_lose_nothing(call: object, error: type[Exception], message: str) -> None:
    built = filled()
    before = built.memory.store.digest()
    with pytest.raises(error, match=re.escape(message)):
        call(built)  # type: ignore[operator]
    assert built.memory.store.digest() == before


def test_exact_mode_goes_on_training_after_it_forgot() -> None:
    x, y, found = images(12), labels(12), []
    for extra in (False, True):
        built = model(mode="exact")
        if extra:
            built.remember([11], x[[11]], y[[11]])
        built.remember(range(8), x[:8], y[:8], permanent=True)
        if extra:
            built.forget([11])
        train(built, list(range(8)))
        if extra:
            built.remember([10], x[[10]], y[[10]])
            built.forget([10])
        train(built, list(range(8)))
        found.append(built.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_exact_mode_refuses() -> None:
    built = model(mode="exact")
    with pytest.raises(ValueError, match="in exact mode a value is written from key and label; pass labels"):
        built.remember([1], images(1))
    built.remember([1, 2], images(2), labels(2), permanent=True)
    built.loss(images(2), labels(2), ids=[1, 2])
    built.remember([3], images(1, seed=9), labels(1))
    built.train()
    with pytest.raises(ValueError, match="but the memory holds 1 rows that can be forgotten"):
        built(images(2))
    with torch.no_grad():
        built(images(2))
    built.eval()
    with pytest.raises(
        ValueError, match="but the memory holds 1 rows that can be forgotten; train first, on instances"
    ):
        built.loss(images(2), labels(2), ids=[1, 2])
    before = built.memory.store.digest()
    with pytest.raises(ValueError, match=r"ids \[2\] are there for good: weights were trained on them"):
        built.forget([3, 2])
    assert built.memory.store.digest() == before
    built.forget([3])
    built.loss(images(2), labels(2), ids=[1, 2])
