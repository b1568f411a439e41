"""Which addresses a picture may be fetched from."""

import socket

import pytest

from era_vllm_server.addresses import NotPublicError, is_public, public_socket

PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]
NOT_PUBLIC = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1"),
    *("192.0.2.1", "203.0.113.9", "192.88.99.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fd00::1"),
    *("fd00:ec2::254", "ff02::1", "ff0e::1", "2001:db8::1", "100::1", "5f00::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::808:808", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_not_public(address):
    assert not is_public(address)


def test_no_socket_is_made_for_an_address_that_is_not_public():
    def info(address):
        return socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 80)

    with pytest.raises(NotPublicError) as error:
        public_socket(info("169.254.169.254"))
    assert "169" not in str(error.value)
    public_socket(info("8.8.8.8")).close()
