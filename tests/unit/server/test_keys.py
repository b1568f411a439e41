"""API keys: what a file may hold, and which request brings one of them."""

import pytest

from era_vllm.errors import ConfigError
from era_vllm_server.keys import Keys, as_bearer, presented


def keys(tmp_path, text):
    file = tmp_path / "keys"
    file.write_bytes(text)
    return Keys.read(file)


def test_one_a_line_with_comments(tmp_path):
    read = keys(tmp_path, b"# of the team\r\nalpha\n\n   beta  \n#gamma\n")
    assert len(read) == 2
    for key in (b"alpha", b"beta"):
        assert read.holder([b"wrong", key]) == key
    for key in (b"", b"#gamma", b"gamma", b"alph", b"alphaa", b"ALPHA", b"alpha\nbeta"):
        assert read.holder([key]) is None
    assert read.holder([]) is None
    assert keys(tmp_path, b"\xef\xbb\xbfalpha\n").holder([b"alpha"])  # a byte order mark


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"", "holds no key"), (b"# only\n\n", "holds no key"), (b"a\nsecret one\n", "line 2")],
)
def test_files_that_refuse(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as error:
        keys(tmp_path, text)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("text", [None, b"\xff\xfe\n"])
def test_files_that_cannot_be_read(tmp_path, text):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(tmp_path / "absent") if text is None else keys(tmp_path, text)


def test_where_a_request_brings_its_key():
    headers = [
        (b"authorization", b"bEaReR one"),
        (b"authorization", b"Basic dHdv"),
        (b"x-api-key", b" three "),
    ]
    assert presented({"headers": headers}) == [b"one", b"three"]
    seen = as_bearer({"headers": headers, "path": "/"}, b"three")
    assert seen["headers"] == [(b"x-api-key", b" three "), (b"authorization", b"Bearer three")]
    assert seen["path"] == "/"
