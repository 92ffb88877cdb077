"""The tensors of a store: rows that grow, are erased, sorted, saved and loaded, whatever is in them.

Letters: `M` rows in use, `R` rows there is room for, `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from munkey.checks import check_width
from munkey.holders import Holders, grown, reordered
from munkey.rows import Removal, RowIndex
from munkey.screen import Screen

__all__ = ["RowTable", "wipe_copies"]

_LEAST_ROOM = 16
_BUFFERS = ("ids", "views", "labels", "permanent", "keys")
_COLUMNS = (*_BUFFERS, "values")
_SCREEN = tuple(field.name for field in fields(Screen))


class RowTable(nn.Module):
    """Rows of id, view, label, whether they are there for good, key and value.

    The first `used` rows are in use, the rest is zero and there to grow into. Keys and labels are buffers, values a
    parameter, which stays the same one however the table changes. A state holds the rows in use by id and view.

    Args:
        key_width: `D`.
        value_width: `V`.
        device: where the table lives.
        dtype: of keys and values.

    Raises:
        TypeError: if a width is not whole.
        ValueError: if a width is below 1.

    Attributes:
        ids: `(R,)` int64.
        views: `(R,)` int64, the number of a row among those of its id.
        labels: `(R,)` int64, -1 for none.
        permanent: `(R,)` bool, whether a row can not be forgotten.
        keys: `(R, D)`.
        values: `(R, V)`.
        rounded, rounding, length, small, unit, small_rounding: what a fast first look at the keys needs, see
            `munkey.screen.Screen`; made of the keys and not saved.
    """

    any_rows = True  # a state of another number of rows fits
    ids: Tensor
    views: Tensor
    labels: Tensor
    permanent: Tensor
    keys: Tensor
    values: nn.Parameter
    rounded: Tensor
    rounding: Tensor
    length: Tensor
    small: Tensor
    unit: Tensor
    small_rounding: Tensor

    def __init__(
        self,
        key_width: int,
        value_width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_width(key_width=key_width, value_width=value_width)
        for name in ("ids", "views", "labels"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64, device=device))
        self.register_buffer("permanent", torch.zeros(0, dtype=torch.bool, device=device))
        self.register_buffer("keys", torch.zeros(0, key_width, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.zeros(0, value_width, device=device, dtype=dtype))
        screen = Screen.of(self.keys)
        for name, column in zip(_SCREEN, screen.columns, strict=True):
            self.register_buffer(name, column, persistent=False)
        self.used = 0
        self.index = RowIndex(self.ids, self.views)
        self.holders = Holders()

    @property
    def widths(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.keys.shape[1], self.values.shape[1]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All content, room included: ids, views, labels, permanent, keys, values."""
        return tuple(getattr(self, name).detach() for name in _COLUMNS)

    @property
    def screen(self) -> Screen:
        """The rows in use, for `munkey.retrieval.nearest`."""
        return Screen(*(getattr(self, name)[: self.used] for name in _SCREEN))

    def order(self) -> Tensor:
        """`(M,)` row numbers by id and view."""
        return _by_id_and_view(self.ids[: self.used], self.views[: self.used])

    # --- changing -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def append(self, *columns: Tensor) -> Tensor:
        """Write new rows, given like `columns`; the numbers they got."""
        self.holders.check_still()
        start, stop = self.used, self.used + len(columns[0])
        room = len(self.ids)
        if stop > room:
            room = max(_LEAST_ROOM, stop, room + room // 2)
            self._rebuild(partial(grown, room=room), lambda numbers: numbers)
        fitting = [new.to(column) for new, column in zip(columns, self.columns, strict=True)]
        for column, new in zip(self.columns, fitting, strict=True):
            column[start:stop] = new
        wipe_copies(fitting, columns)
        Screen(*(getattr(self, name)[start:stop] for name in _SCREEN)).write(self.keys[start:stop])
        self.index.add(self.ids[start:stop], self.views[start:stop], start)
        self.used = stop
        self.holders.added(self.values, slice(start, stop))
        return torch.arange(start, stop, device=self.ids.device)

    @torch.no_grad()
    def erase(self, ids: list[int], removal: Removal) -> None:
        """Overwrite the rows of some ids, here and in all that is attached."""
        self.holders.check_still()
        self.index.remove(ids)
        self.index.move(self.ids[removal.movers], self.views[removal.movers], removal.holes)
        for column in (*self.columns, *(getattr(self, name) for name in _SCREEN)):
            removal.erase(column)
        self.used = removal.after
        self.holders.erase(self.values, removal)

    def row_bytes(self) -> int:
        """How many bytes `erase` overwrites for each row that goes."""
        tensors = (*self.columns, *(getattr(self, name) for name in _SCREEN), *self.holders.rows(self.values))
        return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def compact(self) -> None:
        """Sort rows by id and view, and give back room that is not needed; what is attached follows.

        After it an optimiser's state fits the table as it is saved, which is in this order.

        Raises:
            ValueError: if an attached optimiser keeps something that mixes instances.
        """
        self.holders.check(self.values)
        order = self.order()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        self._rebuild(partial(reordered, order=order), lambda numbers: place[numbers])
        self.holders.moved = True
        self.index = RowIndex(self.ids, self.views)

    def _rebuild(self, make: Callable[[Tensor], Tensor], renumber: Callable[[Tensor], Tensor]) -> None:
        """Put other tensors in the place of all; those there were are wiped once all others are there."""
        self.holders.check_still()
        names = (*_BUFFERS, *_SCREEN)
        old = [getattr(self, name) for name in names]
        new = [make(tensor) for tensor in old]
        old += self.holders.rebuild(self.values, make, renumber)
        for name, tensor in zip(names, new, strict=True):
            setattr(self, name, tensor)
        for tensor in old:
            tensor.zero_()

    # --- state --------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        order = self.order()
        for name, column in zip(_COLUMNS, self.columns, strict=True):
            destination[prefix + name] = column[order]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = [prefix + name for name in _COLUMNS]
        missing = [name for name in known if name not in state_dict]
        missing_keys += missing
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in known]
        if missing:
            return
        found = {name: state_dict[prefix + name] for name in _COLUMNS}
        wrong = self._misfit(found)
        if wrong:
            error_msgs.append(f"rows of {prefix.rstrip('.') or 'a store'} do not fit: {wrong}")
        else:
            self._take(found)

    def _misfit(self, found: Mapping[str, Tensor]) -> str | None:
        """What is wrong with a state, if anything."""
        rows = len(found["ids"])
        shapes: dict[str, tuple[int, ...]] = {name: (rows,) for name in _BUFFERS[:-1]}
        shapes |= {"keys": (rows, self.widths[0]), "values": (rows, self.widths[1])}
        for name, shape in shapes.items():
            if tuple(found[name].shape) != shape:
                return f"expected {name} of shape {shape}, found {tuple(found[name].shape)}"
            if found[name].is_floating_point() != getattr(self, name).is_floating_point():
                return f"expected {name} like {getattr(self, name).dtype}, found {found[name].dtype}"
        order = _by_id_and_view(found["ids"], found["views"])
        ids, views = found["ids"][order], found["views"][order]
        first = torch.searchsorted(ids, ids)
        if not torch.equal(views, torch.arange(rows, device=ids.device) - first):
            return "the views of an id are not 0, 1, ... in some order"
        if not all(found[name].to(getattr(self, name)).isfinite().all() for name in ("keys", "values")):
            return "keys and values must be finite"
        if self.holders.followed(self.values):
            return "an optimiser or an average follows the present rows; load first, then attach, or detach it"
        return None

    @torch.no_grad()
    def _take(self, found: Mapping[str, Tensor]) -> None:
        """Have these rows and no others; the old ones are wiped."""
        self.values.grad = None
        self._rebuild(lambda old: old.new_zeros(0, *old.shape[1:]), lambda numbers: numbers)
        for name in _BUFFERS:
            setattr(self, name, found[name].to(getattr(self, name), copy=True))
        self.values.data = found["values"].detach().to(self.values.data, copy=True)
        self._look_again()
        self.used, self.holders.moved = len(self.ids), False
        self.index = RowIndex(self.ids, self.views)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = (*_COLUMNS, *_SCREEN)
        old = [getattr(self, name).detach() for name in names]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._look_again()  # another dtype of the keys is not another one of the screen
        new = [getattr(self, name).detach() for name in names]
        if any(was.data_ptr() != now.data_ptr() for was, now in zip(old, new, strict=True)):
            self.holders.changed()  # other digits may have other neighbours
        wipe_copies(old, new)
        return self

    def _look_again(self) -> None:
        screen = Screen.of(self.keys)
        for name, column in zip(_SCREEN, screen.columns, strict=True):
            getattr(self, name).zero_()
            setattr(self, name, column)

    def extra_repr(self) -> str:
        """Size and widths."""
        return (
            f"{len(self.index)} instances, {self.used} rows, key_width={self.widths[0]}, value_width={self.widths[1]}"
        )


def _by_id_and_view(ids: Tensor, views: Tensor) -> Tensor:
    by_view = views.argsort(stable=True)
    return by_view[ids[by_view].argsort(stable=True)]


def wipe_copies(copies: Iterable[Tensor], of: Iterable[Tensor]) -> None:
    """Overwrite tensors that are not the same memory as others."""
    for copy, original in zip(copies, of, strict=True):
        if copy.data_ptr() != original.data_ptr():
            copy.zero_()
