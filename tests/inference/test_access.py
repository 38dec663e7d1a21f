"""Who may call the server."""

import pytest

from mla_moe import ConfigError
from mla_moe.cli import main
from mla_moe.inference.access import Access, network_of, read_keys

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("access", "headers", "status"),
    [
        (Access(), {"host": "localhost:8000"}, None),
        (Access(), {"host": "127.0.0.1:8000"}, None),
        (Access(), {"host": "[::1]:8000"}, None),
        (Access(), {"host": "10.0.0.7"}, None),  # a rebound name is no address
        (Access(), {"host": "app.localhost"}, None),
        (Access(), {"host": "evil.example"}, 403),
        (Access(), {"host": "localhost.evil.example"}, 403),
        (Access(), {"host": "evillocalhost"}, 403),
        (Access(), {"host": ""}, 403),
        (Access(allowed_hosts=["model.example"]), {"host": "Model.Example.:80"}, None),
        (Access(allowed_hosts=["model.example"]), {"host": "a.model.example"}, 403),
        (Access(allowed_hosts=[".example"]), {"host": "a.model.example"}, None),
        (Access(allowed_hosts=["*"]), {"host": "evil.example"}, None),
        (Access(), {"origin": "http://evil.example"}, 403),
        (Access(), {"origin": "null"}, 403),
        (Access(cors_origins=["http://ui.example"]), {"origin": "http://ui.example"}, None),
        (Access(cors_origins=["http://ui.example"]), {"origin": "http://evil.example"}, 403),
        (Access(cors_origins=["*"]), {"origin": "http://evil.example"}, None),
        (Access(), {"content-type": "text/plain"}, 415),
        (Access(), {"content-type": ""}, 415),
        (Access(), {"content-type": "Application/JSON; charset=utf-8"}, None),
        (Access(api_keys=["k1", "k2"]), {}, 401),
        (Access(api_keys=["k1", "k2"]), {"authorization": "Bearer k"}, 401),
        (Access(api_keys=["k1", "k2"]), {"authorization": "Bearer k1k2"}, 401),
        (Access(api_keys=["k1", "k2"]), {"authorization": "Basic k1"}, 401),
        (Access(api_keys=["k1", "k2"]), {"authorization": "Bearer é"}, 401),
        (Access(api_keys=["k1", "k2"]), {"authorization": "bearer  k2 "}, None),
    ],
)  # fmt: skip
def test_what_is_refused(access, headers, status):
    refusal = access.refusal("POST", "/v1/completions", JSON | headers)
    assert (refusal and refusal.status) == status


def test_health_needs_no_key_and_reading_no_content_type():
    assert Access(api_keys=["k"]).refusal("GET", "/health", {}) is None
    assert (
        Access().refusal("GET", "/v1/models", {"origin": "http://evil.example"}) is None
    )  # a browser hides the answer
    assert Access(api_keys=["k"]).refusal("GET", "/v1/models", {}).status == 401


def test_clients_are_keys_if_there_are_several_and_networks_otherwise():
    assert [network_of(a) for a in ("10.0.0.7", "2001:db8::1", "fe80::1%eth0", "testclient")] == [
        "10.0.0.7", "2001:db8::/64", "fe80::/64", "testclient",
    ]  # fmt: skip
    one, two = ({"authorization": f"Bearer {key}"} for key in ("k1", "k2"))
    several = Access(api_keys=["k1", "k2"])
    assert several.client("10.0.0.7", one) != several.client("10.0.0.7", two)
    assert several.client("10.0.0.7", one) == several.client("10.0.0.8", one)
    same = Access(api_keys=["k1", "k1"])
    assert same.client("10.0.0.7", one) != same.client("10.0.0.8", one)
    assert Access().client("10.0.0.7", one) == Access().client("10.0.0.7", two)  # anybody can send other ones


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"allowed_hosts": ["a.example:80"]}, "allowed_host = 'a.example:80': .* without a port"),
        ({"allowed_hosts": ["http://a"]}, "allowed_host"),
        ({"api_keys": ["a b"]}, "api_key = '…'"),  # it is not repeated
        ({"api_keys": [""]}, "api_key"),
        ({"cors_origins": ["localhost:3000"]}, "cors_origin = .* without a path"),  # would never match
        ({"cors_origins": ["http://localhost:3000/"]}, "cors_origin = .* without a path"),
        ({"cors_origins": [""]}, "cors_origin = .* without a path"),
    ],
)
def test_what_no_request_matches_is_an_error(values, error):
    with pytest.raises(ConfigError, match=error):
        Access(**values)


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="no such file"):
        read_keys(path)
    path.write_text("k1\n\nk2\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        read_keys(path)
    path.chmod(0o600)
    assert read_keys(path) == ("k1", "k2")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has no key"):
        read_keys(path)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--host="], "host = '': would listen on every address"),
        (["--host", "0.0.0.0"], "host = '0.0.0.0': other machines could use it: give an API key"),
        (["--host", "::"], "host = '::'"),
        (["--host", "my-machine"], "host = 'my-machine'"),
        (["--host", "0.0.0.0", "--no-auth", "--api-key", "k"], "no_auth = True: contradicts the API key"),
        (["--port", "0"], "port = 0"),
        (["--max-seconds", "nan"], "max_seconds = nan"),
        (["--max-seconds", "0"], "max_seconds = 0.0"),
        (["--max-seconds", "inf"], "max_seconds = inf"),
        (["--max-waiting", "-1"], "max_waiting = -1"),
        (["--max-waiting", "1000000000000"], "max_waiting = 1000000000000"),
        (["--max-num-seqs", "1000000000000"], "max_num_seqs = 1000000000000"),
        (["--max-requests-per-client", "0"], "max_requests_per_client = 0"),
    ],
)
def test_flags_that_open_the_server_or_have_no_meaning(flags, error, capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.delenv("MLA_MOE_API_KEY", raising=False)
    assert main(["serve", "no/checkpoint", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {error}")


def test_with_a_key_other_machines_may_connect(capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("MLA_MOE_API_KEY", "secret")
    assert main(["serve", "no/checkpoint", "--host", "0.0.0.0"]) != 0
    error = capsys.readouterr().err
    assert "no/checkpoint" in error
    assert "secret" not in error
