"""The store: nothing that was kept is lost, torn ends are cut, broken lines are named, one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.llm.store import Call, Reply, Spent, Store

ROOT = Path(__file__).resolve().parents[2]


def call(text: str = "Hello?", **changed: object) -> Call:
    given = {"model": "m", "messages": ({"role": "user", "content": text},), "parameters": {"t": 1}, "version": "1"}
    return Call(**{**given, **changed})  # type: ignore[arg-type]


def reply(text: str = "Hello.") -> Reply:
    return Reply(text, "stop", 3, 2)


def test_a_reply_is_found_again_by_the_content_of_its_call(tmp_path: Path) -> None:
    with Store(tmp_path / "calls.jsonl") as store:
        store.add((call("one"), reply("1")), (call("two"), reply("zwei \u2028 \U0001f40d")))
        assert store.get(call("two").key) == reply("zwei \u2028 \U0001f40d")
    with Store(tmp_path / "calls.jsonl") as store:
        assert store.get(call("one").key) == reply("1")
        assert store.get(call("two").key) == reply("zwei \u2028 \U0001f40d")
        assert store.get(call("three").key) is None
        assert (store.calls, store.tokens) == (2, 10)


@pytest.mark.parametrize(
    "changed", [{"model": "n"}, {"version": "2"}, {"parameters": {"t": 2}}, {"messages": ({"role": "user"},)}]
)
def test_a_call_that_differs_in_anything_is_another_one(changed: dict[str, object]) -> None:
    assert call(**changed).key != call().key


def test_the_order_of_parameters_is_not_content() -> None:
    assert call(parameters={"a": 1, "b": 2}).key == call(parameters={"b": 2, "a": 1}).key


def test_a_call_that_has_a_reply_keeps_it(tmp_path: Path) -> None:
    with Store(tmp_path / "calls.jsonl") as store:
        store.add((call(), reply("first")))
        store.add((call(), reply("second")), (call("new"), reply("a")), (call("new"), reply("b")))
        assert store.get(call().key) == reply("first")
        assert store.get(call("new").key) == reply("a")
    assert len((tmp_path / "calls.jsonl").read_bytes().splitlines()) == 2


def test_an_end_that_was_torn_anywhere_is_cut_and_the_rest_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path) as store:
        store.add((call("one"), reply("1")))
        whole = path.read_bytes()
        store.add((call("two"), reply("\u00e4\u00f6\u00fc")))
    both = path.read_bytes()
    for end in range(len(whole), len(both)):
        path.write_bytes(both[:end])
        with Store(path) as store:
            assert store.get(call("one").key) == reply("1")
            assert store.calls == (2 if end == len(both) - 1 else 1)  # without its last byte it is whole
            store.add((call("two"), reply("\u00e4\u00f6\u00fc")), (call("three"), reply()))
        with Store(path) as store:
            assert store.calls == 3


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"key": "a"}', b'{"key": 1, "reply": {"text": 1}}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_broken_line_before_the_end_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path) as store:
        store.add((call("one"), reply()))
    before = path.read_bytes() + line + b"\n"
    path.write_bytes(before)
    with pytest.raises(InputError, match=r"calls\.jsonl, line 2: "):
        Store(path)
    assert path.read_bytes() == before


def test_one_process_writes_and_the_lock_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    hold = f"from pathlib import Path; from qllava.llm.store import Store; held = Store(Path({str(path)!r})); "
    code = hold + "print('held', flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="in use by process"):
            Store(path)
        other.kill()
        other.wait()
    with Store(path) as store:
        assert store.calls == 0


def run_other(path: Path) -> str:
    """What another process says that tries to open the store."""
    code = f"from pathlib import Path; from qllava.llm.store import Store; Store(Path({str(path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    return other.stderr.strip().splitlines()[-1] if other.returncode else "opened"


def test_a_store_that_is_deleted_while_it_is_in_use_lets_nobody_in_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path) as store:
        store.add((call("one"), reply("1")))
        path.unlink()
        assert "in use by process" in run_other(path)
        assert not path.exists()
        with pytest.raises(InputError, match="in use by process"):  # nor this one again
            Store(path)
        store.add((call("two"), reply("2")))
        assert store.get(call("one").key) == reply("1")
        assert store.get(call("two").key) == reply("2")
    assert [file.name for file in tmp_path.iterdir()] == ["calls.jsonl"]
    with Store(path) as store:
        assert store.calls == 2


def test_a_store_that_is_replaced_while_it_is_in_use_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path) as store:
        store.add((call("one"), reply("1")))
        path.unlink()
        path.write_bytes(b"")
        with pytest.raises(InputError, match="was replaced by another file during the run"):
            store.add((call("two"), reply("2")))
    assert path.read_bytes() == b""


def test_a_lock_that_was_deleted_too_is_not_taken_from_its_next_holder(tmp_path: Path) -> None:
    path, lock = tmp_path / "calls.jsonl", tmp_path / ".calls.jsonl.lock"
    first = Store(path)
    path.unlink()
    lock.unlink()
    second = Store(path)
    with pytest.raises(InputError, match="was replaced by another file"):
        first.add((call("one"), reply("1")))
    first.close()
    assert lock.exists()  # the second one's
    with pytest.raises(InputError, match="in use"):
        Store(path)
    second.close()
    assert not lock.exists()


def test_one_store_by_two_names_is_one(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path):
        (tmp_path / "link.jsonl").symlink_to(path)
        (tmp_path / "hard.jsonl").hardlink_to(path)
        for name in ("link.jsonl", "hard.jsonl"):
            with pytest.raises(InputError, match="in use by"):
                Store(tmp_path / name)


def test_failures_and_what_was_spent_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path) as store:
        store.fail(call("bad"), "status 400: \ud83d no", Spent(1))
        store.fail(call("bad"), "status 400: no", Spent(1))
        store.fail(call("broken off"), None, Spent(2, 30))
        store.add((call("good"), reply()), spent=Spent(3, 7))
    for _ in range(2):
        with Store(path) as store:
            assert (store.calls, store.tokens) == (1, 5)
            assert (store.requests, store.spent_tokens) == (7, 42)
            assert [store.failures(call(name).key) for name in ("bad", "broken off", "good")] == [2, 0, 0]
            assert store.get(call("bad").key) is None


def test_a_store_of_before_counts_a_request_for_each_reply(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    said = {"text": "Hi.", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "refusal": None}
    path.write_text(json.dumps({"key": call().key, "model": "m", "version": "1", "reply": said}) + "\n")
    with Store(path) as store:
        assert (store.calls, store.requests, store.spent_tokens) == (1, 1, 5)


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    with Store(tmp_path / "calls.jsonl") as store:
        threads = [
            threading.Thread(target=lambda n=n: [store.add((call(f"{n} {k}"), reply(f"{n} {k}"))) for k in range(20)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Store(tmp_path / "calls.jsonl") as store:
        assert all(store.get(call(f"{n} {k}").key) == reply(f"{n} {k}") for n in range(8) for k in range(20))


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calls.jsonl"
    with Store(path) as store:
        store.add((call("one"), reply()))
        whole, write = path.read_bytes(), os.write

        def half(file: int, data: bytes) -> int:
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return write(file, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(InputError, match="No space left"):
            store.add((call("two"), reply()))
        monkeypatch.undo()
        assert path.read_bytes() == whole
        store.add((call("two"), reply("after")))
        assert store.get(call("two").key) == reply("after")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.calls\.jsonl: the replies cannot be stored in this file"):
        Store(tmp_path / "nowhere" / "calls.jsonl")
