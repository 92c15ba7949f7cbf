# SPDX-License-Identifier: Apache-2.0
"""Keys on disk: what is made, what is believed, and what each refusal says."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.drivers import keys
from replicator.errors import ConfigError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keys.generate("alpha", tmp_path / "keys")
    return tmp_path / "keys"


def pin(directory: Path, name: str, *sources: Path) -> Path:
    path = directory / "peers" / f"{name}.crt"
    path.write_bytes(b"".join((source / "node.crt").read_bytes() for source in sources))
    path.chmod(0o644)
    return path


def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def test_generate_makes_a_private_key_only_its_owner_reads_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        shown = keys.generate("alpha", tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys" / "node.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert keys.own_fingerprint(tmp_path / "keys") == shown
    assert len(shown.split(":")) == 32
    assert sorted(p.name for p in (tmp_path / "keys").iterdir()) == ["node.crt", "node.key", "peers"]


def test_generate_never_replaces_a_key_unless_told(directory: Path) -> None:
    key = (directory / "node.key").read_bytes()
    with pytest.raises(ConfigError, match=r"exists already.*--force"):
        keys.generate("alpha", directory)
    assert (directory / "node.key").read_bytes() == key
    keys.generate("alpha", directory, force=True)
    assert (directory / "node.key").read_bytes() != key


@pytest.mark.parametrize("force", [False, True])
def test_generate_does_not_write_through_a_symbolic_link(tmp_path: Path, force: bool) -> None:
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / "node.key").symlink_to(victim)
    if force:
        keys.generate("alpha", directory, force=True)
        assert not (directory / "node.key").is_symlink()
    else:
        with pytest.raises(ConfigError):
            keys.generate("alpha", directory)
    assert victim.read_text() == "precious"


def test_generate_refuses_a_directory_others_can_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="written to by others"):
        keys.generate("alpha", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../alpha", "a/b", ".hidden", "a\nb", "a\0b", "x" * 65, "-force"])
def test_names_that_could_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="node name"):
        keys.generate(name, tmp_path)
    with pytest.raises(ConfigError, match="node name"):
        keys.load_peer(tmp_path, name)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run replicator keygen"):
        keys.own_fingerprint(tmp_path)


def test_a_missing_certificate_of_a_peer_says_which_file_to_copy(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"copy node\.crt of beta to .*peers/beta\.crt"):
        keys.load_peer(directory, "beta")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_others_can_reach_is_refused(directory: Path, mode: int) -> None:
    (directory / "node.key").chmod(mode)
    with pytest.raises(ConfigError, match="read by others"):
        keys.own_fingerprint(directory)


def test_a_key_behind_a_symbolic_link_is_refused(directory: Path) -> None:
    (directory / "node.key").rename(directory / "real")
    (directory / "node.key").symlink_to(directory / "real")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        keys.own_fingerprint(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(directory: Path) -> None:
    os.chown(directory / "node.key", 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        keys.own_fingerprint(directory)


def test_a_fifo_in_place_of_a_certificate_is_refused_without_waiting(directory: Path) -> None:
    (directory / "node.crt").unlink()
    os.mkfifo(directory / "node.crt", 0o600)
    with pytest.raises(ConfigError, match="not a plain file"):
        keys.own_fingerprint(directory)


def test_a_key_that_does_not_belong_to_its_certificate_is_refused(directory: Path, tmp_path: Path) -> None:
    keys.generate("alpha", tmp_path / "other")
    (directory / "node.crt").write_bytes((tmp_path / "other" / "node.crt").read_bytes())
    with pytest.raises(ConfigError, match="does not belong to"):
        keys.own_fingerprint(directory)


def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(directory: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key((directory / "node.key").read_bytes(), None)
    sealed = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"canary"))
    (directory / "node.key").write_bytes(sealed)
    with pytest.raises(ConfigError, match="needs a passphrase"):
        keys.own_fingerprint(directory)


def _truncated(text: str) -> str:
    lines = text.splitlines()
    return "\n".join([lines[0], *lines[1:4], lines[-1]])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: "", "not a PEM file"),
        (lambda text: "hello", "not a PEM file"),
        (lambda text: text + "-----BEGIN CERTIFICATE-----\n", "not a PEM file"),
        (_truncated, "certificate 1 of .* is damaged"),
        (lambda text: text * 9, "more than 8"),
        (lambda text: text + "x" * 70000, "more than 65536"),
    ],
)
def test_a_peers_file_that_is_not_certificates_is_refused(
    directory: Path, damage: Callable[[str], str], sentence: str
) -> None:
    path = pin(directory, "beta", directory)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=sentence):
        keys.load_peer(directory, "beta")


def test_a_private_key_in_a_peers_file_is_refused_and_not_quoted(directory: Path) -> None:
    secret = (directory / "node.key").read_text()
    path = directory / "peers" / "beta.crt"
    path.write_text((directory / "node.crt").read_text() + secret)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="holds a private key") as caught:
        keys.load_peer(directory, "beta")
    assert not any(line in str(caught.value) for line in secret.splitlines())


def test_a_peers_file_others_can_change_is_refused(directory: Path) -> None:
    pin(directory, "beta", directory).chmod(0o666)
    with pytest.raises(ConfigError, match="changed by others"):
        keys.load_peer(directory, "beta")


def test_two_certificates_of_one_peer_are_both_believed(directory: Path, tmp_path: Path) -> None:
    shown = {keys.generate("beta", tmp_path / name) for name in ("one", "two")}
    pin(directory, "beta", tmp_path / "one", tmp_path / "two")
    trust = keys.load_trust(context(), directory, {2: "beta"})
    assert trust.faults == ()
    assert trust.owners == dict.fromkeys(shown, 2)


def test_our_own_certificate_is_nobody_elses(directory: Path) -> None:
    pin(directory, "beta", directory)
    trust = keys.load_trust(context(), directory, {2: "beta"})
    assert not trust.owners
    assert "this node's own" in trust.faults[0]


def test_one_certificate_stands_for_one_peer(directory: Path, tmp_path: Path) -> None:
    keys.generate("beta", tmp_path / "beta")
    pin(directory, "beta", tmp_path / "beta")
    pin(directory, "gamma", tmp_path / "beta")
    trust = keys.load_trust(context(), directory, {2: "beta", 3: "gamma"})
    assert "pinned for both beta and gamma" in trust.faults[0]


def test_one_bad_file_does_not_cut_off_the_other_peers(directory: Path, tmp_path: Path) -> None:
    keys.generate("beta", tmp_path / "beta")
    pin(directory, "beta", tmp_path / "beta")
    trust = keys.load_trust(context(), directory, {3: "gamma", 2: "beta"})
    assert set(trust.certificates) == {2}
    assert "gamma" in trust.faults[0]


def test_a_rotation_shows_the_new_key_only_when_it_is_activated(directory: Path) -> None:
    old = keys.own_fingerprint(directory)
    new = keys.rotate("alpha", directory)
    assert keys.own_fingerprint(directory) == old != new
    assert keys.activate_next(directory) == new == keys.own_fingerprint(directory)
    assert not list(directory.glob("*.next"))


def test_a_second_rotation_does_not_replace_the_next_key_unless_told(directory: Path) -> None:
    keys.rotate("alpha", directory)
    with pytest.raises(ConfigError, match="exists already"):
        keys.rotate("alpha", directory)
    assert keys.rotate("alpha", directory, force=True) == keys.activate_next(directory)


def test_a_rotation_without_a_key_and_an_activation_without_a_rotation_are_refused(
    directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="run replicator keygen"):
        keys.rotate("alpha", tmp_path / "empty")
    with pytest.raises(ConfigError, match="--rotate"):
        keys.activate_next(directory)


def test_an_interrupted_activation_is_finished_by_the_next_one(directory: Path) -> None:
    new = keys.rotate("alpha", directory)
    (directory / "node.crt.next").rename(directory / "node.crt")  # the crash came after the first rename
    with pytest.raises(ConfigError, match="--activate again"):
        keys.own_fingerprint(directory)
    assert keys.activate_next(directory) == new == keys.own_fingerprint(directory)


def test_an_activation_with_parts_that_do_not_fit_changes_nothing(directory: Path, tmp_path: Path) -> None:
    old = keys.own_fingerprint(directory)
    keys.rotate("alpha", directory)
    keys.generate("alpha", tmp_path / "other")
    (directory / "node.crt.next").write_bytes((tmp_path / "other" / "node.crt").read_bytes())
    with pytest.raises(ConfigError, match="does not belong to"):
        keys.activate_next(directory)
    assert keys.own_fingerprint(directory) == old
