"""Each follower of a table alone, with a change: afterwards it is what one would be that is made of the rows anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import SECRET, WIDTHS, Holder, keys_of, seeded
from torch import Tensor, nn

from munkey import Classification, KeyStore
from munkey.readout import UnitFeatures
from munkey.readout.linear import LabelledFeatures
from munkey.search.exact import Neighbours, nearest
from munkey.search.screen import Screen
from munkey.sharded.shared_neighbours import SharedNeighbours
from munkey.store.averages import AverageRows
from munkey.store.change import Added, Change, Moved, Removed, Replaced
from munkey.store.codes import Codes
from munkey.store.digest import MODULUS, Digest, hash_rows, sum_of
from munkey.store.erase import Scratch
from munkey.store.file.disk import Disk
from munkey.store.file.layout import Layout
from munkey.store.file.live import StoreFile
from munkey.store.file.records import pieces
from munkey.store.follower import Follower, commit
from munkey.store.gradients import GradientRows
from munkey.store.index import Index
from munkey.store.log import LoggedRows, ReceiptLog, row_tokens, verify
from munkey.store.neighbours import NeighbourTables
from munkey.store.optimizers import OptimizerRows
from munkey.store.receipts import Receipt
from munkey.store.schema import COLUMNS, Rows, columns_of
from munkey.store.sums import RowSums
from munkey.store.table import Table
from treediff import EMA


def rows_of(ids: Sequence[int], views: int = 2) -> Rows:
    count = len(ids) * views
    owners = torch.tensor(ids, dtype=torch.int64).repeat_interleave(views)
    return Rows(
        owners,
        torch.arange(views).repeat(len(ids)),
        owners.abs() % 5,
        torch.zeros(count, dtype=torch.bool),
        keys_of(list(ids), views).flatten(0, 1),
        torch.randn(count, WIDTHS[1], generator=seeded(len(ids))),
    )


def filled(table: Table, rows: Rows) -> None:
    """Put rows into a table without anybody who follows."""
    room = table.more_room(len(rows.ids))
    for change in (room, None):
        if change is not None:
            commit(change, [table], lambda _: None)
    commit(staged(table, rows), [table], lambda _: None)


def staged(table: Table, rows: Rows) -> Added:
    def write(columns: Sequence[Tensor]) -> None:
        for column, new in zip(columns, rows, strict=True):
            column.copy_(new)

    return table.stage(write, len(rows.ids))


def removed(table: Table, ids: Sequence[int]) -> Removed:
    where = torch.isin(table["ids"][: table.used], torch.tensor(ids)).nonzero().squeeze(1).tolist()
    return Removed.of(ids, where, table.used)


IDS = [5, -3, 9, 2**40, 7, 11, 0, 4]
CHANGES: dict[str, Callable[[Table], Change]] = {
    "add": lambda table: staged(table, rows_of([100, 101, 102])),
    "remove from the middle": lambda table: removed(table, [-3, 0]),
    "remove the last": lambda table: removed(table, [4]),
    "remove all": lambda table: removed(table, IDS),
    "remove none": lambda table: removed(table, []),
    "sort": lambda table: Moved(table.used, table.used, table.order()),
    "grow": lambda table: Moved(table.used, 64),
    "replace": lambda table: Replaced(tuple(rows_of([70, 71, 5]))),
}
each_change = pytest.mark.parametrize("name", CHANGES)


@pytest.fixture
def table() -> Table:
    made = Table(columns_of(*WIDTHS, torch.get_default_dtype()))
    filled(made, rows_of(IDS))
    commit(Moved(made.used, 30), [made], lambda _: None)
    return made


def follow(name: str, table: Table, *followers: Follower) -> Change:
    change = CHANGES[name](table)
    commit(change, [table, *followers], lambda _: None)
    return change


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_of_any_kind_are_erased(dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool) -> None:
    change = Removed.of([], [2, 7, 3], 8)
    rows = torch.randn(10, *shape, generator=seeded(3)).mul(9).to(dtype)
    if not contiguous:
        rows = rows.repeat_interleave(2, 0)[::2]
    expected = torch.cat([rows[[0, 1, 5, 6, 4]], torch.zeros_like(rows[:3]), rows[8:]])
    with Scratch() as scratch:
        step = change.erase(rows, scratch)
        step()
        step()  # as after an interruption
    assert torch.equal(rows, expected)


@each_change
def test_the_table(name: str, table: Table) -> None:
    before = {(int(i), int(v)): rest for i, v, *rest in zip(*(c.tolist() for c in table.rows), strict=True)}
    values = table.values
    follow(name, table)
    after = {(int(i), int(v)): rest for i, v, *rest in zip(*(c.tolist() for c in table.rows), strict=True)}
    gone = {"remove from the middle": [-3, 0], "remove the last": [4], "remove all": IDS}.get(name, [])
    if name == "replace":
        assert {one for one, _ in after} == {70, 71, 5}
    else:
        new = {place for place in after if place[0] in (100, 101, 102)} if name == "add" else set()
        assert after.keys() - new == {place for place in before if place[0] not in gone}
        assert all(after[place] == before[place] for place in after.keys() - new)
    assert table.values is values and not any(column[table.used :].any() for column in table.columns)
    assert name != "sort" or torch.equal(table.order(), torch.arange(table.used))
    assert len({len(column) for column in table.columns}) == 1


@each_change
def test_the_index(name: str, table: Table) -> None:
    index = Index(table)
    commit(Moved(table.used, 30, torch.arange(table.used)), [table, index], lambda _: None)  # reads all rows
    follow(name, table, index)
    owners = table["ids"][: table.used].tolist()
    assert sorted(index) == sorted(set(owners)) and len(index) == len(set(owners))
    for one in index:
        rows = index.of(one)
        assert [owners[row] for row in rows] == [one] * len(rows)
        assert table["views"][rows].tolist() == list(range(len(rows)))


@each_change
def test_the_digest(name: str, table: Table) -> None:
    digest = Digest(table, SECRET)
    digest.total()
    change = CHANGES[name](table)
    said = digest.total_after(change) if isinstance(change, Removed) else None
    said = digest.total_with(change) if isinstance(change, Added) else said
    commit(change, [table, digest], lambda _: None)
    fresh = hash_rows(SECRET, table.columns, slice(0, table.used))
    assert digest.known == (not isinstance(change, Replaced))
    assert digest.total() == sum_of(fresh) and torch.equal(digest.hashes(), fresh)
    assert said in (None, sum_of(fresh))
    assert sum_of(fresh) == sum(int.from_bytes(bytes(row), "little") for row in fresh.tolist()) % MODULUS


def test_a_digest_of_many_new_rows_waits_until_it_is_needed(table: Table) -> None:
    for eager in (False, True):
        digest = Digest(table, SECRET)
        digest.eager = eager
        digest.total()
        change = table.more_room(60)
        commit(change or Moved(table.used, table.room), [table, digest], lambda _: None)
        ids = list(range(1000 + 100 * eager, 1000 + 100 * eager + 30))
        commit(staged(table, rows_of(ids)), [table, digest], lambda _: None)
        assert digest.known == eager
    assert digest.total() == sum_of(hash_rows(SECRET, table.columns, slice(0, table.used)))


@each_change
def test_the_codes(name: str, table: Table) -> None:
    codes = Codes(table)
    codes.get()
    follow(name, table, codes)
    fresh = Screen.of(table["keys"][: table.used])
    assert all(torch.equal(one, other) for one, other in zip(codes.get().columns, fresh.columns, strict=True))


def state_of(rows: Tensor) -> Tensor:
    """A number of its own for each row, that can be told from its key."""
    return rows.sum(1, keepdim=True).mul(7).expand(-1, WIDTHS[1]).contiguous()


def check_state(kept: Tensor, table: Table) -> None:
    torch.testing.assert_close(kept[: table.used], state_of(table["keys"])[: table.used], rtol=0, atol=0)
    assert not kept[table.used :].any() and len(kept) == table.room


@each_change
def test_an_optimizer(name: str, table: Table) -> None:
    optimizer = torch.optim.Adam([table.values])
    optimizer.state[table.values] = {"step": torch.tensor(3.0), "exp_avg": state_of(table["keys"])}
    follower = OptimizerRows(table, optimizer, lambda: None)
    if name == "replace":
        with pytest.raises(ValueError, match="an optimiser follows the present rows"):
            follow(name, table, follower)
        return
    follow(name, table, follower)
    kept = optimizer.state[table.values]["exp_avg"]
    if name == "add":
        assert not kept[len(IDS) * 2 : table.used].any(), "a new row has no moments"
        kept[len(IDS) * 2 : table.used] = state_of(table["keys"])[len(IDS) * 2 : table.used]
    check_state(kept, table)


@each_change
def test_an_average(name: str, table: Table) -> None:
    model = nn.Module()
    model.register_parameter("values", table.values)
    ema = EMA(model)
    ema.weights["values"] = state_of(table["keys"])
    follower = AverageRows(table, ema)
    if name == "replace":
        with pytest.raises(ValueError, match="an average follows the present rows"):
            follow(name, table, follower)
        return
    follow(name, table, follower)
    kept = ema.weights["values"]
    if name == "add":
        new = slice(len(IDS) * 2, table.used)
        assert torch.equal(kept[new], table["values"][new]), "the average of a new value is the value"
        kept[new] = state_of(table["keys"])[new]
    check_state(kept, table)


@each_change
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient(name: str, sparse: bool, table: Table) -> None:
    grad = state_of(table["keys"])
    if sparse:
        rows = torch.arange(table.used)
        grad = torch.sparse_coo_tensor(rows[None], grad[: table.used], grad.shape, check_invariants=True)
    table.values.grad = grad
    follow(name, table, GradientRows(table))
    found = table.values.grad
    if name == "replace":
        assert found is None
        return
    assert found is not None
    dense = found.to_dense() if sparse else found
    if name == "add":
        dense = dense.clone()
        dense[len(IDS) * 2 : table.used] = state_of(table["keys"])[len(IDS) * 2 : table.used]
    check_state(dense, table)


@each_change
def test_tables_of_neighbours(name: str, table: Table) -> None:
    tables = NeighbourTables()

    def find(rows: Tensor) -> Neighbours:
        keys, ids, views = (table[column][: table.used] for column in ("keys", "ids", "views"))
        return nearest(keys[rows], keys, ids, 3, views=views, exclude_ids=ids[rows])

    every = torch.arange(table.used)
    tables.get(nearest, 3, every, table.used, find)
    old = [scores for _, scores in tables.tables.values()]
    follow(name, table, tables)
    assert len(old) == 1 and not old[0].any(), "scores of removed rows are overwritten"
    every = torch.arange(table.used)
    asked: list[int] = []

    def counted(rows: Tensor) -> Neighbours:
        asked.extend(rows.tolist())
        return find(rows)

    found, scores = tables.get(nearest, 3, every, table.used, counted)
    assert torch.equal(found, find(every).rows) if len(every) else not len(found)
    assert torch.equal(scores, find(every).scores) if len(every) else not len(scores)
    if name.startswith("remove"):
        assert len(asked) < len(every) or not len(every), "rows whose neighbours stay are not looked up again"


RECEIPT = Receipt((1,), (), 1, 1, "a", "b", 0.0)


@each_change
def test_sums(name: str, table: Table) -> None:
    summand = LabelledFeatures(UnitFeatures(WIDTHS[0]), Classification(6))
    sums = RowSums(table, summand)
    sums.get()
    follow(name, table, sums)
    assert torch.equal(sums.get(), RowSums(table, summand).get())


@each_change
def test_a_log(name: str, table: Table, tmp_path: Path) -> None:
    digest = Digest(table, SECRET)
    with ReceiptLog(tmp_path / "log", SECRET, new=True) as log:
        follower = LoggedRows(table, digest, log)
        change = CHANGES[name](table)
        if isinstance(change, Removed):
            change = replace(change, receipt=RECEIPT)
            tokens = row_tokens(table, SECRET, change.gone)
        commit(change, [table, follower, digest], lambda _: None)
        follower.confirm(change)
        events = verify(tmp_path / "log", secret=SECRET).events
        if isinstance(change, Removed) and len(change.gone):
            assert [event["kind"] for event in events] == ["forgot"] and events[0]["tokens"] == sorted(tokens)
            assert log.gone == set(tokens) and follower.known(rows_of(IDS)) == sorted(change.ids)
        else:
            assert events == ()


@each_change
def test_a_file(name: str, table: Table, tmp_path: Path) -> None:
    digest, disk = Digest(table, SECRET), Disk()
    schema = columns_of(*WIDTHS, torch.float32)
    shapes, dtypes = tuple(column.shape for column in schema), tuple(column.dtype for column in schema)
    layout = Layout({"seed": 0, "scale": 0.0, "trained": True}, COLUMNS, shapes, dtypes, table.used, SECRET)
    live = StoreFile.create(str(tmp_path / "store"), layout, pieces(table.rows, digest.hashes()), disk)
    live.follow(table, digest)
    follow(name, table, live, digest)
    live.verify()
    assert live.state.count == table.used and live.state.total == digest.total()
    live.close()
    again = StoreFile.open(str(tmp_path / "store"), disk)
    columns = [torch.zeros(table.used, *column.shape, dtype=column.dtype) for column in schema]
    assert torch.equal(again.load(columns), digest.hashes())
    assert all(torch.equal(one, other) for one, other in zip(columns, table.rows, strict=True))
    again.close()


def test_what_a_store_puts_together_is_what_its_followers_are() -> None:
    store = KeyStore(*WIDTHS, secret=SECRET)
    store.add(range(4), keys_of([0, 1, 2, 3]))
    store.attach(torch.optim.SGD([store.values], lr=0.1), EMA(Holder(store)))
    store.sums(LabelledFeatures(UnitFeatures(WIDTHS[0]), Classification(6)))
    kinds = [type(part).__name__ for part in store._parts]
    assert kinds == [
        "Table",
        "Index",
        "Digest",
        "Codes",
        "GradientRows",
        "NeighbourTables",
        "RowSums",
        "OptimizerRows",
        "AverageRows",
    ]


def test_scores_of_ranks_are_overwritten_after_a_change() -> None:
    tables = SharedNeighbours()
    near, scores, unknown = tables.get(2, torch.arange(3), 3)
    assert unknown.tolist() == [0, 1, 2]
    near[:], scores[:] = 0, 7.0
    tables.clear()
    assert not scores.any()
    assert len(tables.get(2, torch.arange(3), 3)[2]) == 3, "searched again"
