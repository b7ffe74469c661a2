"""The store keeps every record that it took and survives whatever is found in its folders."""

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import stat
import time

import pytest
from autotune_fakes import H100, H200, record

from kvops.autotune import specs, store
from kvops.autotune.records import MAX_BYTES, Record, dump, load
from kvops.autotune.store import Journal, Layer, Store, collect_garbage, read_problems

SPEC = specs()["paged_append"]
FORK = multiprocessing.get_context("fork")  # a process with torch in it takes seconds to start, a fork 60 ms


@pytest.fixture
def layer(tmp_path):
    return Layer("user", tmp_path / "store", writable=True)


@pytest.fixture(autouse=True)
def told(monkeypatch, caplog):
    """What is told in this test, each reason for the first time."""
    monkeypatch.setattr(store, "_told", set())
    caplog.set_level(logging.WARNING, logger="kvops.autotune")
    return caplog


def forked(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def insert_some(layer, worker, count):
    for number in range(count):
        assert layer.insert(record(tokens=1 + worker * count + number))


def test_eight_processes_that_insert_forty_records_each_keep_all_of_them(layer):
    processes = [forked(insert_some, layer, worker, 40) for worker in range(8)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {entry.shape["tokens"] for entry in layer.read(SPEC)} == set(range(1, 321))


def insert_forever(layer):
    for number in range(10**9):
        layer.insert(record(tokens=1 + number % 50, us=float(number)))


def test_a_writer_killed_at_any_moment_leaves_whole_records(layer, told):
    rng = random.Random(0)
    for _ in range(6):
        process = forked(insert_forever, layer)
        time.sleep(0.05 + 0.1 * rng.random())
        process.kill()
        process.join()
        layer.read(SPEC)
    assert layer.read(SPEC)
    assert not told.records
    # What the dead left behind goes when it is old, and not before.
    abandoned = layer.folder / ".tmp-abandoned"
    abandoned.write_text("{")
    assert collect_garbage(layer, [SPEC], {SPEC.name: ""}, dry_run=True) == []
    os.utime(abandoned, (0, 0))
    collect_garbage(layer, [SPEC], {SPEC.name: ""}, dry_run=False)
    assert not abandoned.exists()


def insert_beyond_the_limit(layer, old):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # a record is longer
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os._exit(0 if not layer.insert(old) else 1)


def test_a_write_that_does_not_fit_leaves_the_old_record_and_no_rest(layer):
    old = record(us=5.0)
    assert layer.insert(old)
    process = forked(insert_beyond_the_limit, layer, record(us=1.0))
    process.join(30)
    assert process.exitcode == 0
    assert layer.read(SPEC) == [old]
    assert [path.name for path in layer.folder.iterdir()] == [old.filename]


def test_a_full_disk_is_told_once_with_the_next_step(layer, told, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not layer.insert(record())
    assert not layer.insert(record(tokens=7))
    (message,) = told.messages
    assert "No space left" in message
    assert "KVOPS_CACHE_DIR" in message
    assert list(layer.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_read_and_told_once(tmp_path, told):
    folder = tmp_path / "store"
    Layer("", folder, writable=True).insert(record())
    if os.geteuid() == 0:  # root may write wherever a file system lets anybody
        folder = tmp_path / "no folder"
        folder.write_text("")
        expected = 0
    else:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        expected = 1
    layer = Layer("user", folder, writable=True)
    kept = Store([layer])
    for tokens in (3, 4):
        assert not kept.insert(record(tokens=tokens))
    assert len(layer.read(SPEC)) == expected
    assert sum("cannot be written" in message for message in told.messages) == 1


def test_without_any_folder_records_are_refused_and_nothing_is_raised(told):
    assert not Store([Layer("shipped", store.SHIPPED)]).insert(record())
    assert "KVOPS_CACHE_DIR" in told.text


def changed(**changes):
    value = record().as_json()
    value.update(changes)
    return json.dumps({"format": 1, "records": [value]})


WHOLE = dump([record()])
DAMAGED = {
    "empty": "",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "no text": b"\xff\xfe\x00\x01",
    "no object": "[1, 2]",
    "no records": '{"format": 1}',
    "nested": '{"format": 1, "records": ' + "[" * 100_000,
    "a number of 5000 digits": '{"format": 1, "records": [' + "9" * 5000 + "]}",
    "not a number": changed(time={"p20": 1, "p50": float("nan"), "p80": 1, "count": 1}),
    "infinite": changed(time={"p20": 1, "p50": 1e300, "p80": 1, "count": 1}).replace("1e+300", "1e999"),
    "another operator": changed(op="compact"),
    "a field too many": changed(__class__="os.system"),
    "code for a config": changed(config="__import__('os')"),
    "config of another kernel": changed(config={"block": 1024, "num_warps": 4}),
    "config with a float": changed(config={"block_t": 4.0, "num_warps": 4}),
    "config with a bool": changed(config={"block_t": True, "num_warps": 4}),
    "config below zero": changed(config={"block_t": -4, "num_warps": 4}),
    "huge problem": changed(shape={"tokens": 1 << 60, "lists": 1}),
    "no device": changed(device={"name": "NVIDIA H100"}),
    "device without multiprocessors": changed(device={**H100.as_json(), "num_sms": 0}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_a_miss_set_aside_and_told_once(name, layer, told):
    assert layer.insert(record(tokens=3))
    path = layer.folder / "paged_append.damaged.json"
    content = DAMAGED[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):
        assert [entry.shape["tokens"] for entry in layer.read(SPEC)] == [3]
    assert len(told.messages) == 1
    assert not path.exists()
    assert (layer.folder / "quarantine" / path.name).exists()


def test_a_damaged_file_of_a_folder_that_is_not_ours_stays_and_is_told_once(layer, told):
    layer.insert(record())
    path = layer.folder / "paged_append.damaged.json"
    path.write_text("{")
    shared = Layer("site", layer.folder)
    for _ in range(2):
        assert len(shared.read(SPEC)) == 1
    assert path.exists()
    assert len(told.messages) == 1


def test_a_file_of_another_format_is_left_where_it_is(layer, told):
    layer.insert(record())
    path = layer.folder / "paged_append.new.json"
    path.write_text('{"format": 2, "entries": {}}')
    assert len(layer.read(SPEC)) == 1
    assert path.exists()
    assert "another version" in told.text


def test_what_is_no_file_of_sane_size_is_never_read(layer, told):
    layer.insert(record())
    with open(layer.folder / "paged_append.huge.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    os.mkfifo(layer.folder / "paged_append.pipe.json")  # opening it must not wait for a writer
    os.symlink("/dev/zero", layer.folder / "paged_append.endless.json")
    os.symlink("/nowhere", layer.folder / "paged_append.dangling.json")
    (layer.folder / "paged_append.folder.json").mkdir()
    assert len(layer.read(SPEC)) == 1
    assert len(told.messages) == 4  # a link to nothing is a file that is gone


def test_a_record_survives_the_way_to_disk_and_back(layer):
    entry = record()
    assert load(dump([entry]), SPEC) == [entry]
    assert Record.from_json(json.loads(json.dumps(entry.as_json())), SPEC) == entry


def test_the_last_layer_wins_and_a_newer_record_replaces_an_older(tmp_path):
    shipped, user = (Layer(name, tmp_path / name, writable=name == "user") for name in ("shipped", "user"))
    Layer("", shipped.folder, writable=True).insert(record(us=1.0, date="2026-03-01"))
    user.insert(record(us=2.0, date="2026-01-01"))
    ((number, found),) = Store([shipped, user]).records(SPEC)
    assert (number, found.time.p50) == (1, 2.0)
    # An exported file of many and a file of one are the same thing: the newest of them counts.
    user.write("paged_append.exported.json", dump([record(us=3.0, date="2026-02-01"), record(us=4.0, device=H200)]))
    assert {entry.time.p50 for _, entry in Store([shipped, user]).records(SPEC)} == {3.0, 4.0}


def test_garbage_is_what_newer_sources_replaced_and_nothing_else(layer):
    layer.insert(record(tokens=3, source="old"))
    layer.insert(record(tokens=3))
    layer.insert(record(tokens=4, source="old"))
    current = {SPEC.name: record().source}
    (doomed,) = collect_garbage(layer, [SPEC], current, dry_run=True)
    assert len(layer.read(SPEC)) == 3
    assert collect_garbage(layer, [SPEC], current, dry_run=False) == [doomed]
    assert {(entry.shape["tokens"], entry.source) for entry in layer.read(SPEC)} == {
        (3, current[SPEC.name]),
        (4, "old"),
    }


def test_the_journal_has_each_problem_once_and_reads_back(tmp_path, told):
    journal = Journal(tmp_path / "new")
    problem = SPEC.problems[0]
    for _ in range(3):
        journal.add(SPEC.name, problem, H100.name)
    journal.add(SPEC.name, {**problem, "tokens": 9}, H100.name)
    journal.flush()
    journal.flush()
    lines = journal.path.read_text().splitlines()
    assert len(lines) == 2
    journal.path.write_text(
        "\n".join(["", "{", '{"op": "none"}', *lines, lines[0], '{"op": "paged_append", "problem": {}}'])
    )
    found = read_problems(journal.path, dict(specs()))
    assert [entry["tokens"] for _, entry in found] == [problem["tokens"], 9]
    assert len(told.messages) == 4


def test_a_journal_that_cannot_be_written_stays_silent_after_the_first_time(tmp_path, told):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file")
    for tokens in (1, 2):
        journal.add(SPEC.name, {**SPEC.problems[0], "tokens": tokens}, H100.name)
        journal.flush()
    assert len(told.messages) == 1
