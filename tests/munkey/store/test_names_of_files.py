"""A file is the file, not its name: saves to one name at once, links, renamed files, and files that are only read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from classifiers import filled
from disks import QuickDisk
from durables import create, state
from processes import Child, forked, sleeping, together
from stores import SECRET, WIDTHS, keys_of, store

from munkey import DurableStore, KeyMemoryTransformer, ShardedKeyStore
from munkey import io as files
from munkey.store.digest import checksum
from munkey.store.file.disk import Disk, read_whole, wipe_leftovers, write_whole
from treediff.core.io import add_tensors

NUMBER = "0123456789abcdef"
ENDS = [f".munkey-{kind}" for kind in ("old", "partial")] + [f".{NUMBER}.munkey-{kind}" for kind in ("old", "partial")]


def content(model: KeyMemoryTransformer) -> bytes:
    """Every bit of a model."""
    parts: list[bytes] = []
    add_tensors(lambda part: parts.append(bytes(part)), model.state_dict())
    return checksum(b"".join(parts))


def models() -> list[KeyMemoryTransformer]:
    """Two that differ in weights and rows."""
    found = [filled(), filled()]
    found[1].forget([3, 4])
    with torch.no_grad():
        for parameter in found[1].parameters():
            parameter.add_(1)
    return found


def save(model: KeyMemoryTransformer, path: Path) -> None:
    files.save(model, path, disk=QuickDisk())


def loads(path: Path, known: set[bytes], until: Callable[[], bool]) -> int:
    """How often a model could be loaded; whatever was loaded is whole."""
    whole = 0
    while not until():
        try:
            found = KeyMemoryTransformer.load(path)
        except (OSError, ValueError):
            continue
        assert content(found) in known
        whole += 1
    return whole


# --- one name, several processes ------------------------------------------------------------------------------


def test_saves_to_one_name_at_once_are_whole_whoever_loads_meanwhile(tmp_path: Path) -> None:
    path, both = tmp_path / "model", models()
    save(both[0], path)

    def saving(model: KeyMemoryTransformer) -> Callable[[Callable[[], None]], None]:
        return lambda _: [save(model, path) for _ in range(60)] and None

    known = {content(model) for model in both}
    with Child(saving(both[0])) as one, Child(saving(both[1])) as other:
        assert loads(path, known, lambda: one.done and other.done) > 5
        assert one.result() is other.result() is None, "both saved to the end"
    assert content(KeyMemoryTransformer.load(path)) in known and os.listdir(tmp_path) == ["model"]


def test_a_save_that_is_killed_leaves_a_whole_file_beside_another_that_goes_on(tmp_path: Path) -> None:
    path, both = tmp_path / "model", models()
    save(both[0], path)
    known = {content(model) for model in both}

    def for_ever(_: object) -> NoReturn:
        while True:
            save(both[1], path)

    with Child(lambda _: [save(both[0], path) for _ in range(80)] and None) as steady:
        for round_ in range(8):
            with Child(for_ever) as victim:
                left = 2 + round_ % 3

                def enough() -> bool:
                    nonlocal left
                    left -= 1
                    return left < 0

                loads(path, known, enough)
                victim.kill()
            assert content(KeyMemoryTransformer.load(path)) in known
        assert steady.result() is None
    save(both[1], path)
    assert content(KeyMemoryTransformer.load(path)) == content(both[1])
    assert os.listdir(tmp_path) == ["model"], "what the killed ones left is gone"


class Before(QuickDisk):
    """A disk that lets something happen before the first call of one method."""

    def __init__(self, method: str, act: Callable[[], object]) -> None:
        self.method, self.act = method, act

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401
        if name != "method" and name == self.method:
            self.method = ""
            self.act()
        return super().__getattribute__(name)


@pytest.mark.parametrize("method", ["lock", "write", "open_folder"])
def test_another_save_at_any_moment_of_a_save(tmp_path: Path, method: str) -> None:
    """Above all after the new file was made and before it is locked, when it looks like a leftover."""
    path = str(tmp_path / "file")
    write_whole(QuickDisk(), path, b"first")

    def another() -> None:
        wipe_leftovers(QuickDisk(), path)
        write_whole(QuickDisk(), path, b"second")

    write_whole(Before(method, another), path, b"third")
    assert (tmp_path / "file").read_bytes() == b"third" and os.listdir(tmp_path) == ["file"]


def test_of_two_stores_that_are_created_at_once_one_is(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def both() -> object:
        first: list[DurableStore] = []
        with pytest.raises(FileExistsError, match=r"there is a file .* already; open it, or remove it"):
            DurableStore.create(path, *WIDTHS, disk=Before("create", lambda: first.append(create(path))))
        first[0].close()
        return state(first[0])

    before = forked(both)
    with DurableStore.open(path) as again:
        assert state(again) == before
    assert os.listdir(tmp_path) == ["store"]


def test_a_process_that_is_forked_while_a_model_is_saved_keeps_no_lock(tmp_path: Path) -> None:
    path, model = tmp_path / "model", filled()
    save(model, path)
    children: list[Child] = []
    try:
        for method in ("write", "replace", "zero"):
            files.save(model, path, disk=Before(method, lambda: children.append(sleeping())))
            assert forked(lambda: content(KeyMemoryTransformer.load(path))) == content(model)
            forked(lambda: save(model, path))
        assert len(children) == 3
    finally:
        for child in children:
            child.__exit__()


def test_a_reader_gets_what_a_name_leads_to_when_it_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(QuickDisk(), str(path), b"old")
    assert read_whole(Before("lock", lambda: write_whole(QuickDisk(), str(path), b"new")), str(path)) == b"new"


@pytest.mark.parametrize("model", [False, True])
def test_two_saves_to_one_folder_at_once(tmp_path: Path, model: bool) -> None:
    folder = tmp_path / "folder"
    savable: list[Any] = []
    for salt, each in enumerate(models()):
        if model:
            each.memory.store = ShardedKeyStore.of(each.memory.store)
            savable.append(each)
        else:
            rows = ShardedKeyStore(*WIDTHS, secret=SECRET)
            rows.add(range(8), keys_of(list(range(8)), salt=salt))
            savable.append(rows)

    def whole() -> object:
        if model:
            found = KeyMemoryTransformer.load(folder)
            return found.memory.store.digest(), checksum(
                found.state_dict()["readout.network.head.weight"].numpy().tobytes()
            )
        return ShardedKeyStore.load(folder).digest()

    known = []
    for each in savable:
        each.save(folder)
        known.append(whole())
    assert known[0] != known[1]

    def saving(each: Any) -> int:  # noqa: ANN401
        done = 0
        while done < 8:  # the other one ends, too
            try:
                each.save(folder)
                done += 1
            except BlockingIOError as error:
                assert "another process saves to" in str(error)
        return done

    with Child(lambda _: saving(savable[0])) as one, Child(lambda _: saving(savable[1])) as other:
        while not (one.done and other.done):
            try:
                found = whole()
            except (OSError, ValueError) as error:
                assert isinstance(error, FileNotFoundError) or "was saved to while it was loaded" in str(error)
                continue
            assert found in known
        assert one.result() and other.result()
    assert whole() in known
    savable[0].save(folder)
    assert whole() == known[0] and len(os.listdir(folder)) == (4 if model else 3)


# --- links ----------------------------------------------------------------------------------------------------


def test_saving_to_a_symbolic_link_replaces_the_file_that_it_leads_to(tmp_path: Path) -> None:
    first, second = models()
    (tmp_path / "elsewhere").mkdir()
    path, link = tmp_path / "elsewhere" / "model", tmp_path / "link"
    link.symlink_to(Path("elsewhere") / "model")
    for model in (first, second):  # the first time it leads nowhere yet
        model.save(link)
        assert link.is_symlink() and not path.is_symlink()
        assert content(KeyMemoryTransformer.load(link)) == content(KeyMemoryTransformer.load(path)) == content(model)
    assert os.listdir(tmp_path / "elsewhere") == ["model"]


def links_to(user: Path, names: list[Path], how: str) -> None:
    for name in names:
        name.symlink_to(user) if how == "symbolic" else os.link(user, name)


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_file_of_the_user_that_a_link_with_our_name_leads_to_is_left_alone(tmp_path: Path, how: str) -> None:
    user = tmp_path / "mine"
    user.write_bytes(b"mine")
    model, sharded = filled(), ShardedKeyStore(*WIDTHS, secret=SECRET)
    with create(tmp_path / "store") as rows:
        links_to(user, [tmp_path / f"{name}{end}" for name in ("model", "store") for end in ENDS], how)
        rows.compact()
        links_to(user, [name for end in ENDS if not os.path.lexists(name := tmp_path / f"store{end}")], how)
    DurableStore.open(tmp_path / "store").close()
    model.save(tmp_path / "model")
    KeyMemoryTransformer.load(tmp_path / "model")
    sharded.save(tmp_path / "folder")
    rows_file = next(name for name in os.listdir(tmp_path / "folder") if name.startswith("rows"))
    others = [f"{name}{end}" for name in ("manifest.json", rows_file) for end in ENDS]
    if how == "symbolic":
        others.append("rows-00000-of-00001-" + NUMBER + ".safetensors")
    links_to(user, [tmp_path / "folder" / name for name in others], how)
    sharded.save(tmp_path / "folder")
    ShardedKeyStore.load(tmp_path / "folder")
    assert user.read_bytes() == b"mine"


@pytest.mark.parametrize("what", ["symbolic", "hard", "text"])
def test_a_file_of_the_user_with_the_name_of_a_journal_is_left_alone(tmp_path: Path, what: str) -> None:
    old = Path(__file__).parents[1] / "golden" / "live-float32"
    path, user, journal = tmp_path / "store", tmp_path / "mine", tmp_path / "store.journal"
    path.write_bytes(old.read_bytes())
    user.write_bytes(b"mine")
    journal.write_bytes(b"mine") if what == "text" else links_to(user, [journal], what)
    lock = tmp_path / "store.lock"
    lock.write_bytes(b"mine")
    with DurableStore.open(path) as found:
        assert len(found)
    assert user.read_bytes() == lock.read_bytes() == journal.read_bytes() == b"mine"


# --- other names of a live file -------------------------------------------------------------------------------


def named(path: Path, how: str) -> Path:
    other = path.with_name("other")
    {"hard": os.link, "symbolic": os.symlink, "renamed": os.rename}[how](path, other)
    return other


@pytest.mark.parametrize("how", ["hard", "symbolic", "renamed"])
def test_two_stores_do_not_open_one_file_under_two_names(tmp_path: Path, how: str) -> None:
    with create(tmp_path / "store") as found:
        other = named(tmp_path / "store", how)
        for open_ in (lambda: DurableStore.open(other), lambda: forked(lambda: DurableStore.open(other))):
            with pytest.raises((BlockingIOError, AssertionError), match="is open in another store, here or in another"):
                open_()
        found.forget([3])
        found.add([70], keys_of([70]))
        after = state(found)
    with DurableStore.open(other) as again:
        assert state(again) == after
        again.verify()


@pytest.mark.parametrize("change", ["compact", "sync", "add"])
@pytest.mark.parametrize("taken", [False, True])
def test_a_file_that_was_renamed_is_not_written_anew_over_what_has_its_name(
    tmp_path: Path, change: str, taken: bool
) -> None:
    many = list(range(100, 400))
    with create(tmp_path / "store") as found:
        os.rename(tmp_path / "store", tmp_path / "other")
        if taken:
            (tmp_path / "store").write_bytes(b"mine")
        before = state(found)
        with pytest.raises(FileNotFoundError, match="was renamed, removed or replaced since"):
            {"compact": found.compact, "sync": found.sync, "add": lambda: found.add(many, keys_of(many))}[change]()
        assert state(found) == before
        found.forget([3])  # in its place, as before
        after = state(found)
    assert sorted(os.listdir(tmp_path)) == (["other", "store"] if taken else ["other"])
    assert not taken or (tmp_path / "store").read_bytes() == b"mine"
    with DurableStore.open(tmp_path / "other") as again:
        assert state(again) == after
        again.compact()


def test_a_lock_of_a_folder_that_was_exchanged_before_it_was_taken_is_taken_again(tmp_path: Path) -> None:
    rows = ShardedKeyStore(*WIDTHS, secret=SECRET)
    rows.save(tmp_path)
    said: list[str] = []

    def exchange() -> None:  # after the lock was opened
        os.rename(tmp_path / "lock", tmp_path / "moved")
        (tmp_path / "lock").touch()

    def second() -> None:
        try:
            rows.save(tmp_path)
        except BlockingIOError as error:
            said.append(str(error))

    class Both(Before):
        def write(self, file: int, start: int, data: bytes | memoryview) -> None:
            if not said:
                second()
            super().write(file, start, data)

    def both() -> list[str]:
        rows.save(tmp_path, disk=Both("lock", exchange))
        return said

    (refusal,) = forked(both)
    assert "another process saves to" in refusal


# --- file systems ---------------------------------------------------------------------------------------------


class NoLinks(QuickDisk):
    """A file system that knows no second names, such as exFAT."""

    def link(self, path: str, other: str) -> bool:
        return False


def test_without_second_names_files_are_saved_and_what_was_there_is_overwritten(tmp_path: Path) -> None:
    for model in models():
        held = os.open(tmp_path / "model", os.O_RDONLY) if (tmp_path / "model").exists() else -1
        files.save(model, tmp_path / "model", disk=NoLinks())
        assert content(KeyMemoryTransformer.load(tmp_path / "model")) == content(model)
    size = os.fstat(held).st_size
    assert size and os.pread(held, size, 0) == bytes(size)
    os.close(held)
    with create(tmp_path / "store", NoLinks()) as found:
        held = os.open(tmp_path / "store", os.O_RDONLY)
        found.compact()
        size = os.fstat(held).st_size
        assert size and os.pread(held, size, 0) == bytes(size)
        os.close(held)
        found.add(range(100, 300), keys_of(list(range(100, 300))))
        found.forget([3])
        found.sync()
        after = state(found)
    with DurableStore.open(tmp_path / "store", disk=NoLinks()) as again:
        assert state(again) == after
    rows = ShardedKeyStore(*WIDTHS, secret=SECRET)
    for instance in range(2):
        rows.add([instance], keys_of([instance]))
        rows.save(tmp_path / "folder", disk=NoLinks())
    assert list(ShardedKeyStore.load(tmp_path / "folder")) == [0, 1]
    assert sorted(os.listdir(tmp_path)) == ["folder", "model", "store"] and len(os.listdir(tmp_path / "folder")) == 3


class ReadOnly(Disk):
    """A disk on which the process may only read."""

    def open_to_read(self, path: str) -> int:
        return super().open_to_read(path)

    def _refused(self, *_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "may only read")

    open = create = lock = unlock = write = zero = resize = allocate = sync = _refused
    link = replace = remove = open_folder = sync_folder = _refused


REFUSED: dict[str, Callable[[DurableStore, Path], object]] = {
    "add": lambda found, _: found.add([70], keys_of([70])),
    "add beyond the room": lambda found, _: found.add(range(100, 200), keys_of(list(range(100, 200)))),
    "forget": lambda found, _: found.forget([1]),
    "forget nothing": lambda found, _: found.forget([]),
    "replace": lambda found, _: found.replace([1], keys_of([1])),
    "compact": lambda found, _: found.compact(),
    "sync": lambda found, _: found.sync(),
    "load": lambda found, _: found.load_state_dict(store().state_dict()),
    "log": lambda found, folder: found.keep_receipts(folder / "log"),
    "new log": lambda found, folder: found.keep_receipts(folder / "new", new=True),
}


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """A file that the next store to change it would tidy: with a note of a change, and something left beside it."""
    found = create(tmp_path / "live")
    found.forget([11])
    (tmp_path / "store").write_bytes((tmp_path / "live").read_bytes())
    (tmp_path / "store.munkey-old").write_bytes(b"left")
    found.close()
    (tmp_path / "live").unlink()
    log = store()
    log.keep_receipts(tmp_path / "log", new=True)
    log.close()
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_may_only_be_read_is_searched_and_never_written(waiting: Path, name: str) -> None:
    before = all_bytes(waiting)
    with DurableStore.open(waiting / "store", read_only=True, disk=ReadOnly()) as found:
        held = state(found)
        assert found.nearest(found.get([2]).keys, 1).ids.shape == (2, 1) and 11 not in found
        found.verify()
        with pytest.raises(ValueError, match="was opened to be read only; open it without read_only=True"):
            REFUSED[name](found, waiting)
        assert state(found) == held
    assert all_bytes(waiting) == before
    with DurableStore.open(waiting / "store") as again:
        assert state(again) == held


def test_a_log_that_is_read_with_a_file_that_is_read_is_left_alone(tmp_path: Path) -> None:
    with create(tmp_path / "store") as found:
        found.keep_receipts(tmp_path / "log", new=True)
        found.forget([3])
    with open(tmp_path / "log", "ab") as log:
        log.write(b'{"chain":"12')
    before = all_bytes(tmp_path)
    with DurableStore.open(tmp_path / "store", receipts=tmp_path / "log", read_only=True, disk=ReadOnly()) as found:
        assert 3 not in found
    assert all_bytes(tmp_path) == before


# --- reading beside a writer ----------------------------------------------------------------------------------


def write(path: Path, changes: int) -> None:
    """Hold a window of ids that goes on and on; move rows, change their order, and replace the file meanwhile."""
    with DurableStore.open(path, disk=QuickDisk()) as found:
        for at in range(20, 20 + changes):
            found.add([at], keys_of([at], 2))
            found.forget([at - 20])
            if at % 7 == 0:
                found.compact()


def read(path: Path) -> bool:
    """Whether the file could be read; then it is what the writer had at one moment."""
    try:
        with DurableStore.open(path, read_only=True) as found:
            ids = list(found)
            assert len(ids) in (20, 21) and ids == list(range(ids[0], ids[0] + len(ids)))
            assert torch.equal(found.get(ids).keys, keys_of(ids, 2).flatten(0, 1))
            assert found.get(ids).views.tolist() == [0, 1] * len(ids)
            return True
    except ValueError as error:
        assert "is in the midst of a change; read it again" in str(error)
        return False


@pytest.mark.parametrize("how", ["process", "thread"])
def test_reading_beside_a_store_that_changes_the_file_gives_a_state_that_it_had(tmp_path: Path, how: str) -> None:
    path = tmp_path / "store"
    create(path).close()
    if how == "process":
        with Child(lambda _: write(path, 300)) as writer:
            found = [read(path) for _ in iter(lambda: writer.done, True)]
            writer.result()
    else:
        left = [True]

        def writing() -> None:
            try:
                write(path, 150)
            finally:
                left.clear()

        _, found = together(writing, lambda: [read(path) for _ in iter(lambda: bool(left), False)])
    assert sum(found) > 5 and sum(found) > len(found) // 2, "most attempts succeed"
    assert read(path)


@pytest.mark.parametrize("method", ["write", "resize", "replace", "zero", "remove"])
@pytest.mark.parametrize("change", ["add", "forget", "compact"])
def test_reading_at_a_moment_of_a_change(tmp_path: Path, change: str, method: str) -> None:
    """Between any two writes of a change: the state before it or after it, or an error that says so."""
    path, seen = tmp_path / "store", []
    create(path).close()

    class Reading(QuickDisk):
        def __getattribute__(self, name: str) -> Any:  # noqa: ANN401
            if name == method and active:
                active.clear()
                try:
                    with DurableStore.open(path, read_only=True) as found:
                        seen.append(state(found))
                except ValueError as error:
                    assert "is in the midst of a change" in str(error)
                active.append(True)
            return super().__getattribute__(name)

    active: list[bool] = []
    with DurableStore.open(path, disk=Reading()) as found:
        before = state(found)
        active.append(True)
        {
            "add": lambda: found.add([70], keys_of([70])),
            "forget": lambda: found.forget([0, 3, 19]),
            "compact": found.compact,
        }[change]()
        active.clear()
        assert set(seen) <= {before, state(found)}
    assert seen or method != "write" or change == "forget"
