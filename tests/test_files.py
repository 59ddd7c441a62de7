"""Files and folders are whole or not there, whoever else writes, and what the dead leave behind is cleaned."""

import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from procon.errors import ProConError
from procon.files import (
    check_writable,
    load_json,
    save_json,
    whole_file,
    whole_folder,
    write_bytes,
    write_text,
    writing,
)


def test_a_file_comes_whole_and_alone(tmp_path):
    target = tmp_path / "new" / "folders" / "file"
    assert write_text("añil\n", target) == target
    assert target.read_bytes() == "añil\n".encode()
    write_bytes(b"other", str(target))
    assert target.read_bytes() == b"other"
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    plain = target.with_name("plain")
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ProConError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = write_text("old", tmp_path / "file")

    def stop(half: Path) -> None:
        half.write_text("half")
        raise error

    with pytest.raises(error), whole_file(target) as partial:
        stop(partial)
    with pytest.raises(error), whole_folder(tmp_path / "folder") as partial:
        stop(partial / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_what_is_written_lies_where_nobody_else_may_look(tmp_path):
    names = set()
    for number in range(3):
        with whole_file(tmp_path / "file") as partial:
            partial.write_text(str(number))
            assert partial.parent.parent == tmp_path
            assert partial.parent.stat().st_mode & 0o777 == 0o700
            names.add(partial.parent.name)
    assert len(names) == 3


def test_a_planted_link_is_not_followed(tmp_path):
    victim, target = tmp_path / "victim", tmp_path / "e.json"
    victim.write_text("precious")
    for name in ("e.json.partial", "e.json.0.partial", "e.json"):
        (tmp_path / name).symlink_to(victim)
    save_json({"a": 1}, target)
    assert victim.read_text() == "precious"
    assert load_json(target, dict, "a") == {"a": 1}
    assert not target.is_symlink()


def test_two_threads_write_one_file(tmp_path):
    texts = ["a" * 100_000, "b" * 100_000]
    threads = [
        threading.Thread(target=lambda text=text: [write_text(text, tmp_path / "file") for _ in range(20)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_comes_whole_and_the_first_one_stays(tmp_path):
    target = tmp_path / "cache" / "model"
    target.mkdir(parents=True)  # empty, so nobody's
    with whole_folder(target) as late:
        (late / "config.json").write_text("late")
        with whole_folder(target) as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "weights").write_text("early")
            assert list(target.iterdir()) == []
    assert [path.name for path in target.iterdir()] == ["deep"]
    assert (target / "deep" / "weights").read_text() == "early"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert target.stat().st_mode == (target / "deep").stat().st_mode


def test_the_contents_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Otherwise a power cut may leave the name, and nothing under it."""
    events = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(original):
        def call(source, target):
            events.append(("name", Path(target).name))
            original(source, target)

        return call

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(os, "rename", renamed(rename))
    write_text("text", tmp_path / "new" / "file")
    assert events == [("sync", tmp_path.name), ("sync", "file"), ("name", "file"), ("sync", "new")]
    events.clear()
    with whole_folder(tmp_path / "whole") as partial:
        (partial / "file").write_text("text")
    assert events == [("sync", "file"), ("sync", "whole"), ("name", "whole"), ("sync", tmp_path.name)]


def test_what_a_killed_process_leaves_is_cleaned_after_a_day(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from procon.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=False)
    assert result.returncode == -9
    (left,) = tmp_path.iterdir()
    users = [tmp_path / "film.partial", tmp_path / "_notes.partial"]
    for path in users:
        path.touch()
        os.utime(path, (0, 0))
    write_text("text", tmp_path / "other")
    assert left.exists()  # its process may live, on another machine
    os.utime(left, (0, 0))
    write_text("text", tmp_path / "other")
    assert set(tmp_path.iterdir()) == {*users, tmp_path / "other"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/in/a/file", " (Not a directory): free some space, or give another place"),
        ("file/name", " (File exists)"),
        ("folder", " (Is a directory)"),
        ("n" * 300, " (File name too long)"),
    ],
)
def test_what_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ProConError, match=re.escape(f"cannot write {name!r}{reason}")):
        write_text("text", name)
    if len(name) < 300:  # the file system says so only of the file itself
        with pytest.raises(ProConError, match=f"^cannot write '{name}'"):
            check_writable(name)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "open", "replace"])
def test_a_call_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, code):
    target = write_text("old", tmp_path / "file")

    original = getattr(os, call)

    def fail(*args, **settings):
        if call == "mkdir" and args[0] == tmp_path:  # which is there
            return original(*args, **settings)
        patch.setattr(os, call, original)  # once
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ProConError, match=f"cannot write .*file' .{os.strerror(code)}.: "):
            write_text("new", target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("size", [1, 100_000, None])
def test_errors_of_libraries_that_write_by_themselves_are_named_too(size):
    def save() -> None:
        if size:
            torch.save(torch.zeros(size), "/dev/full")
        else:
            Tokenizer(models.BPE()).save("/dev/full")

    with pytest.raises(ProConError, match=r"^cannot write 'out' \(.*\): free some space, or give"), writing("out"):
        save()


def test_what_is_named_once_is_not_named_again():
    message = r"^cannot write 'in' \([^()]*\): free some space, or give another place$"
    with pytest.raises(ProConError, match=message), writing("out"), writing("in"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_another_kind_is_left_as_it_is(tmp_path):
    with pytest.raises(ConnectionRefusedError), writing(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert write_text("text", tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null", b'{"a": "b"}'],
)
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ProConError, match=r"run file .*run.json' is damaged or holds something else"):
        load_json(path, lambda data: int(data["a"]), "run")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(ProConError, match=r"run file .* does not exist"):
        load_json(tmp_path, dict, "run")
