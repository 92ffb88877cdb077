"""The classifier: its pathways, what training reads, and what forgetting leaves."""

from __future__ import annotations

import pytest
import torch
from classifiers import CLASSES, SIZE, filled, images, labels, model, train
from gradients import assert_gradient_everywhere
from stores import seeded
from torch import Tensor
from torch.nn import functional as F

from munkey import KeyMemoryTransformer, Projection, Retrieved, fit_values
from munkey.search import Neighbours, Searchable, exact

AGGREGATIONS = ["attend", "ensemble", "softmax", "rank"]


def by_hand(built: KeyMemoryTransformer, x: Tensor, values: Tensor) -> Tensor:
    """Logits `(n,)` of one image beside one value `(V,)`, or several `(k, V)`, token by token."""
    net = built.readout.network
    sequence = torch.cat([net.start[None], net.tokens(x[None])[0], net.exemplar(values.reshape(-1, 4))])[None]
    for block in net.blocks:
        sequence = sequence + block.attention(block.attention_norm(sequence))  # type: ignore[operator]
        sequence = sequence + block.mlp(block.mlp_norm(sequence))  # type: ignore[operator]
    return net.head(net.norm(sequence[0, 0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_transformer_that_attends_reads_all_neighbours_in_one_pass(depth: int) -> None:
    built = filled(aggregation="attend", depth=depth)
    x, rows = images(4, seed=1), []
    found = built.memory(built.key_encoder(x), 4)
    for b in range(4):
        rows.append(by_hand(built, x[b], found.tokens[b]))
        torch.testing.assert_close(by_hand(built, x[b], found.tokens[b].flip(0)), rows[-1])
    torch.testing.assert_close(built(x), torch.stack(rows))
    one, other = filled(aggregation="attend", neighbours=1), filled(neighbours=1)
    torch.testing.assert_close(one(x).log_softmax(1), other(x))


def test_the_ensemble_is_the_mean_of_one_run_for_each_neighbour() -> None:
    built = filled()
    x = images(4, seed=1)
    got = built(x)
    found = built.memory(built.key_encoder(x), built.readout.neighbours)
    for b in range(4):
        runs = torch.stack([by_hand(built, x[b], found.tokens[b, j]) for j in range(built.readout.neighbours)])
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
    assert not torch.equal(built(x), left_out)
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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_reaches_every_parameter(aggregation: str) -> None:
    shares = {"own_token_probability": 0.0, "drop_input": 0.3, "drop_exemplar": 0.3}
    built = filled(aggregation=aggregation, stop_gradient=False, **shares)
    built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
    x, y = images(12), labels(12)
    for seed in range(3):  # either pathway is dropped now and then
        built.loss(x, y, ids=range(12), generator=seeded(seed)).backward()
    assert_gradient_everywhere(built, above=1e-9)


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
    settings = {"drop_input": 0.0, "drop_exemplar": 0.0, "own_token_probability": 0.0, "stop_gradient": False}
    built = filled(aggregation=aggregation, **settings)
    built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
    x, y, store = images(12), labels(12), built.memory.store
    built.loss(x[[2]], y[[2]], ids=[2], generator=seeded()).backward()
    assert store.values.grad is not None
    touched = store.values.grad.abs().sum(1).nonzero().squeeze(1)
    near = built.memory.neighbours(built.key_encoder(x[[2]]), 4, exclude_ids=[2]).rows[0]
    assert int(store.rows_of([2])) not in touched.tolist() and set(touched.tolist()) <= set(near.tolist())
    assert len(touched) == (1 if aggregation == "ensemble" else 4)


def test_training_mixes_by_the_scores_that_the_search_found() -> None:
    built = filled(aggregation="softmax", drop_input=0.0, drop_exemplar=0.0, own_token_probability=0.0)
    seen: list[Tensor] = []

    def euclidean(store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        found = exact(store, queries, store.used - 1, exclude_ids=exclude_ids)
        best = (-torch.linalg.vector_norm(store.keys[found.rows] - queries[:, None], dim=2)).topk(k)
        ids, rows = (numbers.gather(1, best.indices) for numbers in (found.ids, found.rows))
        return Neighbours(ids, rows, best.values, found.candidates)

    def spy(found: Retrieved, uniform: Tensor) -> Tensor:
        seen.append(found.scores)
        return one(found, uniform)

    built.memory.search, one = euclidean, built.readout.aggregation.one
    built.readout.aggregation.one = spy  # type: ignore[method-assign]
    built.loss(images(12)[:3], labels(12)[:3], ids=[0, 1, 2], generator=seeded()).backward()
    keys = built.memory.store.keys[:12]
    distances = torch.cdist(keys[:3], keys)
    distances[torch.arange(3), torch.arange(3)] = torch.inf
    torch.testing.assert_close(seen[0], -distances.topk(4, largest=False).values.double())
    assert (
        built.readout.aggregation.log_temperature.grad is not None
        and built.readout.aggregation.log_temperature.grad != 0
    )


def test_every_view_is_trained_with_every_neighbour() -> None:
    built = filled(own_token_probability=0.0, drop_exemplar=0.0)
    store = built.memory.store
    store.forget(range(12))
    keys = torch.eye(5)[:3].repeat_interleave(2, 0).view(3, 2, 5) + 0.01 * torch.randn(3, 2, 5, generator=seeded())
    store.add([0, 1, 2], keys)
    seen: set[tuple[int, int]] = set()
    rows_of, read = store.one_row_of_each, built.memory.read

    def spy(rows: Tensor, **settings: bool) -> Tensor:
        if int(rows) >= 0:  # its own value is not read
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


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_loss_of_an_instance_has_a_gradient_at_a_value_of_another(
    aggregation: str, sparse: bool, share: float
) -> None:
    settings = {"own_token_probability": share, "drop_input": 0.0, "drop_exemplar": 0.0, "sparse": sparse}
    built = filled(aggregation=aggregation, **settings)
    built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
    x, y, store = images(12), labels(12), built.memory.store
    read_own = 0
    for seed in range(8):
        store.values.grad = None
        loss = built.loss(x[[2]], y[[2]], ids=[2], generator=seeded(seed))
        loss.backward()
        grad = store.values.grad
        touched = [] if grad is None else grad.to_dense().abs().sum(1).nonzero().squeeze(1).tolist()
        assert touched in ([], store.rows_of([2]).tolist())
        held = [] if grad is None or not sparse else grad.coalesce().indices()[0].tolist()
        assert set(held) <= set(store.rows_of([2]).tolist())  # a sparse optimiser changes every row that is held
        read_own += bool(touched)
    assert read_own == 0 if share == 0 else 0 < read_own < 8


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sparse_gradient_holds_the_rows_that_were_used(aggregation: str) -> None:
    for dropped in (0.0, 1.0):
        for share in (0.0, 1.0):
            settings = {"drop_input": 0.0, "drop_exemplar": dropped, "own_token_probability": share, "sparse": True}
            built = filled(aggregation=aggregation, stop_gradient=False, **settings)
            built.attach(torch.optim.SGD([built.memory.store.values], lr=0.1))
            built.loss(images(12)[[2]], labels(12)[[2]], ids=[2], generator=seeded()).backward()
            grad = built.memory.store.values.grad
            rows = 0 if grad is None else len(grad.coalesce().indices()[0].unique())
            assert rows == (0 if dropped else 4 if aggregation != "ensemble" and not share else 1)


def test_how_often_a_pathway_is_dropped() -> None:
    built = filled(400, drop_input=0.3, drop_exemplar=0.2, own_token_probability=1.0)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = built.readout.network.forward

    def spy(inputs: Tensor, values: Tensor, there: Tensor | None) -> Tensor:
        seen.append((inputs, values))
        return forward(inputs, values, there)

    built.readout.network.forward = spy  # type: ignore[method-assign]
    built.loss(images(400), labels(400), ids=range(400), generator=seeded())
    hidden = (seen[0][0] == built.readout.network.null_input).all(2).all(1)
    alone = (seen[0][1] == built.memory.null).flatten(1).all(1)
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
    undecayed = {"readout.network.start", "readout.network.null_input", "memory.null", "readout.network.norm.weight"}
    assert undecayed <= {names[id(weight)] for weight in plain["params"]}


# --- forgetting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_outputs_after_forgetting_are_those_of_the_same_weights_beside_a_memory_without(aggregation: str) -> None:
    built = filled(aggregation=aggregation)
    train(built, list(range(12)))
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


def test_what_a_paper_model_remembers_after_training_does_not_make_it_worse() -> None:
    """Labels that a key tells: with a writer, new rows vote for their labels at once; without, after a fit."""
    x = images(300)
    y, seen, late, fresh = x.flatten(1)[:, :CLASSES].argmax(1), slice(0, 60), slice(60, 240), slice(240, 300)
    found = []
    for writer in (False, True):
        encoder = Projection(torch.zeros(48), torch.eye(48)[:, :5], fitted_on="nothing")
        built = KeyMemoryTransformer.for_images(
            size=SIZE, classes=CLASSES, key_encoder=encoder, mode="paper", writer=writer, width=16, value_width=8
        )
        built.remember(range(60), x[seen], y[seen])
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
        built.attach(optimizer)
        for step in range(150):
            optimizer.zero_grad()
            built.loss(x[seen], y[seen], ids=range(60), generator=seeded(step)).backward()
            optimizer.step()
        for more in (False, True):
            if more:
                built.remember(range(60, 240), x[late], y[late])
            found.append(right(built, x[fresh], y[fresh]))
        if not writer:
            fit_values(built, range(60, 240), x[late], y[late])
            found.append(right(built, x[fresh], y[fresh]))
    (before, worse, fitted), (start, better) = found[:3], found[3:]
    assert worse < before - 0.05 and fitted > before - 0.02 and better > start - 0.02 and better > worse + 0.15


@torch.no_grad()
def right(built: KeyMemoryTransformer, x: Tensor, y: Tensor) -> float:
    """Share of right answers by the memory pathway."""
    return float((built.eval()(x, use_input=False).argmax(1) == y).double().mean())
