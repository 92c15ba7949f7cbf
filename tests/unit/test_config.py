# SPDX-License-Identifier: Apache-2.0
"""The configuration: every fault is found at once and named, and nothing but ConfigError comes out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.config import (
    ResourceConfig,
    config_dir,
    key_dir,
    load,
    local_node_name,
    parse,
    resource_names,
    resource_path,
    run_dir,
)
from replicator.config.reference import EXAMPLE, main, reference
from replicator.config.values import Duration, Fault, FilePath, Size
from replicator.errors import ConfigError

PATH = Path("/etc/replicator/r0.toml")
PAGE = Path(__file__).parents[2] / "docs/operating/configuration.md"


def good(**changes: str) -> str:
    """The example; a keyword replaces a piece of it (`old` → `new`) or adds (`net`, `disk`, `top`)."""
    text = EXAMPLE
    for place, addition in changes.items():
        if place == "top":
            text = addition + "\n" + text
        elif place == "net":
            text = text.replace("[net]\n", f"[net]\n{addition}\n")
        else:
            text = text.replace("[volume.0]", f"[{place}]\n{addition}\n[volume.0]", 1)
    return text


def faults(text: str | bytes, path: Path = PATH) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text if isinstance(text, bytes) else text.encode(), path)
    assert caught.value.exit_code == 10
    return caught.value.faults


def test_the_example_loads_with_every_default() -> None:
    config = parse(EXAMPLE.encode(), PATH)
    assert (config.name, config.protocol) == ("r0", "C")
    assert (config.net.security, config.net.timeout_ns, config.net.max_in_flight_bytes) == (
        "tls",
        6 * 10**9,
        2**25,
    )
    assert (config.disk.al_extents, config.disk.resync_max_rate_bytes_s) == (1008, 0)
    assert config.device.kind == "auto"
    assert config.volumes[0].size_bytes is None
    alpha, beta = config.nodes
    assert (alpha.name, alpha.node_id, str(alpha.address)) == ("alpha", 0, "192.0.2.1:7788")
    assert alpha.volumes[0].metadata == "internal"
    assert beta.volumes[0].metadata == "/dev/vg/r0-meta"
    assert config.peer_ids(alpha) == (1,)


def test_what_must_match_follows_the_file() -> None:
    config = parse(good(net="allow-two-primaries = true").encode(), PATH)
    assert dict(config.options_to_match()) == {
        "protocol": "C",
        "allow-two-primaries": "yes",
        "after-sb-0pri": "disconnect",
        "after-sb-1pri": "disconnect",
        "after-sb-2pri": "disconnect",
    }


def test_units_are_converted() -> None:
    text = good(net='epoch-time = "500ms"\nmax-in-flight = "64MiB"', disk='resync-max-rate = "1.5MiB/s"')
    config = parse(text.encode(), PATH)
    assert config.net.epoch_time_ns == 500_000_000
    assert config.net.max_in_flight_bytes == 64 * 2**20
    assert config.disk.resync_max_rate_bytes_s == 3 * 2**19


def test_all_faults_are_reported_at_once() -> None:
    text = good(net='ko-count = 300\nping-timeot = "1s"', disk='io = "dirct"', top="verbose = 1")
    assert faults(text) == [
        f"{PATH}: verbose: unknown key (possible: protocol, options, net, disk, device, volume, node)",
        f"{PATH}: net.ping-timeot: unknown key (did you mean ping-timeout?)",
        f"{PATH}: net.ko-count: 300 is out of bounds (a whole number from 0 to 255)",
        f'{PATH}: disk.io: \'dirct\' is not a possible value ("direct" or "buffered")',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            good(options="auto-promote = true"),
            "options.auto-promote: not supported (auto-promote is not supported",
        ),
        (
            good(net='after-sb-0pri = "discard-zero-changes"'),
            "net.after-sb-0pri: 'discard-zero-changes' is not supp",
        ),
        (good(net='connect-int = "1s"'), "net.connect-int: unknown key (here it is called connect-interval)"),
        (good(net="timeout = 6").replace('timeout = "6s"\n', ""), "net.timeout: 6 is not a duration"),
        (good(net='connect-interval = "5s"'), "net.timeout: must be shorter than connect-interval"),
        (good(net='ping-interval = "6s"'), "net.timeout: must be shorter than ping-interval"),
        (good(net='ping-timeout = "7s"'), "net.ping-timeout: must not be longer than timeout"),
        (
            good(net="allow-two-primaries = true").replace('"C"', '"A"'),
            "net.allow-two-primaries: impossible with",
        ),
        (good(net="ko-count = true"), "net.ko-count: True is not a whole number"),
        (good(net="ko-count = nan"), "net.ko-count: nan is not a whole number"),
        (good(net='security = "clear"'), "net.security: clear is refused for 192.0.2.1:7788"),
        (good(disk="al-extents = 66"), "disk.al-extents: 66 is out of bounds"),
        (
            EXAMPLE.replace("[volume.0]\n", '[volume.0]\nsize = "1000001B"\n', 1),
            "volume.0.size: '1000001B' is out",
        ),
        (EXAMPLE.replace("[volume.0]\n", "[volume.0]\nsize = 1048577\n", 1), "not a multiple of 4096 bytes"),
        (
            EXAMPLE.replace("192.0.2.2", "192.0.2.1"),
            "node.beta.address: 192.0.2.1:7788 is the address of alpha too",
        ),
        (EXAMPLE.replace("192.0.2.2", "beta.example"), "is not a numeric IP address (write the IP address"),
        (EXAMPLE.replace("192.0.2.2", "[2001:db8::2]"), "cannot reach each other"),
        (EXAMPLE.replace("192.0.2.2", "2001:db8::2"), "has its brackets wrong"),
        (EXAMPLE.replace("192.0.2.2", "0.0.0.0"), "is not the address of one node"),
        (EXAMPLE.replace("2:7788", "2:0"), "has no port from 1 to 65535"),
        (
            EXAMPLE.replace("2:7788", "2:32768"),
            "port 32768 is not below 32768 (two nodes can connect to themselves",
        ),
        (EXAMPLE.replace("id = 1", "id = 0"), "node.beta.id: 0 is the id of alpha too"),
        (EXAMPLE.replace("id = 1", "id = 16"), "node.beta.id: 16 is out of bounds"),
        (EXAMPLE.replace("id = 1\n", ""), "node.beta.id: missing"),
        (EXAMPLE.replace("beta", "Beta"), "node.Beta: not the name of a node"),
        (
            EXAMPLE.replace("r0-meta", "r0"),
            "node.beta.volume.0.metadata: '/dev/vg/r0' is used by volume.0.disk too",
        ),
        (EXAMPLE.replace("r0-meta", "../r0"), "is not a canonical path"),
        (EXAMPLE.replace('"/dev/vg/r0-meta"', '"meta"'), "is not an absolute path"),
        (EXAMPLE.replace("[volume.0]\n", "[volume.0]\n[volume.7]\n", 1), "node.alpha.volume.7: missing"),
        (EXAMPLE.replace("[volume.0]\n", "[volume.00]\n", 1), "volume.00: not a volume number"),
        (EXAMPLE + '[node.beta.volume.1]\ndisk = "/x"\n', "node.beta.volume.1: not a volume of the resource"),
        (EXAMPLE + '[node.c]\nid = 2\naddress = "192.0.2.3:1"\n', "node: a third node is not supported yet"),
        (EXAMPLE[: EXAMPLE.index("[node.beta]")], "node: 1 of two nodes"),
        (EXAMPLE.replace("[net]", "[[net]]"), "net: [{'timeout': '6s'}] is not a table"),
        ("volume = 1\nnode = 2", "node: 2 is not a table"),
        ("a = [1,\n 2\n b", "line 3, column 2: unclosed array"),
        ("a = 1\na = 2\n", "line 2, column 6: cannot overwrite a value (TOML syntax)"),
        (b"a = 1\nb = '\xff'", "line 2, column 6: not UTF-8"),
        ("a = " + "[" * 50_000, "file: nested too deeply"),
        ("a = " + "9" * 5_000, "file: "),
    ],
)
def test_a_fault_is_named_with_its_key_and_a_hint(text: str | bytes, expected: str) -> None:
    found = faults(text)
    assert any(expected in fault for fault in found), found
    assert all(fault.startswith(f"{PATH}: ") for fault in found)


def test_a_faulty_volume_is_not_called_missing_as_well() -> None:
    assert faults(EXAMPLE.replace('disk = "/dev/vg/r0"\nmeta', 'disk = "r0"\nmeta')) == [
        f"{PATH}: node.beta.volume.0.disk: 'r0' is not an absolute path (an absolute path)"
    ]


@pytest.mark.parametrize("name", ["R0", "-r", "r" * 65, ".hidden"])
def test_the_file_name_must_be_able_to_name_a_resource(name: str) -> None:
    assert "file name" in faults(EXAMPLE, Path(f"/etc/replicator/{name}.toml"))[0]
    with pytest.raises(ConfigError):
        resource_path(name)


def test_ports_and_clear_links_can_be_allowed_by_a_second_word() -> None:
    net = 'security = "clear"\nclear-off-loopback = true\nallow-ephemeral-port = true'
    assert parse(good(net=net).replace("7788", "40000").encode(), PATH).nodes[0].address.port == 40000
    loopback = good(net='security = "clear"').replace("192.0.2", "127.0.0")
    assert parse(loopback.encode(), PATH).nodes[0].address.is_loopback


@given(st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_a_configuration_or_a_config_error(data: bytes) -> None:
    try:
        parse(data, PATH)
    except ConfigError as error:
        assert error.faults


@given(st.data())
def test_any_damage_to_a_good_file_gives_a_configuration_or_a_config_error(data: st.DataObject) -> None:
    text = bytearray(EXAMPLE.encode())
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    text[start:end] = data.draw(st.binary(max_size=10) | st.sampled_from([b"[a.b]", b"= {}", b"[]", b"1979-05-27"]))
    try:
        assert isinstance(parse(bytes(text), PATH), ResourceConfig)
    except ConfigError as error:
        assert all("\n" not in fault for fault in error.faults)


@given(st.integers(0, 10**15))
def test_a_shown_duration_or_size_reads_back_as_itself(value: int) -> None:
    size = Size(0, 10**16)
    assert size.parse(size.show(value).strip('"')) == value
    duration = Duration(0, 10**30)
    whole_us = value * 1000
    if value:
        assert duration.parse(duration.show(whole_us).strip('"')) == whole_us


@pytest.mark.parametrize("value", ["5", "s", "1e3s", "-1s", "１s", "9" * 40 + "s", "1 s s", 1.5, [], None, "1.s"])
def test_what_is_not_a_duration_is_a_fault(value: object) -> None:
    with pytest.raises(Fault):
        Duration(0, 10**30).parse(value)


@pytest.mark.parametrize("value", ["/", "/a/../b", "/a//b", "//a", "/a/", "/a/.", "a", "", "/a\0b", "/a\nb", 3])
def test_a_path_that_could_be_written_otherwise_is_a_fault(value: object) -> None:
    with pytest.raises(Fault):
        FilePath().parse(value)


def test_a_node_is_found_by_its_short_or_long_host_name() -> None:
    config = parse(EXAMPLE.replace("node.beta", 'node."beta.example.org"').encode(), PATH)
    assert config.node("alpha.example.org").node_id == 0
    assert config.node("ALPHA").node_id == 0
    assert config.node("beta").node_id == 1
    for stranger in ("gamma", "beta.elsewhere.org"):
        with pytest.raises(ConfigError, match="REPLICATOR_NODE"):
            config.node(stranger)


def test_files_are_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "r0.toml"
    path.write_text(EXAMPLE)
    path.chmod(0o644)
    assert load(path).name == "r0"
    assert resource_names(tmp_path) == ("r0",)
    with pytest.raises(ConfigError, match=r"does not exist \(resources configured in .*: r0\)"):
        load(tmp_path / "r1.toml")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="everybody may write"):
        load(path)
    path.chmod(0o644)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load(path)
    os.mkfifo(tmp_path / "fifo.toml")
    for odd in ("fifo.toml", "."):
        with pytest.raises(ConfigError, match=r"not a regular file|cannot be read"):
            load(tmp_path / odd)


def test_directories_and_the_node_name_come_from_the_environment() -> None:
    assert [str(fn({})) for fn in (config_dir, run_dir, key_dir)] == [
        "/etc/replicator",
        "/run/replicator",
        "/etc/replicator/keys",
    ]
    environ = {"REPLICATOR_CONFIG_DIR": "/c", "REPLICATOR_RUN_DIR": "/r", "REPLICATOR_KEY_DIR": "/k"}
    assert [str(fn(environ)) for fn in (config_dir, run_dir, key_dir)] == ["/c", "/r", "/k"]
    assert local_node_name({"REPLICATOR_NODE": "beta"}) == "beta"
    assert local_node_name({})
    with pytest.raises(ConfigError, match="not an absolute path"):
        run_dir({"REPLICATOR_RUN_DIR": "run"})


def test_the_reference_page_is_in_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert PAGE.read_text() == reference()
    assert main(["--reference"]) == 0
    assert capsys.readouterr().out == reference()
    assert main([]) == 20
