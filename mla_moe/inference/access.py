"""Access to the server: which hosts a request may name, which web pages may send one, and with which key.

A page that a user of this machine visits can send requests to `localhost`, without reading the responses (cross-site
request forgery). They are refused by their `Origin`, or because their body is not declared as JSON.

A page can also let its own name point to 127.0.0.1, and then read the responses (DNS rebinding). Such requests are
refused by their `Host`, which is the page's name.
"""

import dataclasses
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mla_moe.config import require

LOOPBACK_NAMES = ("localhost", ".localhost")


class Refusal(NamedTuple):
    """Why a request is not allowed: the status, and the message, field and code of the error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may call the server; by default programs of this machine. Raises `ConfigError` for a value that no request
    matches."""

    allowed_hosts: Sequence[str] = ()
    """Names that `Host` may have besides IP addresses and loopback names. `.example.com` are all below it, `*` is any
    name."""
    cors_origins: Sequence[str] = ()
    """Origins whose pages may call it, or `*`."""
    api_keys: Sequence[str] = ()
    """One of them is required for every path but `/health`. Without any, everybody may call."""

    def __post_init__(self):
        for name in self.allowed_hosts:
            valid = name == "*" or _is_address(name) or re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*", name, re.ASCII)
            fix = "must be a name without a port, as model.example.com, or * for any"
            require(bool(valid), "allowed_host", name, fix)
        for origin in self.cors_origins:
            valid = origin in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin)
            require(
                bool(valid), "cors_origin", origin, "must be * or an origin without a path, as http://localhost:3000"
            )
        for key in self.api_keys:
            require(bool(re.fullmatch("[!-~]+", key)), "api_key", "…", "must be ASCII characters without spaces")

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request is not allowed, or None if it is. `headers` are by lower-case name."""
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._allows_host(host):
            return Refusal(403, f"Host = {host!r}: is not allowed; start the server with --allowed-host", "host")
        if method == "POST" and origin is not None and not {origin, "*"} & {*self.cors_origins}:
            return Refusal(403, f"Origin = {origin!r}: is not allowed; start the server with --cors-origin", "origin")
        if path != "/health" and not self._has_key(headers):
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            return Refusal(401, message, code="invalid_api_key")
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and media_type != "application/json":
            return Refusal(415, f"Content-Type = {media_type!r}: must be application/json", "content-type")
        return None

    def client(self, address: str, headers: Mapping[str, str]) -> str:
        """The client of an allowed request: its API key if there are several, else its network."""
        return _bearer(headers) if len({*self.api_keys}) > 1 else network_of(address)

    def _allows_host(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).lower().rstrip(".")
        names = (*LOOPBACK_NAMES, *map(str.lower, self.allowed_hosts))
        matches = any(n in ("*", name) or (n.startswith(".") and name.endswith(n)) for n in names)
        return matches or _is_address(name.removeprefix("[").removesuffix("]"))  # a rebound name is no address

    def _has_key(self, headers: Mapping[str, str]) -> bool:
        """Compares in constant time: all keys are compared, each as a whole."""
        given = _bearer(headers).encode()
        return not self.api_keys or any([hmac.compare_digest(given, key.encode()) for key in self.api_keys])


def require_access(host: str, api_keys: Sequence[str], *, no_auth: bool) -> None:
    """Raise `ConfigError` if listening on `host` would open the server to others without saying so."""
    require(bool(host.strip()), "host", host, "would listen on every address: say 0.0.0.0 or :: if that is intended")
    fix = "contradicts the API key: leave out one of them"
    require(not (no_auth and api_keys), "no_auth", no_auth, fix)
    is_loopback = ipaddress.ip_address(host).is_loopback if _is_address(host) else host.lower() == "localhost"
    fix = "other machines could use it: give an API key (--api-key-file, or MLA_MOE_API_KEY), or say --no-auth"
    require(is_loopback or bool(api_keys) or no_auth, "host", host, fix)


def read_keys(path: Path) -> tuple[str, ...]:
    """The API keys of a file, one a line. Raises `ConfigError` if there is none, or if others may read the file."""
    require(path.is_file(), "api_key_file", str(path), "no such file")
    require(not path.stat().st_mode & 0o077, "api_key_file", str(path), f"others may read it: chmod 600 {path}")
    keys = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    require(bool(keys), "api_key_file", str(path), "has no key; write one a line")
    return keys


def network_of(address: str) -> str:
    """The address that counts for limits of a client: of IPv6 the /64, since one machine can have all of it."""
    if not _is_address(address) or ipaddress.ip_address(address).version == 4:
        return address
    return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
