# SPDX-License-Identifier: Apache-2.0
"""Netlink messages byte by byte (as a kernel on a little-endian machine reads them), and the kernel-nbd
device."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.drivers import nbd_netlink as nl
from replicator.drivers.kernel_nbd import NBD_FLAG_CAN_MULTI_CONN, Dialled, KernelNbd, Tuning
from replicator.drivers.nbd_netlink import Attachment
from replicator.drivers.node import Export
from replicator.errors import DiskError

little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="needs a little-endian machine")

MIB = 1 << 20
ATTACHMENT = Attachment(
    size_bytes=64 * MIB,
    block_size_bytes=512,
    server_flags=0x6D,
    timeout_s=5,
    dead_conn_timeout_s=60,
    identifier="replicator:r0/1",
)


# ------------------------------------------------------------------------------------------- bytes


@little_endian
def test_an_attribute_is_length_type_payload_and_padding() -> None:
    assert nl.attribute(2, b"nbd\0") == bytes.fromhex("0800 0200 6e626400")
    assert nl.attribute(2, b"abcde") == bytes.fromhex("0900 0200 6162636465 000000")


@little_endian
def test_the_family_request_is_what_the_controller_expects() -> None:
    assert nl.family_request(1, "nbd") == bytes.fromhex(
        "1c000000 1000 0500 01000000 00000000"  # 28 bytes, GENL_ID_CTRL, REQUEST|ACK, sequence 1, port 0
        "03 01 0000"  # CTRL_CMD_GETFAMILY, version 1
        "0800 0200 6e626400"  # CTRL_ATTR_FAMILY_NAME "nbd\0"
    )


@little_endian
def test_connect_carries_every_setting_and_each_socket() -> None:
    assert nl.connect_body(ATTACHMENT, [7, 9], index=None) == bytes.fromhex(
        "0c00 0200 0000000400000000"  # SIZE_BYTES 64 MiB
        "0c00 0300 0002000000000000"  # BLOCK_SIZE_BYTES 512
        "0c00 0400 0500000000000000"  # TIMEOUT 5 s
        "0c00 0800 3c00000000000000"  # DEAD_CONN_TIMEOUT 60 s
        "1400 0a00 7265706c696361746f723a72302f3100"  # BACKEND_IDENTIFIER "replicator:r0/1\0"
        "0c00 0500 6d00000000000000"  # SERVER_FLAGS
        "1c00 0780"  # SOCKETS, nested
        "0c00 0180 0800 0100 07000000"  # item: fd 7
        "0c00 0180 0800 0100 09000000"  # item: fd 9
    )


@little_endian
def test_connect_to_a_chosen_device_begins_with_its_index() -> None:
    body = nl.connect_body(ATTACHMENT, [7], index=3)
    assert body.startswith(bytes.fromhex("0800 0100 03000000"))
    assert body[8:] == nl.connect_body(ATTACHMENT, [7], index=None)


def test_connect_without_a_socket_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError):
        nl.connect_body(ATTACHMENT, [], index=None)


def test_reconfigure_names_the_device_and_its_owner() -> None:
    fields = nl.attributes(nl.reconfigure_body(ATTACHMENT, [5], index=4))
    assert nl.number(fields[nl.Attribute.INDEX]) == 4
    assert fields[nl.Attribute.BACKEND_IDENTIFIER] == b"replicator:r0/1\0"
    assert nl.Attribute.SOCKETS in fields
    assert nl.Attribute.SERVER_FLAGS not in fields


def test_reconfigure_without_sockets_only_changes_settings() -> None:
    assert nl.Attribute.SOCKETS not in nl.attributes(nl.reconfigure_body(ATTACHMENT, [], index=4))


@little_endian
def test_an_acknowledgement_gives_the_errno() -> None:
    (ack,) = nl.messages(bytes.fromhex("24000000 0200 0000 05000000 00000000 00000000") + bytes(16))
    assert (ack.kind, ack.sequence, nl.errno_of(ack)) == (nl.NLMSG_ERROR, 5, 0)
    (refusal,) = nl.messages(bytes.fromhex("24000000 0200 0000 05000000 00000000 f0ffffff") + bytes(16))
    assert nl.errno_of(refusal) == 16


@little_endian
def test_two_messages_in_one_datagram_are_both_found() -> None:
    one = nl.message(0x1B, 7, nl.Command.CONNECT, 1, nl.index_body(2))
    found = list(nl.messages(one + one))
    assert [m.sequence for m in found] == [7, 7]
    assert nl.attributes(nl.body_of(found[1])) == {nl.Attribute.INDEX: b"\x02\0\0\0"}


def test_status_says_which_devices_are_connected() -> None:
    def item(index: int, connected: int) -> bytes:
        fields = [nl.attribute(1, struct.pack("=I", index)), nl.attribute(2, struct.pack("=B", connected))]
        return nl.nested(1, fields)

    body = nl.nested(nl.Attribute.DEVICE_LIST, [item(0, 1), item(5, 0)])
    assert nl.device_list(body) == {0: True, 5: False}


@given(st.lists(st.tuples(st.integers(1, nl.NLA_TYPE_MASK), st.binary(max_size=70)), max_size=8))
def test_what_is_built_is_parsed_back(fields: list[tuple[int, bytes]]) -> None:
    assert list(nl.iter_attributes(b"".join(nl.attribute(*field) for field in fields))) == fields


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_parsed_or_refused_and_never_loop(data: bytes) -> None:
    for parse in (nl.iter_attributes, nl.messages):
        try:
            list(parse(data))
        except ValueError:
            pass


@pytest.mark.parametrize("data", [b"\x03\0\x01\0", b"\x09\0\x01\0abcd"])
def test_an_attribute_whose_length_lies_is_refused(data: bytes) -> None:
    if sys.byteorder == "big":
        data = data[1::-1] + data[3:1:-1] + data[4:]
    with pytest.raises(ValueError, match="attribute"):
        list(nl.iter_attributes(data))


# ------------------------------------------------------------------------------------------- the device


class FakeKernel:
    """Kernel nbd as far as a device sees it: sysfs entries that come and go, sockets that it may give up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.refuses_reconfigure = False
        self.hides_devices = False
        (root / "dev").mkdir()
        (root / "sys").mkdir()

    def has(self, index: int, identifier: str) -> None:
        """An earlier run's device exists."""
        entry = self.root / "sys" / f"nbd{index}"
        entry.mkdir()
        (entry / "backend").write_text(identifier + "\n")
        (entry / "size").write_text("8\n")
        (self.root / "dev" / f"nbd{index}").touch()

    def connect(self, attachment: Attachment, fds: list[int], *, index: int | None = None) -> int:
        assert index is None
        self.calls.append(f"connect {len(fds)}")
        if not self.hides_devices:
            self.has(3, attachment.identifier)
        return 3

    def reconfigure(self, index: int, attachment: Attachment, fds: list[int]) -> None:
        self.calls.append(f"reconfigure nbd{index} {len(fds)} {attachment.size_bytes // MIB} MiB")
        if self.refuses_reconfigure:
            raise DiskError("nbd reconfigure failed: Invalid argument")

    def disconnect(self, index: int) -> None:
        self.calls.append(f"disconnect nbd{index}")
        (self.root / "sys" / f"nbd{index}" / "backend").unlink(missing_ok=True)

    def close(self) -> None:
        pass


class Server:
    """The far ends of what was dialled."""

    def __init__(self, flags: int = NBD_FLAG_CAN_MULTI_CONN) -> None:
        self.flags = flags
        self.ends: list[socket.socket] = []
        self.handed_out: list[socket.socket] = []
        self.connections_max = 100

    def dial(self) -> Dialled:
        if len(self.ends) >= self.connections_max:
            raise DiskError("the server is full")
        ours, theirs = socket.socketpair()
        self.ends.append(ours)
        self.handed_out.append(theirs)
        return Dialled(theirs, 64 * MIB, self.flags)

    def close(self) -> None:
        for end in self.ends + self.handed_out:
            end.close()


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def device(kernel: FakeKernel, server: Server) -> tuple[KernelNbd, Export]:
    root = kernel.root
    export = Export("r0", 1, root / "sock", dev_dir=root / "replicated", run_dir=root)
    made = KernelNbd(export, server.dial, lambda: kernel, Tuning(), sys_block=root / "sys", dev=root / "dev")
    return made, export


def test_attach_connects_a_new_device_and_links_it(kernel: FakeKernel, server: Server) -> None:
    nbd, export = device(kernel, server)
    assert nbd.attach() == kernel.root / "dev/nbd3"
    assert kernel.calls == ["connect 2"]
    assert export.link.readlink() == kernel.root / "dev/nbd3"


def test_a_server_that_cannot_share_gets_one_connection(kernel: FakeKernel) -> None:
    server = Server(flags=0)
    device(kernel, server)[0].attach()
    assert kernel.calls == ["connect 1"]
    server.close()


def test_attach_takes_over_what_an_earlier_run_left(kernel: FakeKernel, server: Server) -> None:
    kernel.has(1, "replicator:other/1")
    kernel.has(2, "replicator:r0/1")
    nbd, export = device(kernel, server)
    assert nbd.attach() == kernel.root / "dev/nbd2"
    assert kernel.calls == ["reconfigure nbd2 2 64 MiB"]
    assert export.link.exists()


def test_a_left_over_past_saving_is_ended_and_replaced(kernel: FakeKernel, server: Server) -> None:
    kernel.has(2, "replicator:r0/1")
    kernel.refuses_reconfigure = True
    assert device(kernel, server)[0].attach() == kernel.root / "dev/nbd3"
    assert kernel.calls == ["reconfigure nbd2 2 64 MiB", "disconnect nbd2", "connect 2"]


def test_detach_removes_link_and_device(kernel: FakeKernel, server: Server) -> None:
    nbd, export = device(kernel, server)
    nbd.attach()
    nbd.detach()
    assert kernel.calls[-1] == "disconnect nbd3"
    assert not export.link.is_symlink()
    assert not export.link.parent.exists()
    assert all(sock.fileno() == -1 for sock in server.handed_out)


def test_detach_of_what_was_never_attached_only_removes_left_overs(kernel: FakeKernel, server: Server) -> None:
    device(kernel, server)[0].detach()
    assert kernel.calls == []
    kernel.has(2, "replicator:r0/1")
    device(kernel, server)[0].detach()
    assert kernel.calls == ["disconnect nbd2"]


def test_mend_replaces_exactly_the_connections_that_hung_up(kernel: FakeKernel, server: Server) -> None:
    nbd, _ = device(kernel, server)
    nbd.attach()
    assert not nbd.mend()
    server.ends[0].close()
    assert nbd.mend()
    assert kernel.calls[-1] == "reconfigure nbd3 1 64 MiB"
    assert not nbd.mend()


def test_mend_that_cannot_dial_fails_and_tries_again_later(kernel: FakeKernel, server: Server) -> None:
    nbd, _ = device(kernel, server)
    nbd.attach()
    server.ends[0].close()
    server.connections_max = 2
    with pytest.raises(DiskError):
        nbd.mend()
    server.connections_max = 100
    assert nbd.mend()


def test_resize_reaches_the_kernel_and_later_mends(kernel: FakeKernel, server: Server) -> None:
    nbd, _ = device(kernel, server)
    nbd.attach()
    nbd.resize(128 * MIB)
    assert kernel.calls[-1] == "reconfigure nbd3 0 128 MiB"


def test_a_failed_attach_leaves_nothing(kernel: FakeKernel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.drivers.kernel_nbd._APPEAR_S", 0.0)
    kernel.hides_devices = True
    nbd, export = device(kernel, server)
    with pytest.raises(DiskError, match="did not appear"):
        nbd.attach()
    assert kernel.calls == ["connect 2", "disconnect nbd3"]
    assert not export.link.is_symlink()
    assert all(sock.fileno() == -1 for sock in server.handed_out)


def test_a_failed_second_dial_closes_the_first(kernel: FakeKernel, server: Server) -> None:
    server.connections_max = 1
    with pytest.raises(DiskError, match="full"):
        device(kernel, server)[0].attach()
    assert kernel.calls == []
    assert server.handed_out[0].fileno() == -1
