from __future__ import annotations

import pytest
from yarl import URL

from indexer.config import NetworkSettings
from indexer.errors import ConfigError, UrlRefused
from indexer.identity.guard import GuardedResolver, check_url, is_public_address, parse_connect_to
from tests.identity.servers import FixedNames, settings

PUBLIC = settings().network
PRIVATE = settings(network={"allow_private": True}).network


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.255.255.255", "10.0.0.1", "10.255.255.255", "100.64.0.0", "100.127.255.255",
        "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1", "172.31.255.255",
        "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255",
        "198.51.100.7", "203.0.113.7", "224.0.0.1", "239.255.255.255", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "64:ff9b::808:808",
        "fc00::1", "fd12::1", "fe80::1", "fe80::1%eth0", "ff02::1", "2001::1", "2001:db8::1",
        "2002:7f00:1::", "4000::1", "not an address", "", "8.8.8", "0x08080808",
    ],
)  # fmt: skip
def test_addresses_that_are_not_dialled(address: str) -> None:
    assert not is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0",
        "126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255",
        "172.32.0.0", "192.0.1.0", "192.0.3.0", "192.88.98.255", "192.88.100.0", "192.167.255.255",
        "192.169.0.0", "198.17.255.255", "198.20.0.0", "198.51.99.255", "198.51.101.0",
        "203.0.112.255", "203.0.114.0", "223.255.255.255", "2606:4700::1111", "2a00:1450::1",
    ],
)  # fmt: skip
def test_addresses_that_are_dialled(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://example.com", "scheme"),
        ("ftp://example.com", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("example.com", "scheme"),
        ("", "scheme"),
        ("wss://example.com", "scheme"),
        ("https://ann@example.com", "credentials"),
        ("https://ann:secret@example.com", "credentials"),
        ("https://:secret@example.com", "credentials"),
        ("https://", "host|URL"),
        ("https:///path", "host|URL"),
        ("https://example.com:8443", "port 8443"),
        ("https://example.com:22", "port 22"),
        ("https://127.0.0.1", "not public"),
        ("https://[::1]", "not public"),
        ("https://[fe80::1%25eth0]", "host|public|URL"),
        ("https://169.254.169.254/latest/meta-data", "not public"),
        ("https://2130706433", "not public"),
        ("https://127.1", "not public"),
        ("https://0x7f000001", "not public"),
        ("https://0x7f.1", "not public"),
        ("https://127.0.0.1.", "not public"),
        ("https://[::1", "URL"),
        ("https://example.com:99999", "URL|port"),
        ("https://example.com/" + "x" * 9000, "longer"),
    ],
)
def test_refused_urls_and_why(url: str, problem: str) -> None:
    with pytest.raises(UrlRefused, match=problem):
        check_url(url, PUBLIC)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com:443/path?query=1",
        "https://example.com:80",
        "https://1.1.1.1",
        "https://[2606:4700::1111]/",
        "https://xn--bcher-kva.example.org",
    ],
)
def test_allowed_urls(url: str) -> None:
    assert check_url(url, PUBLIC) == URL(url)


def test_private_networks_may_be_plain_and_on_any_port() -> None:
    for url in ("http://127.0.0.1:2583/xrpc", "http://localhost", "https://10.0.0.1:8443", "http://[::1]:9"):
        assert check_url(url, PRIVATE)
    for url in ("ftp://localhost", "http://ann@localhost", "http://"):
        with pytest.raises(UrlRefused):
            check_url(url, PRIVATE)


def test_websocket_urls() -> None:
    assert check_url("wss://relay.example.com", PUBLIC, kind="ws").scheme == "wss"
    assert check_url("ws://127.0.0.1:3000", PRIVATE, kind="ws").port == 3000
    for url in ("ws://relay.example.com", "https://relay.example.com", "wss://127.0.0.1", "wss://a.b:2470"):
        with pytest.raises(UrlRefused):
            check_url(url, PUBLIC, kind="ws")


def resolver(network: NetworkSettings = PUBLIC, **names: list[str]) -> GuardedResolver:
    return GuardedResolver(
        network, FixedNames({name.replace("_", "."): found for name, found in names.items()})
    )


async def test_names_are_judged_by_what_they_resolve_to() -> None:
    guarded = resolver(good_com=["1.1.1.1"], bad_com=["10.0.0.1", "::1"], both_com=["127.0.0.1", "8.8.8.8"])
    assert await guarded.addresses("good.com", 443) == [("1.1.1.1", 443)]
    assert await guarded.addresses("both.com", 443) == [("8.8.8.8", 443)]
    with pytest.raises(UrlRefused, match=r"bad\.com resolves to 10\.0\.0\.1"):
        await guarded.addresses("bad.com", 443)
    with pytest.raises(OSError, match="no such name"):
        await guarded.addresses("none.com", 443)


async def test_a_name_without_an_address_is_an_error() -> None:
    with pytest.raises(OSError, match="no address"):
        await resolver(empty_com=[]).addresses("empty.com", 443)


@pytest.mark.parametrize("host", ["a" * 70 + ".com", "a..b.com"])
async def test_a_name_that_cannot_be_looked_up_is_refused(host: str) -> None:
    guarded = GuardedResolver(PRIVATE)
    with pytest.raises(UrlRefused, match="looked up"):
        await guarded.addresses(host, 443)


async def test_literal_addresses_are_judged_too() -> None:
    assert await resolver().addresses("1.1.1.1", 443) == [("1.1.1.1", 443)]
    with pytest.raises(UrlRefused):
        await resolver().addresses("127.0.0.1", 443)
    assert await resolver(PRIVATE).addresses("127.0.0.1", 80) == [("127.0.0.1", 80)]


async def test_private_names_on_a_private_network() -> None:
    assert await resolver(PRIVATE, pds_test=["10.0.0.1"]).addresses("pds.test", 80) == [("10.0.0.1", 80)]


async def test_overrides_come_before_any_lookup() -> None:
    network = settings(network={"connect_to": ["Good.com:443=127.0.0.1:8443", "six.com:80=[::1]:81"]}).network
    names = FixedNames({"good.com": ["1.1.1.1"]})
    guarded = GuardedResolver(network, names)
    assert await guarded.addresses("good.com.", 443) == [("127.0.0.1", 8443)]
    assert await guarded.addresses("six.com", 80) == [("::1", 81)]
    assert names.asked == []
    assert await guarded.addresses("good.com", 80) == [("1.1.1.1", 80)]


@pytest.mark.parametrize(
    "item",
    [
        "", "a.com", "a.com=127.0.0.1:1", "a.com:443", "a.com:443=127.0.0.1", "a.com:443=b.com:443",
        "a:x=1.1.1.1:1", "1.2.3.4:443=127.0.0.1:1",
    ],
)  # fmt: skip
def test_a_malformed_override_is_named(item: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.connect_to"):
        parse_connect_to([item])
