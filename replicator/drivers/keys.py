# SPDX-License-Identifier: Apache-2.0
"""The keys of the link: one private key a node, and the certificates of the peers it believes.

There is no certificate authority.  A node's certificate is self-signed, and a peer is whoever holds the
private key of a certificate that lies in `peers/NAME.crt`, as with ssh.  In the key directory:

    node.key, node.crt              what this node shows (the key is 0600 and never leaves the node)
    node.key.next, node.crt.next    made by a rotation, not shown before it is activated
    peers/NAME.crt                  one or more certificates of node NAME (more than one while it rotates)

Invariants: what is checked (owner, mode, no symbolic link) is the very file that is then read, because both
go through one descriptor; a certificate stands for exactly one peer and never for this node itself (a
reflected connection must not authenticate); no message contains a byte of a private key.

Certificates carry no meaningful dates (1970 to 9999): a node whose clock is wrong after a power failure must
still reach its peer.  What ends the life of a key is removing it from `peers/`.  `cryptography` is needed to
make keys only.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import ssl
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NewType

from replicator.errors import ConfigError

Fingerprint = NewType("Fingerprint", str)
"""SHA-256 of a certificate's DER form: 32 lower-case hex pairs joined by colons."""

KEY_FILE: Final = "node.key"
CERTIFICATE_FILE: Final = "node.crt"
PEERS_DIRECTORY: Final = "peers"
NEXT_SUFFIX: Final = ".next"

CERTIFICATES_MAX: Final = 8  #: in one file; a rotation needs two
_FILE_MAX_BYTES: Final = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_FOREVER: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280 4.1.2.5: no well-defined expiration
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Trust:
    """Who may be at the other end, as the key directory says at this moment.

    `certificates` maps a peer's id to its pinned certificates (DER), `owners` a fingerprint to the one peer
    it stands for.  `faults` has a sentence for each peer that could not be loaded; such a peer is in neither
    map.
    """

    own: Fingerprint
    certificates: Mapping[int, tuple[bytes, ...]]
    owners: Mapping[Fingerprint, int]
    faults: tuple[str, ...]


def fingerprint(certificate: bytes) -> Fingerprint:
    """The fingerprint of a certificate in DER form."""
    digest = hashlib.sha256(certificate).hexdigest()
    return Fingerprint(":".join(digest[i : i + 2] for i in range(0, len(digest), 2)))


def generate(node: str, directory: Path, *, force: bool = False) -> Fingerprint:
    """Make the private key and the certificate of `node`; with `force` replace those that are there.

    Makes `directory` (0700) and its `peers` when they are missing.  Raises ConfigError when there are keys
    already, or when the directory can be written to by others.
    """
    _check_name(node)
    _make_directory(directory)
    _make_directory(directory / PEERS_DIRECTORY)
    return _generate(node, directory, "", force)


def rotate(node: str, directory: Path, *, force: bool = False) -> Fingerprint:
    """Make the next key and certificate beside the ones in use; nothing shows them before `activate_next`.

    Raises ConfigError when there is no key yet, or a next one already (`force` replaces that).
    """
    _check_name(node)
    _check_directory(directory)
    own_fingerprint(directory)
    return _generate(node, directory, NEXT_SUFFIX, force)


def activate_next(directory: Path) -> Fingerprint:
    """Put the next key and certificate in place of the ones in use; links that are up are not touched.

    Two files cannot be renamed in one step.  The certificate goes first: after a crash in between, calling
    this again finishes the work.  Raises ConfigError when there is no next key, or it does not fit its
    certificate.
    """
    _check_directory(directory)
    key, key_next = directory / KEY_FILE, directory / (KEY_FILE + NEXT_SUFFIX)
    certificate, certificate_next = directory / CERTIFICATE_FILE, directory / (CERTIFICATE_FILE + NEXT_SUFFIX)
    if not os.path.lexists(key_next):
        raise ConfigError([f"{key_next} does not exist"], hint="make the next key first: replicator keygen --rotate")
    interrupted = not os.path.lexists(certificate_next)
    active = _load_pair(_context(), certificate if interrupted else certificate_next, key_next)
    if not interrupted:
        os.replace(certificate_next, certificate)
        _sync_directory(directory)
    os.replace(key_next, key)
    _sync_directory(directory)
    return active


def own_fingerprint(directory: Path) -> Fingerprint:
    """The fingerprint of what this node shows; raises ConfigError as `load_own` does."""
    return load_own(_context(), directory)


def load_own(context: ssl.SSLContext, directory: Path) -> Fingerprint:
    """Load this node's key and certificate into a context and return the certificate's fingerprint.

    Raises ConfigError when a file is missing, is a symbolic link, belongs to somebody else, when the key can
    be read by others or needs a passphrase, or when key and certificate do not belong together.
    """
    return _load_pair(context, directory / CERTIFICATE_FILE, directory / KEY_FILE)


def load_trust(context: ssl.SSLContext, directory: Path, names: Mapping[int, str]) -> Trust:
    """Load this node's key into `context`, and what is pinned for the peers in `names` (id to node name).

    The caller decides which certificates become trust anchors.  Raises ConfigError for this node's own files;
    what is wrong with a peer's is in `Trust.faults`, so that one bad file does not cut off the other peers.
    """
    own = load_own(context, directory)
    certificates: dict[int, tuple[bytes, ...]] = {}
    owners: dict[Fingerprint, int] = {}
    faults: list[str] = []
    for peer, name in names.items():
        try:
            pinned = load_peer(directory, name)
        except ConfigError as error:
            faults.append(str(error))
            continue
        fault = _conflict(own, pinned, owners, names, name)
        if fault:
            faults.append(fault)
            continue
        certificates[peer] = pinned
        owners.update((fingerprint(one), peer) for one in pinned)
    return Trust(own, certificates, owners, tuple(faults))


def load_peer(directory: Path, name: str) -> tuple[bytes, ...]:
    """The certificates (DER) pinned for node `name`; raises ConfigError with what to do about it."""
    _check_name(name)
    path = directory / PEERS_DIRECTORY / f"{name}.crt"
    hint = f"copy {CERTIFICATE_FILE} of {name} to {path}"
    with _opened(path, secret=False, hint=hint) as descriptor:
        return _parse_certificates(path, _read(path, descriptor), hint)


def _conflict(
    own: Fingerprint,
    pinned: tuple[bytes, ...],
    owners: Mapping[Fingerprint, int],
    names: Mapping[int, str],
    name: str,
) -> str:
    for one in map(fingerprint, pinned):
        if one == own:
            return f"the certificate pinned for {name} is this node's own: sha256 {one}"
        if one in owners:
            return f"one certificate is pinned for both {names[owners[one]]} and {name}: sha256 {one}"
    return ""


def _generate(node: str, directory: Path, suffix: str, force: bool) -> Fingerprint:
    key_path, certificate_path = directory / (KEY_FILE + suffix), directory / (CERTIFICATE_FILE + suffix)
    if not force:
        for path in (key_path, certificate_path):
            if os.path.lexists(path):
                raise _exists(path)
    key_pem, certificate_pem = _make_pair(node)
    _publish(key_path, key_pem, 0o600, force)
    _publish(certificate_path, certificate_pem, 0o644, force)
    _sync_directory(directory)
    return fingerprint(ssl.PEM_cert_to_DER_cert(certificate_pem.decode("ascii")))


def _make_pair(node: str) -> tuple[bytes, bytes]:
    """A new ECDSA P-256 key and its certificate (PEM): what every TLS 1.3 library speaks, FIPS builds
    included.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digitalSignature only
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_EPOCH)
        .not_valid_after(_FOREVER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


def _publish(path: Path, content: bytes, mode: int, force: bool) -> None:
    """Make `path` appear with its whole content, stable; never through a symbolic link, never half
    written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask says
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # fails if the name exists, whatever it is
    except FileExistsError:
        raise _exists(path) from None
    finally:
        temporary.unlink(missing_ok=True)


def _exists(path: Path) -> ConfigError:
    return ConfigError(
        [f"{path} exists already"], hint="add --force to replace it; peers then need the new certificate"
    )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{directory} cannot be made: {error.strerror}"]) from None
    _check_directory(directory)


def _check_directory(directory: Path) -> None:
    try:
        status = os.stat(directory)
    except OSError as error:
        raise ConfigError([f"{directory} cannot be read: {error.strerror}"], hint="run replicator keygen") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError([f"{directory} is not a directory"])
    if status.st_mode & 0o022:
        raise ConfigError(
            [f"{directory} can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"],
            hint=f"chmod go-w {directory}",
        )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path, *, secret: bool, hint: str) -> Iterator[int]:
    """A descriptor of `path`, checked: a plain file of ours (or root's) that others cannot change (or
    read).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        what = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise ConfigError([f"{path} {what}"], hint=hint) from None
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError([f"{path} is not a plain file"], hint=hint)
        if status.st_uid not in (0, os.geteuid()):
            raise ConfigError([f"{path} belongs to user {status.st_uid}"], hint=f"chown it to user {os.geteuid()}")
        if mode & (0o077 if secret else 0o022):
            verb = "read" if secret else "changed"
            wanted = "600" if secret else "644"
            raise ConfigError([f"{path} can be {verb} by others (mode {mode:04o})"], hint=f"chmod {wanted} {path}")
        if status.st_size > _FILE_MAX_BYTES:
            raise ConfigError([f"{path} has {status.st_size} bytes, more than {_FILE_MAX_BYTES}"], hint=hint)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(path: Path, descriptor: int) -> str:
    content = os.pread(descriptor, _FILE_MAX_BYTES + 1, 0)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError([f"{path} is not a PEM file"]) from None


def _parse_certificates(path: Path, text: str, hint: str) -> tuple[bytes, ...]:
    if "PRIVATE KEY" in text:
        raise ConfigError([f"{path} holds a private key"], hint=f"{hint}; a key never leaves its node: make a new one")
    blocks = _PEM.findall(text)
    if not blocks or len(blocks) != text.count("-----BEGIN"):
        raise ConfigError([f"{path} is not a PEM file of certificates"], hint=hint)
    if len(blocks) > CERTIFICATES_MAX:
        raise ConfigError([f"{path} holds {len(blocks)} certificates, more than {CERTIFICATES_MAX}"], hint=hint)
    certificates = []
    for number, block in enumerate(blocks, 1):
        try:
            certificate = ssl.PEM_cert_to_DER_cert(block)
            _context().load_verify_locations(cadata=certificate)
        except (ssl.SSLError, ValueError):  # binascii.Error is a ValueError
            raise ConfigError([f"certificate {number} of {path} is damaged"], hint=hint) from None
        certificates.append(certificate)
    return tuple(certificates)


def _load_pair(context: ssl.SSLContext, certificate_path: Path, key_path: Path) -> Fingerprint:
    hint = "run replicator keygen on this node"
    with (
        _opened(certificate_path, secret=False, hint=hint) as certificate_file,
        _opened(key_path, secret=True, hint=hint) as key_file,
    ):
        certificates = _parse_certificates(certificate_path, _read(certificate_path, certificate_file), hint)
        if len(certificates) != 1:
            raise ConfigError([f"{certificate_path} holds {len(certificates)} certificates instead of one"], hint=hint)
        try:  # by descriptor: the file that was checked, even if the name means another one by now
            context.load_cert_chain(
                f"/proc/self/fd/{certificate_file}", f"/proc/self/fd/{key_file}", password=lambda: b""
            )
        except ssl.SSLError as error:
            if error.reason and "MISMATCH" in error.reason:
                fault = f"{key_path} does not belong to {certificate_path}"
                raise ConfigError(
                    [fault], hint="if a rotation was interrupted, run replicator keygen --activate again"
                ) from None
            fault = f"{key_path} is damaged, needs a passphrase or is of a kind this OpenSSL does not know"
            raise ConfigError([fault], hint=hint) from None
        except OSError as error:
            raise ConfigError([f"{key_path} cannot be read: {error.strerror}"], hint=hint) from None
    return fingerprint(certificates[0])


def _context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError([f"node name {name[:80]!r} is not 1 to 64 letters, digits, dots, dashes or underscores"])
